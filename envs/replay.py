"""A recording is only as good as its replay: the same seed and the same actions must show the same frames."""

from dataclasses import dataclass

import numpy as np

from ..data import Dataset
from ..errors import UserError
from .record import Make, registered
from .view import choose


@dataclass(frozen=True)
class Replay:
    """How a recorded episode compares with its actions executed again from its seed.

    Attributes:
        frames: frames compared.
        first_difference: the first frame where an image or the state differs; ``None`` where all are the same bit for bit.
        image_error: largest difference of a pixel value.
        state_error: largest difference of a state dimension.
    """

    frames: int
    first_difference: int | None
    image_error: int
    state_error: float


def replay(dataset: Dataset, episode: int, make: Make | None = None) -> Replay:
    """Execute the recorded actions of one episode again, and compare every frame.

    Raises:
        UserError: there is no such episode, or it does not say its world, seed and render profile.
    """
    if not 0 <= episode < len(dataset.episodes):
        raise UserError(f"{dataset.path} has no episode {episode}; it has 0 to {len(dataset.episodes) - 1}")
    recorded = dataset.episodes[episode]
    missing = [name for name in ("world", "seed", "render") if name not in recorded.meta]
    if missing:
        raise UserError(
            f"episode {episode} of {dataset.path} does not say its {', '.join(missing)}; only recordings of worlds can be replayed"
        )
    view = choose(render=recorded.meta["render"], like=dataset.contract)
    world, _ = (make or registered)(recorded.meta["world"], view)
    indices = np.arange(recorded.start, recorded.start + recorded.length)
    images = {camera: dataset.frames(camera, indices).astype(np.int16) for camera in dataset.cameras}
    states, actions = (dataset.vectors[key][indices] for key in ("observation.state", "action"))
    first, image_error, state_error = None, 0, 0.0
    try:
        obs, _ = world.reset(seed=recorded.meta["seed"])
        for step, action in enumerate(actions):
            pixels = max(int(np.abs(frames[step] - obs["pixels"][camera]).max()) for camera, frames in images.items())
            state = float(np.abs(states[step] - obs["agent_pos"]).max())
            if first is None and (pixels or state):
                first = step
            image_error, state_error = max(image_error, pixels), max(state_error, state)
            obs, *_ = world.step(action)
    finally:
        world.close()
    return Replay(len(actions), first, image_error, state_error)

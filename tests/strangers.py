"""A dataset as a stranger would make it: with lerobot's own recorder and names of their own, in a robosuite world.

Nothing of ours is in the folder: no contract, no units, no seeds. What a user brings from their own laboratory looks like this.
"""

from pathlib import Path

import numpy as np

from triune.data import Observation
from triune.envs import make_expert, make_world

WORLD = "robosuite/lift"
RATE = 10
HEIGHT, WIDTH = 120, 160
CAMERAS = {"top_cam": "agentview", "side_cam": "sideview", "hand_cam": "wrist"}
"""The stranger's names, and ours of the same cameras."""
STATE = ("ee.x", "ee.y", "ee.z", *(f"ee.r{column}{row}" for column in (1, 2) for row in (1, 2, 3)), "finger_gap")
ACTION = ("ee.delta_x", "ee.delta_y", "ee.delta_z", "ee.delta_rx", "ee.delta_ry", "ee.delta_rz", "gripper_cmd")
TASK = "pick up the red block"


def record_as_stranger(folder: Path, episodes: int = 3, seed: int = 0, video: bool = False) -> None:
    """Scripted demonstrations of ``WORLD`` at ``RATE`` Hz as lerobot writes them: 120 x 160 pixels of three cameras, 10 state dimensions
    (metres, rotation matrix columns, metres), 7 action dimensions (as the world takes them), one frame per control step.

    Args:
        folder: does not exist yet.
        episodes: seeds ``seed``, ``seed + 1``, ...; each ends with the first success.
        video: AV1 in mp4 instead of PNG.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"dtype": "video" if video else "image", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{camera}": image for camera in CAMERAS}
    features["observation.state"] = {"dtype": "float32", "shape": (len(STATE),), "names": list(STATE)}
    features["action"] = {"dtype": "float32", "shape": (len(ACTION),), "names": list(ACTION)}
    dataset = LeRobotDataset.create("stranger/blocks", RATE, features, root=folder, robot_type="panda", use_videos=video)
    world, expert = make_world(WORLD, rate=RATE, size=(HEIGHT, WIDTH), cameras=CAMERAS.values()), make_expert(WORLD)
    try:
        for number in range(seed, seed + episodes):
            obs, info = world.reset(seed=number)
            while not info["is_success"]:
                action = expert(world.privileged())
                dataset.add_frame(_frame(world.observation(obs), action))
                obs, _, _, truncated, info = world.step(action)
                assert not truncated, f"the expert failed with seed {number}"
            dataset.save_episode()
    finally:
        world.close()
        dataset.finalize()


def _frame(seen: Observation, action: np.ndarray) -> dict[str, object]:
    images = {f"observation.images.{theirs}": seen.images[ours] for theirs, ours in CAMERAS.items()}
    return {**images, "observation.state": seen.state, "action": action, "task": TASK}

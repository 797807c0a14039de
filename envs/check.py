"""One checker for every world: does it keep the promises of ``envs/base.py``?

``python -m triune.envs.check [name ...]`` checks worlds by name, all of them by default: as they are, and in ``another_view``.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from gymnasium.utils.env_checker import check_env

from ..errors import UserError
from .base import World
from .registry import build_world, camera_names, make_expert, world_names
from .view import DEFAULT, Shot, View

PROPRIOCEPTION = ("eef_", "rot6d_", "gripper", "joint_")
"""How names of state dimensions may begin: what a robot knows of itself."""
STEPS = 5
SEED = 500_000


def check_world(name: str, view: View = DEFAULT, make: Callable[[str, View], World] = build_world) -> list[str]:
    """What the world of that name breaks when it is seen so, one sentence each; empty when it keeps every promise.

    Checked: the cameras, sizes, rate and profile that were asked for; gymnasium's ``check_env`` without warnings; bit for
    bit the same rollout (states and pixels) from the same seed, after another episode, in a second instance, and whether
    or not privileged state was asked for; distinct starts for distinct seeds; success as a bool at every step and no early
    end; an instruction; observations inside their space, of pixels and proprioception alone; ``step_chunk`` equal to steps;
    an expert whose actions are legal.
    """
    world, other = make(name, view), make(name, view)
    try:
        return [f"{name}: {problem}" for problem in (*_view(world, view), *_problems(world, other))]
    finally:
        world.close()
        other.close()


def another_view(name: str) -> View:
    """Up to three cameras, the last that a world offers first, each with a size of its own; half the control rate, where it allows that."""
    sizes = ((40, 56), (32, 32), (64, 24))
    shots = tuple(Shot(camera, *size) for camera, size in zip(reversed(camera_names(name)), sizes, strict=False))
    with build_world(name) as world:
        half = View(shots, world.rate / 2)
    try:
        build_world(name, half).close()
    except UserError:
        return View(shots)
    return half


def _view(world: World, view: View) -> Iterator[str]:
    shots = tuple(Shot(camera.name, camera.height or 0, camera.width or 0) for camera in world.contract.cameras)
    if shots != view.shots:
        yield f"its contract has {shots} where {view.shots} were asked for"
    if view.rate is not None and world.rate != view.rate:
        yield f"it runs at {world.rate} Hz where {view.rate} were asked for"
    if world.contract.render != view.render:
        yield f"its render profile is {world.contract.render} where {view.render} was asked for"


def _problems(world: World, other: World) -> Iterator[str]:
    yield from _words(world)
    try:
        world.step(np.zeros(world.action_space.shape))
        yield "a step before the first reset is not refused"
    except UserError:
        pass
    with _gymnasium_says() as says:
        check_env(world, skip_render_check=True)
    yield from says
    yield from _observation(world)
    yield from _same(world, other)
    yield from _starts(world)
    yield from _chunk(world)
    yield from _expert(world)


def _words(world: World) -> Iterator[str]:
    if not world.task_description.strip():
        yield "it has no instruction"
    if world.max_steps < 1 or world.rate <= 0:
        yield f"max_steps {world.max_steps} and rate {world.rate} must be positive"
    if world.contract.rate != world.rate or world.contract.render is None:
        yield "its contract must say its control rate and its render profile"
    foreign = [name for name in world.contract.state.names if not name.startswith(PROPRIOCEPTION)]
    if foreign:
        yield f"its state holds {', '.join(foreign)}, which a robot does not know of itself"


def _observation(world: World) -> Iterator[str]:
    obs, info = world.reset(seed=SEED)
    if set(obs) != {"pixels", "agent_pos"}:
        yield f"an observation holds {sorted(obs)} instead of pixels and agent_pos alone"
    for moment in range(STEPS):
        if obs not in world.observation_space:
            yield f"the observation after {moment} steps is outside its space"
        if not isinstance(info["is_success"], bool):
            yield f"is_success after {moment} steps is a {type(info['is_success']).__name__}, not a bool"
        obs, _, terminated, truncated, info = world.step(_actions(world)[moment])
        if terminated or truncated:
            yield f"the episode ended after {moment + 1} steps"
    if obs["agent_pos"].shape != (world.contract.state.size,) or tuple(obs["pixels"]) != world.contract.camera_names:
        yield "observations have other cameras or another state size than the contract"
    if not world.render().any():
        yield "its images are black"


def _same(world: World, other: World) -> Iterator[str]:
    first = _rollout(world, SEED)
    _rollout(world, SEED + 1)
    pairs = {
        "after another episode": _rollout(world, SEED),
        "in a second instance": _rollout(other, SEED),
        "when privileged state is asked for": _rollout(world, SEED, spy=True),
    }
    for when, second in pairs.items():
        for kind in ("agent_pos", "pixels"):
            step = next((i for i, (a, b) in enumerate(zip(first[kind], second[kind], strict=True)) if a != b), None)
            if step is not None:
                yield f"{when}, the same seed and actions give another {kind} at step {step}"


def _starts(world: World) -> Iterator[str]:
    starts = []
    for seed in range(SEED, SEED + STEPS):
        world.reset(seed=seed)
        starts.append(_privileged(world))
    if len(set(starts)) < len(starts):
        yield f"only {len(set(starts))} of {len(starts)} seeds have a start of their own"


def _chunk(world: World) -> Iterator[str]:
    stepped = _rollout(world, SEED)
    world.reset(seed=SEED)
    obs, info, frames = world.step_chunk(_actions(world), video=True)
    if info["steps"] != STEPS or len(frames) != STEPS or [_bytes(frame) for frame in frames] != stepped["pixels"][1:]:
        yield "step_chunk with video does not equal single steps"
    world.reset(seed=SEED)
    obs, info, frames = world.step_chunk(_actions(world))
    if frames or _bytes(obs["pixels"]) != stepped["pixels"][-1] or obs["agent_pos"].tobytes() != stepped["agent_pos"][-1]:
        yield "step_chunk does not equal single steps"
    if not {"steps", "is_success", "truncated"} <= set(info):
        yield "the info of step_chunk lacks steps, is_success or truncated"


def _expert(world: World) -> Iterator[str]:
    expert = make_expert(world.name)
    world.reset(seed=SEED)
    action = expert(world.privileged())
    if action not in world.action_space:
        yield f"its expert's action {action} is outside the action space"
    if not np.array_equal(action, expert(world.privileged())):
        yield "its expert answers the same state differently"
    known = world.privileged()
    if not {"cameras", "gripper"} <= set(known) or set(known["cameras"]) != set(world.contract.camera_names):
        yield "its privileged state lacks gripper, or cameras as its contract has them"


def _rollout(world: World, seed: int, spy: bool = False) -> dict[str, list[bytes]]:
    obs, _ = world.reset(seed=seed)
    seen = [obs]
    for action in _actions(world):
        if spy:
            _privileged(world)
        seen.append(world.step(action)[0])
    return {"agent_pos": [obs["agent_pos"].tobytes() for obs in seen], "pixels": [_bytes(obs["pixels"]) for obs in seen]}


def _actions(world: World) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, (STEPS, *world.action_space.shape)).astype(np.float32)


def _bytes(images: dict[str, np.ndarray]) -> bytes:
    return b"".join(images[camera].tobytes() for camera in sorted(images))


def _privileged(world: World) -> str:
    return json.dumps({key: value for key, value in world.privileged().items() if key != "cameras"})


@contextmanager
def _gymnasium_says() -> Iterator[list[str]]:
    """Collects what gymnasium's checker warns of or refuses within."""
    says: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield says
        except AssertionError as error:
            says.append(f"gymnasium: {error}")
    says += [f"gymnasium: {warning.message}" for warning in caught]


def main(names: list[str]) -> int:
    """Check worlds and print one line each; returns how many break a promise."""
    broken = 0
    for name in names or world_names():
        problems = [*check_world(name), *check_world(name, another_view(name))]
        broken += bool(problems)
        print("\n".join(problems) if problems else f"{name}: ok", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))

"""Demonstrations of the scripted experts, recorded as a LeRobotDataset.

Processes simulate, each with its own worlds; the caller's process writes, in the order of the seeds. So the dataset is
the same for any number of workers, and a recording that was killed goes on after its last published episode.
"""

import importlib
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from ..data import Contract, Episode
from ..data.readers.metadata import read_facts, read_info
from ..data.writer import DatasetWriter, check_lerobot
from ..errors import UserError
from .base import Expert, World
from .view import DEFAULT, View

Make = Callable[[str, View], tuple[World, Expert]]
"""World name and view -> a world and its expert."""
Progress = Callable[[int, int], None]
_Job = tuple[str, float, float, View, Make | None]
"""World name, noise, pushes, view, ``make``."""

SETTLE = 4
"""Steps recorded after the first success, so that a policy also sees what to do when it is done."""
PUSH_STEPS = (3, 9)
"""A push lasts so many steps, the last excluded."""
PUSH = 0.4
"""Largest part of an action's range that a push uses; the gripper opens or closes fully."""
HOPELESS = 20
"""After so many attempts an expert must have succeeded in at least one of five."""
FACTS = ("cameras", "gripper")
"""What of the privileged state at the start is kept beside an episode: camera intrinsics and extrinsics, gripper pose."""


def record(
    world: str,
    episodes: int,
    out: str | Path,
    *,
    seed: int = 0,
    noise: float = 0.0,
    pushes: float = 0.0,
    workers: int = 2,
    keep_failures: bool = False,
    view: View = DEFAULT,
    video: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Record ``episodes`` demonstrations of one world; see ``record_all``."""
    return record_all(
        {world: episodes},
        out,
        seed=seed,
        noise=noise,
        pushes=pushes,
        workers=workers,
        keep_failures=keep_failures,
        view=view,
        video=video,
        progress=progress,
    )


def record_all(
    worlds: Mapping[str, int],
    out: str | Path,
    *,
    seed: int = 0,
    noise: float = 0.0,
    pushes: float = 0.0,
    workers: int = 2,
    keep_failures: bool = False,
    view: View = DEFAULT,
    video: bool = False,
    progress: Progress | None = None,
    make: Make | None = None,
) -> Path:
    """Record demonstrations of several worlds into one dataset, world after world.

    A folder that holds a part of them already is continued from each world's next seed.

    Args:
        worlds: world name -> episodes to have in the end.
        out: dataset folder.
        seed: of each world's first attempt; later attempts count up.
        noise: standard deviation of Gaussian noise on the executed action, all dimensions but the gripper. ``action``
            is what was executed, ``action.expert`` what the expert wanted.
        pushes: chance per step that a push begins: a few steps of one random action, after which the expert mends what
            was done. So demonstrations show misses and how to recover. ``disturbed`` marks these steps, and training
            neither imitates them nor predicts across them.
        workers: processes that simulate.
        keep_failures: keep episodes without success too.
        view: cameras with their sizes, control rate and render profile of the worlds.
        video: store AV1 video instead of PNG: smaller, and no longer bit for bit.
        progress: called with (episodes in the dataset, episodes wanted) after each one is on the disk.
        make: builds a world and its expert; default: those of the registry.

    Returns:
        the folder.

    Raises:
        UserError: an expert hardly ever succeeds, the worlds do not share their conventions, or the folder holds
            something else.
    """
    folder = Path(out)
    have = _recorded(folder)
    total = sum(worlds.values())
    done = {name: min(count, len(have.get(name, []))) for name, count in worlds.items()}
    if progress is not None:
        progress(sum(done.values()), total)
    if done == dict(worlds):
        return folder
    check_lerobot()
    if make is None:
        _check(worlds, view)
    loading = threading.Thread(target=importlib.import_module, args=("lerobot.datasets",))  # seconds, while worlds are built
    loading.start()
    writer: DatasetWriter | None = None
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        for name in worlds:
            first = max([seed, *(taken + 1 for taken in have.get(name, []))])
            tried = kept = 0
            attempts = _in_order(pool, first, 2 * workers, (name, noise, pushes, view, make))
            while done[name] < worlds[name]:
                contract, episode = next(attempts)
                tried += 1
                if writer is None:
                    loading.join()  # two threads must not import the same modules
                    writer = DatasetWriter(folder, contract, _rate(contract, name), video=video, robot=name.split("/")[0])
                contract.require(writer.contract, f"world {name}", str(folder))
                if keep_failures or episode.meta["success"]:
                    writer.add(episode)
                    kept += 1
                    done[name] += 1
                    if progress is not None:
                        progress(sum(done.values()), total)
                if tried >= HOPELESS and kept * 5 < tried:
                    rate = f"{kept} of {tried} episodes"
                    raise UserError(f"the expert of {name} succeeded in {rate}; keep failures too, or choose another world")
            attempts.close()
    finally:
        loading.join()
        if writer is not None:
            writer.close()
        pool.shutdown(cancel_futures=True)
    return folder


def demonstrate(world: World, expert: Expert, seed: int, noise: float = 0.0, pushes: float = 0.0) -> Episode:
    """One episode of an expert in a world, until ``SETTLE`` steps after its first success or the world's time is up.

    Frame t is what a policy sees before action t. Noise and pushes are drawn from ``seed`` alone.
    """
    generator = np.random.default_rng((seed, 1))
    low, high = world.action_space.low, world.action_space.high
    spread = np.array([0.0 if "gripper" in name else noise for name in world.contract.action.names])
    obs, _ = world.reset(seed=seed)
    privileged = world.privileged()
    facts = {name: privileged[name] for name in FACTS}
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in world.contract.camera_names}
    states, actions, labels, disturbed = [], [], [], []
    push, left = np.zeros(len(spread), np.float32), 0
    success: int | None = None
    for step in range(world.max_steps):
        for camera, frames in images.items():
            frames.append(obs["pixels"][camera])
        states.append(obs["agent_pos"])
        label = np.clip(np.asarray(expert(world.privileged()), np.float32), low, high)
        action = np.clip(label + spread * generator.standard_normal(len(label)), low, high).astype(np.float32)
        if pushes and not left and generator.random() < pushes:
            push, left = _push(generator, world), int(generator.integers(*PUSH_STEPS))
        disturbed.append([left > 0])
        if left:
            action, left = push, left - 1
        labels.append(label)
        actions.append(action)
        obs, _, _, truncated, info = world.step(action)
        if success is None and info["is_success"]:
            success = step + 1
        if truncated or (success is not None and step + 1 >= success + SETTLE):
            break
    meta = {
        "world": world.name,
        "seed": seed,
        "success": success is not None,
        "first_success_step": success,
        "noise": noise,
        "pushes": pushes,
        **facts,
    }
    extra = {"action.expert": np.stack(labels)}
    if pushes:
        extra["disturbed"] = np.array(disturbed, np.float32)
    stacked = {camera: np.stack(frames) for camera, frames in images.items()}
    return Episode(stacked, np.stack(states).astype(np.float32), np.stack(actions), world.task_description, meta, extra)


def _push(generator: np.random.Generator, world: World) -> np.ndarray:
    """A random action (A,): moderate in all dimensions but the gripper's, which goes to one end."""
    low, high = world.action_space.low, world.action_space.high
    drawn = generator.uniform(PUSH * low, PUSH * high)
    ends = np.where(generator.random(len(low)) < 0.5, low, high)
    return np.where(["gripper" in name for name in world.contract.action.names], ends, drawn).astype(np.float32)


def registered(name: str, view: View) -> tuple[World, Expert]:
    """A world of the registry and its expert. A simulator that was built before and serves this task too is taken again."""
    from .registry import build_world, make_expert

    built = _built.setdefault(view, [])
    world = next((world for world in built if world.become(name)), None)
    if world is None:
        world = build_world(name, view)
        built.append(world)
    return world, make_expert(name)


def _check(worlds: Iterable[str], view: View) -> None:
    """Refuse an unknown world, and a view that one of them does not offer, before processes are started."""
    from .registry import build_world

    for name in worlds:
        build_world(name, view).close()


def _recorded(folder: Path) -> dict[str, list[int]]:
    """World -> seeds that a dataset folder holds already."""
    seeds: dict[str, list[int]] = {}
    if (folder / "meta" / "info.json").is_file():
        count = int(read_info(folder)["total_episodes"])
        for index, fact in read_facts(folder).items():
            if index < count and "world" in fact:
                seeds.setdefault(fact["world"], []).append(fact["seed"])
    return seeds


def _rate(contract: Contract, name: str) -> float:
    if contract.rate is None:
        raise UserError(f"the contract of world {name} has no control rate; set it, since a dataset needs one")
    return contract.rate


def _in_order(pool: ProcessPoolExecutor, first: int, ahead: int, job: _Job) -> Generator[tuple[Contract, Episode]]:
    """Attempts of seeds ``first``, ``first + 1``, ... in this order, ``ahead`` of them under way."""
    waiting: deque[Future[tuple[Contract, Episode]]] = deque()
    try:
        for seed in itertools.count(first):
            waiting.append(pool.submit(_attempt, seed, job))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _attempt(seed: int, job: _Job) -> tuple[Contract, Episode]:
    """In a worker: one episode of a world, which is built once and kept."""
    name, noise, pushes, view, make = job
    world, expert = _kept(make or registered, name, view)
    world.become(name)
    episode = demonstrate(world, expert, seed, noise, pushes)
    episode.meta.update(render=view.render)
    return world.contract, episode


_built: dict[View, list[World]] = {}
"""In a worker: worlds of the registry."""


@cache
def _kept(make: Make, name: str, view: View) -> tuple[World, Expert]:
    return make(name, view)


def _end_with_parent() -> None:
    """In a worker: leave when the recorder was killed, which closes no pipe that a worker waits on."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Control steps per second of simulated worlds, with images after each chunk of eight steps."""

import time

import numpy as np

from ...envs import make_world
from .run import Row, row

WORLDS = ("cubes/lift-red", "metaworld/reach-v3")
CHUNK, CHUNKS = 8, 5


def run() -> list[Row]:
    """One row per world: ``step_chunk`` in the fast render profile, beside default rendering after every step."""
    return [
        row(name, _rate(name, "fast", CHUNK), _rate(name, "default", 1), "default rendering, every step", "steps/s", 2.0) for name in WORLDS
    ]


def _rate(name: str, render: str, chunk: int) -> float:
    world = make_world(name, render=render)
    try:
        world.reset(seed=500_000)
        actions = np.zeros((CHUNK * CHUNKS, len(world.contract.action.names)), np.float32)
        world.step_chunk(actions[:chunk])
        start = time.perf_counter()
        for i in range(0, len(actions), chunk):
            world.step_chunk(actions[i : i + chunk])
        return len(actions) / (time.perf_counter() - start)
    finally:
        world.close()

"""A world without a simulator: a point that an expert moves to a goal, seen by two cameras."""

from pathlib import Path
from typing import Any

import numpy as np

from triune.data import Camera, Contract, Vector
from triune.envs.base import Expert, World
from triune.envs.view import View, choose

SIZE = 16
VIEW = choose(size=SIZE)


class PointWorld(World):
    """The goal is in sight when the point comes nearer than 0.1; with seeds divisible by 3 it cannot be reached."""

    def __init__(self, name: str) -> None:
        contract = Contract(
            cameras=(Camera(name="agentview", height=SIZE, width=SIZE), Camera(name="wrist", height=SIZE, width=SIZE)),
            state=Vector(names=("x", "y")),
            action=Vector(names=("dx", "dy", "gripper")),
            rate=20.0,
            render="fast",
        )
        super().__init__(name, f"go to the goal of {name}", 40, contract, ([-9.0, -9.0], [9.0, 9.0]))

    def privileged(self) -> dict[str, Any]:
        return {"goal": self.goal.tolist(), "point": self.point.tolist(), "cameras": {}, "gripper": {"position": self.point.tolist()}}

    def _begin(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.point = np.zeros(2)
        self.goal = generator.uniform(-1, 1, 2) + (100 if seed % 3 == 0 else 0)

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        self.point = self.point + 0.2 * action[:2]
        return 0.0, bool(np.linalg.norm(self.goal - self.point) < 0.1)

    def _state(self) -> np.ndarray:
        return self.point

    def _images(self) -> dict[str, np.ndarray]:
        row = np.arange(SIZE, dtype=np.float64)
        picture = np.add.outer(row * self.point[0], row * self.point[1])[..., None] * [1, 2, 3]
        return {"agentview": (picture * 50).astype(np.int64).astype(np.uint8), "wrist": (picture * 90).astype(np.int64).astype(np.uint8)}


def expert(privileged: dict[str, Any]) -> np.ndarray:
    away = np.array(privileged["goal"]) - privileged["point"]
    return np.clip([*(5 * away), -1.0], -1, 1)


def make(name: str, view: View) -> tuple[World, Expert]:
    assert view in (VIEW, choose(size=SIZE, rate=20.0))
    return PointWorld(name), expert


def hopeless(name: str, view: View) -> tuple[World, Expert]:
    return PointWorld(name), lambda privileged: np.zeros(3)


def record_for_ever(out: str) -> None:
    """Entry of a process that a test kills."""
    from triune.envs.record import record_all

    record_all({"point/a": 10_000}, Path(out), workers=1, view=VIEW, make=make, progress=lambda done, _: print(done, flush=True))


def record_some() -> None:
    """Entry of a process that a test kills or leaves without room: ``FOLDER EPISODES``, of a world that is not in the registry."""
    import sys

    from triune import UserError
    from triune.envs.record import record_all

    try:
        record_all({"point/a": int(sys.argv[2])}, Path(sys.argv[1]), workers=1, noise=0.1, view=VIEW, make=make)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

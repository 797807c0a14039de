"""Policies that need no network, for bodies that are driven through a server."""

import numpy as np

from triune.data import ActionChunk, Camera, Contract
from triune.data.robot import load_robot
from triune.envs import make_world
from triune.policies import Plan, Policy, Request

CHUNK = 20


class Waves(Policy):
    """Slow sines, each action a function of the time for which it is meant, so that chunks continue each other."""

    def __init__(self, contract: Contract, swing: float, seconds: float) -> None:
        import time

        self.contract, self.swing, self.sleep, self.seconds = contract, swing, time.sleep, seconds

    def reset(self, session: str, seed: int) -> None:
        """Nothing is kept."""

    def plan(self, requests: list[Request]) -> list[Plan]:
        self.sleep(self.seconds)
        return [Plan(ActionChunk(self.actions(r.observation.timestamp), self.contract.rate, r.observation.timestamp)) for r in requests]

    def actions(self, time: float) -> np.ndarray:
        assert self.contract.rate is not None
        at = time + np.arange(CHUNK)[:, None] / self.contract.rate
        return self.swing * np.sin(at + np.arange(self.contract.action.size))


def arm(mapping: str, swing: float = 30.0, seconds: float = 0.0, size: int = 64) -> Policy:
    """For a robot of that mapping."""
    contract = load_robot(mapping).contract
    cameras = tuple(Camera(name=c.name, height=size, width=size) for c in contract.cameras)
    return Waves(contract.model_copy(update={"cameras": cameras, "chunk": CHUNK, "executed": CHUNK // 2}), swing, seconds)


def world(name: str, swing: float = 0.2, seconds: float = 0.0) -> Policy:
    """For a simulated world."""
    made = make_world(name)
    try:
        return Waves(made.contract.model_copy(update={"chunk": CHUNK, "executed": CHUNK // 2}), swing, seconds)
    finally:
        made.close()

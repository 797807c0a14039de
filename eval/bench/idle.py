"""A policy that thinks for as long as it is told and answers zeros: what a server costs beside it."""

import random
import time

import numpy as np

from ...data import ActionChunk, Camera, Contract, Vector
from ...policies.base import Plan, Policy, Request

STATE, CHUNK, ACTION = 8, 50, 32


class Idle(Policy):
    """The instruction ``work S`` keeps all cores busy for S seconds.

    Args:
        seconds: least and most of one call, however many ask; drawn from a generator that is seeded by 0.
        cameras, size: how many pictures of (height, width).
        rate: control rate, Hz.
    """

    def __init__(
        self, seconds: tuple[float, float] = (0.0, 0.0), cameras: int = 2, size: tuple[int, int] = (224, 224), rate: float = 50.0
    ) -> None:
        self.seconds, self.random = seconds, random.Random(0)
        height, width = size
        self.contract = Contract(
            cameras=tuple(Camera(name=f"camera_{i}", height=height, width=width) for i in range(cameras)),
            state=Vector(names=tuple(f"state_{i}" for i in range(STATE))),
            action=Vector(names=tuple(f"action_{i}" for i in range(ACTION))),
            rate=rate,
            chunk=CHUNK,
            executed=CHUNK // 2,
        )

    def reset(self, session: str, seed: int) -> None:
        """Nothing is kept of a session."""

    def plan(self, requests: list[Request]) -> list[Plan]:
        began = time.perf_counter()
        seconds = self.random.uniform(*self.seconds)
        if seconds:
            time.sleep(seconds)
        for request in requests:
            word, _, rest = request.observation.instruction.partition(" ")
            if word == "work":
                work(float(rest))
        timing = {"model": 1e3 * (time.perf_counter() - began)}
        rate = self.contract.rate or 0.0
        zeros = np.zeros((CHUNK, ACTION), np.float32)
        return [Plan(ActionChunk(zeros, rate, request.observation.timestamp), timing=timing) for request in requests]


def work(seconds: float) -> None:
    """Multiply matrices, in as many threads as numpy takes."""
    until, matrix = time.perf_counter() + seconds, np.ones((1024, 1024), np.float32)
    while time.perf_counter() < until:
        matrix = np.tanh(matrix @ matrix)

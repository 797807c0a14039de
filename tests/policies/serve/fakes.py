"""Policies without a network, made in the policy's process: what they answer is known, and an instruction makes them fail."""

import hashlib
import os
import signal
import time

import numpy as np

from triune.data import ActionChunk, Camera, Contract, Vector
from triune.errors import UserError
from triune.policies import Plan, Policy, Request

CHUNK, ACTION, STATE = 50, 32, 8


class Fake(Policy):
    """Its actions are a function of (seed, step of the session, state, pictures).

    The instruction ``sleep S`` takes S seconds, ``raise`` is a defect, ``mistake`` a user's mistake, ``die`` ends the process by SIGKILL,
    and ``nan`` answers with a number that is not finite in the first step.
    """

    def __init__(self, seconds: float = 0.0, load: float = 0.0, size: int = 224, refuse: str = "") -> None:
        if refuse:
            raise UserError(refuse)
        time.sleep(load)
        self.seconds = seconds
        self.sessions: dict[str, list[int]] = {}
        self.bands = {"state": ([-1.0] * STATE, [1.0] * STATE), "action": ([-2.0] * ACTION, [2.0] * ACTION)}
        self.contract = Contract(
            cameras=tuple(Camera(name=name, height=size, width=size) for name in ("agentview", "wrist")),
            state=Vector(names=tuple(f"s{i}" for i in range(STATE))),
            action=Vector(names=tuple(f"a{i}" for i in range(ACTION))),
            rate=50.0,
            chunk=CHUNK,
            executed=25,
        )

    def reset(self, session: str, seed: int) -> None:
        self.sessions[session] = [seed, 0]

    def skip(self, session: str, plans: int) -> None:
        self.sessions[session][1] += plans

    def close(self, session: str) -> None:
        self.sessions.pop(session, None)

    def plan(self, requests: list[Request]) -> list[Plan]:
        time.sleep(self.seconds)
        return [self._plan(request, len(requests)) for request in requests]

    def _plan(self, request: Request, batch: int) -> Plan:
        seen = request.observation
        word, _, rest = seen.instruction.partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        elif word == "raise":
            raise RuntimeError("a defect, seen in /srv/somebody/secret/place.py")
        elif word == "mistake":
            raise UserError("the text is too long for /srv/somebody/secret/policy.json; shorten it")
        elif word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        session = self.sessions[request.session]
        actions = expected(session[0], session[1], seen.state, seen.images)
        session[1] += 1
        if word == "nan":
            actions[0, 3] = np.nan
        drawn = {name: 255 - image for name, image in seen.images.items()}
        timing = {"model": 1e3 * self.seconds, "asked": float(batch), "sessions": float(len(self.sessions))}
        return Plan(ActionChunk(actions, 50.0, seen.timestamp), lambda: drawn, value=0.5, timing=timing)


def expected(seed: int, step: int, state: np.ndarray, images: dict[str, np.ndarray]) -> np.ndarray:
    """The actions (C, A) of ``Fake``."""
    digest = hashlib.sha256(b"".join(images[name].tobytes() for name in sorted(images))).digest()
    rng = np.random.default_rng([seed, step, *digest[:4]])
    return (rng.standard_normal((CHUNK, ACTION)) + float(state.sum())).astype(np.float32)


class Shifted(Fake):
    """As ``Fake``, and one more in every action."""

    def _plan(self, request: Request, batch: int) -> Plan:
        plan = super()._plan(request, batch)
        return Plan(ActionChunk(plan.chunk.actions + 1, plan.chunk.rate, plan.chunk.time), plan.foresight, timing=plan.timing)


class Forward(Fake):
    """As ``Fake``, and cannot begin in the middle."""

    skip = Policy.skip

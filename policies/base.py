"""The Policy contract: everything that turns observations into action chunks is one of these."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data import ActionChunk, Contract, Observation
from ..errors import UserError


@dataclass(frozen=True, eq=False)
class Request:
    """One session asks for its next chunk.

    Attributes:
        session: name of the episode or robot; state that a policy keeps is kept per session.
        observation: what is seen now.
        prefix: what is left of the chunk before, in physical units; the first of it is executed in the control step that begins at the
            observation. The answer goes on from it.
        delay: control steps that will have been executed before the answer can take effect: so many actions of ``prefix`` are settled.
        samples: how many chunks to draw.
    """

    session: str
    observation: Observation
    prefix: ActionChunk | None = None
    delay: int = 0
    samples: int = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """A policy's answer.

    Attributes:
        chunk: what to do.
        foresight: draws what is expected to be seen after the executed part, camera name -> uint8 (H, W, 3); absent where
            the policy foresees nothing. Drawing takes time that only who looks should pay.
        value: the policy's own estimate of success, where it has one.
        timing: stage -> milliseconds; also the age of what was not computed anew, ``age of <phase>``.
        samples: all chunks that were drawn, ``chunk`` the first; empty where one was asked for.
    """

    chunk: ActionChunk
    foresight: Callable[[], dict[str, np.ndarray]] | None = None
    value: float | None = None
    timing: dict[str, float] = field(default_factory=dict)
    samples: tuple[ActionChunk, ...] = ()


class Policy(ABC):
    """Turns requests into plans. Answers are a function of (seed, step of the session, observation) alone: the same
    for any batch composition and any number of workers."""

    contract: Contract
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {}
    """``state``, ``action`` -> the 1 % and 99 % quantiles of each dimension in the training data, where they are known."""

    @property
    def limits(self) -> dict[str, Any] | None:
        """What may be sent to its robot, as ``triune_client.ActionLimits.from_dict`` reads it; ``None`` where it knows none."""
        return None

    @property
    def realtime(self) -> dict[str, int | bool]:
        """What becomes of ``Request.prefix``: ``prefix``, how many of its actions may be settled as the policy was trained to; ``guided``,
        whether any number may lead the answer. Neither: it is refused."""
        return {"prefix": 0, "guided": False}

    @abstractmethod
    def reset(self, session: str, seed: int) -> None:
        """Begin an episode: forget the session's state and key its noise by ``seed``."""

    @abstractmethod
    def plan(self, requests: list[Request]) -> list[Plan]:
        """Answer a batch of requests, in order. Where it raises no session has gone on: each may be asked again."""

    def skip(self, session: str, plans: int) -> None:
        """Go on with a session that has just begun as if so many plans had been made: their noise is not drawn again.

        Raises:
            UserError: the policy cannot begin in the middle.
        """
        raise UserError(f"{type(self).__name__} cannot begin a session in the middle; replay one that was recorded from its first request")

    def close(self, session: str) -> None:  # noqa: B027  # most policies keep nothing
        """End an episode: what is kept of the session may be forgotten. One that never began is no error."""

    def act(self, request: Request) -> Plan:
        """``plan`` of one."""
        return self.plan([request])[0]

    def warm(self, sessions: int) -> None:
        """Do what the first calls pay for, before anyone waits: compile, capture, allocate.

        Args:
            sessions: how many may ask at once.
        """
        names = [f"warm-up {i}" for i in range(sessions)]
        for count in sorted({1, sessions}):
            for name in names[:count]:
                self.reset(name, seed=0)
            self.plan([Request(name, example(self.contract)) for name in names[:count]])
        for name in names:
            self.close(name)


def example(contract: Contract) -> Observation:
    """An observation that fits ``contract``: black pictures, of 224 x 224 where it says no size, and a state of zeros."""
    images = {c.name: np.zeros((c.height or 224, c.width or 224, 3), np.uint8) for c in contract.cameras}
    return Observation(images, np.zeros(contract.state.size, np.float32), "warm up")

"""What goes between dialects, the service and who listens: requests answered or refused."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..base import Request

Code = Literal["bad_request", "contract", "late", "busy", "worker", "unauthorized", "too_large", "internal"]


class Refusal(Exception):
    """A request that is not answered; the sentence goes to the client, so it names no files and shows no traceback."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.heard = False


@dataclass(frozen=True, eq=False)
class Reply:
    """A plan as a client gets it.

    Attributes:
        actions: float32 (C, A) in physical units; rate: Hz; time: timestamp of the observation.
        timing: stage -> milliseconds; ``queue`` is what the request waited for others.
        events: what the guard changed, ``<kind> <dimension>`` -> at how many steps.
        foresight: camera -> uint8 (H, W, 3), where it was asked for.
        samples: float32 (N, C, A), all chunks as the policy drew them, where several were asked for; the guard keeps ``actions`` alone.
    """

    actions: np.ndarray
    rate: float
    time: float
    timing: dict[str, float]
    value: float | None = None
    events: dict[str, int] = field(default_factory=dict)
    foresight: dict[str, np.ndarray] = field(default_factory=dict)
    samples: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Exchange:
    """One request and what became of it, as listeners hear of it.

    Attributes:
        seed, step: of the session; with the observation they are all that its actions depend on.
        reply: also with what was drawn for listeners alone.
        seconds: from when the service was asked until it answered.
        planned: float32 (C, A), the policy's own chunk before the guard changed it.
    """

    request: Request
    seed: int
    step: int
    reply: Reply | None = None
    refusal: Refusal | None = None
    seconds: float = 0.0
    planned: np.ndarray | None = None


class Listener:
    """Hears what happens: metrics, the flight recorder, a viewer. Called in the event loop: it must be quick and must not raise."""

    def exchanged(self, exchange: Exchange) -> None:
        """A request was answered or refused."""

    def refused(self, refusal: Refusal, client: str) -> None:
        """What ``client`` (a connection, or an address) sent was refused before it became a request."""

    def happened(self, event: str, session: str | None = None) -> None:
        """``reset``, ``close``, ``died``, ``started``, ``drain``."""

    def timed(self, stage: str, ms: float) -> None:
        """A dialect took ``ms`` milliseconds for one message: ``decode``, ``pictures`` (JPEG or PNG), ``encode``."""

    def wants_foresight(self, request: Request) -> bool:
        """Whether what the policy foresees shall be drawn for this request although its client did not ask."""
        return False

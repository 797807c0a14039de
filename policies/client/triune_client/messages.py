"""What a server says, read: its welcome, plans and refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

import numpy as np

from .wire import WireError

PROTOCOL = 1


class ServerError(Exception):
    """The server answers that it will not.

    Attributes:
        code: ``late``, ``bad_request``, ``contract``, ``busy``, ``worker``, ``unauthorized``, ``too_large`` or ``internal``.
        message: one sentence that says how to mend it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code, self.message = code, message


@dataclass(frozen=True)
class Welcome:
    """What the server says of itself and its policy.

    Attributes:
        server: its name and version.
        policy: what it was started with.
        contract: the policy's ``contract.json``: cameras, state, action, rates.
        limits: what its guard allows, in the words of ``safety``; None where it guards nothing.
        prefix: longest prefix of committed actions that the policy was trained to go on from; 0 where it was not.
        guided: whether it takes a prefix by guidance, without training.
        executed: steps of a chunk to execute before the next takes over.
        chunk: steps of a chunk.
        rate: control steps a second.
    """

    server: str
    policy: str
    contract: dict[str, Any]
    limits: dict[str, Any] | None
    prefix: int
    guided: bool
    executed: int
    chunk: int
    rate: float


@dataclass(frozen=True)
class Plan:
    """One answer.

    Attributes:
        actions: float32 (C, A) in the units of the contract, one row for each control step.
        rate: control steps a second.
        time: timestamp of the observation it was made from, seconds.
        timing: stage of the server's work -> milliseconds.
        events: what its guard changed or refused, kind -> count.
        value: the policy's own estimate of success, where it has one.
        foresight: what is expected to be seen, camera -> uint8 (H, W, 3), where it was asked for.
        samples: float32 (N, C, A), all chunks that were drawn, where several were asked for; the server's guard keeps ``actions`` alone.
        round_trip: seconds between asking and this answer, measured here.
    """

    actions: np.ndarray[Any, Any]
    rate: float
    time: float
    timing: dict[str, float] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    value: float | None = None
    foresight: dict[str, np.ndarray[Any, Any]] | None = None
    round_trip: float = 0.0
    samples: np.ndarray[Any, Any] | None = None


def refusal(message: Mapping[str, Any]) -> ServerError | None:
    if message.get("type") != "error":
        return None
    return ServerError(str(message.get("code", "internal")), str(message.get("message", "the server gives no reason")))


def read_welcome(url: str, reply: Any) -> Welcome:
    if not isinstance(reply, dict) or reply.get("type") not in ("welcome", "error"):
        raise ConnectionError(f"{url} does not speak Triune's protocol: its first message is no welcome")
    error = refusal(reply)
    if error is not None:
        raise error
    if reply.get("protocol") != PROTOCOL:
        raise ConnectionError(
            f"{url} speaks protocol {reply.get('protocol')}, this client {PROTOCOL}: install the same version on both sides"
        )
    try:
        realtime = reply.get("realtime") or {}
        return Welcome(
            server=str(reply["server"]),
            policy=str(reply["policy"]),
            contract=dict(reply["contract"]),
            limits=None if reply.get("limits") is None else dict(reply["limits"]),
            prefix=int(realtime.get("prefix", 0)),
            guided=bool(realtime.get("guided", False)),
            executed=int(reply["executed"]),
            chunk=int(reply["chunk"]),
            rate=float(reply["rate"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConnectionError(f"the welcome of {url} cannot be read: {error}") from None


def read_plan(reply: Mapping[str, Any], round_trip: float) -> Plan:
    """The plan that a message of type ``plan`` holds; ``ConnectionError`` where it is none."""
    try:
        actions = np.asarray(reply["actions"], np.float32)
        if actions.ndim != 2:
            raise WireError(f"actions of shape {actions.shape}")
        return Plan(
            actions=actions,
            rate=float(reply["rate"]),
            time=float(reply["time"]),
            timing=dict(reply.get("timing") or {}),
            events=dict(reply.get("events") or {}),
            value=reply.get("value"),
            foresight=reply.get("foresight"),
            round_trip=round_trip,
            samples=reply.get("samples"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConnectionError(f"the server's plan cannot be read: {error}") from None

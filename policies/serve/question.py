"""Requests under way: what waits in the service's queue, and what becomes of its answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..base import Request
from .exchange import Exchange, Refusal, Reply
from .warden import Warden

if TYPE_CHECKING:
    from .service import Service

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Session:
    """A client's episode, as the service knows it.

    Attributes:
        step: plans that the policy has made for it since it began, also those that came too late for their client.
        asked, left: when it asked last, and when the policy had its last answer; gap: seconds from an answer to the next request. Zero
            where nothing is known.
    """

    seed: int
    step: int = 0
    asked: float = 0.0
    left: float = 0.0
    gap: float = 0.0
    warden: Warden | None = None


@dataclass(eq=False)
class Command:
    """A command in the queue.

    Attributes:
        answered: gets the answer's tree, or a ``Refusal``, once.
        deadline: of the event loop's clock; timer: that tells of it.
        done: it is answered, or nobody waits for it any more.
    """

    kind: Literal["reset", "close", "plan"]
    session: str
    body: Any
    answered: Callable[[Any], None]
    deadline: float | None = None
    owner: Session | None = None
    since: float = field(default_factory=time.perf_counter)
    timer: asyncio.TimerHandle | None = None
    done: bool = False

    def settle(self, answer: Any) -> None:
        """Hand on the answer, if anybody waits for it."""
        if not self.done:
            self.give_up()
            self.answered(answer)

    def give_up(self) -> None:
        self.done = True
        if self.timer is not None:
            self.timer.cancel()


class Question:
    """A request under way, and what becomes of it.

    Args:
        answered: gets the reply, or the refusal, once: in the turn of the event loop in which it is known, with nothing in between.
        foresight: whether what the policy foresees was asked for.
    """

    __slots__ = ("_answered", "_began", "_command", "_foresight", "_request", "_service", "_session", "_size")

    def __init__(self, service: Service, request: Request, answered: Callable[[Reply | Refusal], None], foresight: bool) -> None:
        self._service, self._request, self._answered, self._foresight = service, request, answered, foresight
        self._began, self._size = time.perf_counter(), _bytes(request)
        self._session = service.sessions.get(request.session)
        self._command: Command | None = None
        service.asked += 1
        service.held += self._size

    def ask(self, deadline: float | None) -> None:
        """Put it in the queue, or refuse it."""
        service, request, session = self._service, self._request, self._session
        drawn = self._foresight
        for listener in service.listeners:
            drawn = listener.wants_foresight(request) or drawn  # each counts its own samples
        try:
            if service.draining:
                raise Refusal("worker", "the server is stopping; connect again when it is back")
            if session is None:
                raise Refusal("bad_request", f"session '{request.session}' has not begun: send a reset before the first request")
            if service.held > service.memory:
                raise Refusal("busy", f"requests of {service.held >> 20} MiB wait already; send smaller pictures, or ask less often")
            if session.left > session.asked:
                session.gap = self._began - session.left
            session.asked = self._began
            self._command = service.put("plan", request.session, _tree(request, drawn), self._settled, deadline, session)
        except Refusal as refusal:
            self._settled(refusal)

    def give_up(self) -> None:
        """Nobody waits for the answer any more; what the policy has begun it ends."""
        if self._command is not None and not self._command.done:
            self._command.give_up()
            self._leave()

    def _leave(self) -> None:
        self._service.asked -= 1
        self._service.held -= self._size

    def _settled(self, answer: dict[str, Any] | Refusal) -> None:
        self._leave()
        try:
            reply = answer if isinstance(answer, Refusal) else self._reply(answer)
        except Exception:  # the queue goes on, and a client that gets no answer waits for ever
            logger.exception("session %r got no answer", self._request.session)
            reply = Refusal("internal", "the server failed on this request; its log says where")
        seconds, session, soon = time.perf_counter() - self._began, self._session, asyncio.get_running_loop().call_soon
        if isinstance(reply, Refusal):
            reply.heard = True
            kept = (0, 0) if session is None else (session.seed, session.step)
            soon(self._service.heard, Exchange(self._request, *kept, None, reply, seconds))
            self._answered(reply)
            return
        assert session is not None and isinstance(answer, dict)
        self._answered(reply if self._foresight or not reply.foresight else replace(reply, foresight={}))
        exchange = Exchange(self._request, session.seed, answer["step"], reply, None, seconds, answer["chunk"]["actions"])
        soon(self._service.heard, exchange)  # when the answer is on its way

    def _reply(self, answer: dict[str, Any]) -> Reply | Refusal:
        """The answer inside the limits of the robot."""
        if "code" in answer:
            return Refusal(answer["code"], answer["message"])
        chunk, warden = answer["chunk"], None if self._session is None else self._session.warden
        try:
            actions, events = (chunk["actions"], {}) if warden is None else warden.keep(self._request.observation, chunk["actions"])
        except Refusal as refusal:
            return refusal
        said = (answer["timing"], answer["value"], events, answer["foresight"], answer["samples"])
        return Reply(actions, chunk["rate"], chunk["time"], *said)


def _bytes(request: Request) -> int:
    """What a request holds in memory."""
    settled = 0 if request.prefix is None else request.prefix.actions.nbytes
    return settled + request.observation.state.nbytes + sum(image.nbytes for image in request.observation.images.values())


def _tree(request: Request, foresight: bool) -> dict[str, Any]:
    """A request as it is sent to the policy's process."""
    seen, prefix = request.observation, request.prefix
    observation = {
        "images": seen.images,
        "state": seen.state,
        "instruction": seen.instruction,
        "timestamp": seen.timestamp,
        "embodiment": seen.embodiment,
        "subtask": seen.subtask,
    }
    settled = None if prefix is None else {"actions": prefix.actions, "rate": prefix.rate, "time": prefix.time}
    return {
        "session": request.session,
        "observation": observation,
        "prefix": settled,
        "delay": request.delay,
        "samples": request.samples,
        "foresight": foresight,
    }

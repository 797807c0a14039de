"""What every dialect asks: sessions and plans of one policy, whose process is asked in turns and started again when it dies.

Requests wait in one queue. Whenever the policy is free all that wait go to it in one batch, so that many clients share its calls
(micro-batching) and one client waits for nobody.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Literal

import numpy as np
from triune_client import ActionLimits

from ...config import parse
from ...data import Contract
from ...errors import UserError
from ..base import Request
from .exchange import Exchange, Listener, Refusal, Reply
from .process import Process, ProcessDied, Source, Standby
from .question import Command, Question, Session
from .warden import Warden, read_limits

logger = logging.getLogger(__name__)


class Service:
    """A policy for any number of clients.

    Args:
        source: what makes the policy.
        window: seconds that a batch waits at most for sessions that will ask again soon (``_hold``).
        queue: requests that may wait; further ones are refused as ``busy``.
        patience: seconds of one turn after which the policy's process is taken for hung and killed.
        memory: bytes of pictures and numbers in all requests that wait or are under way; further ones are refused as ``busy``.
        restarts: deaths within a minute after which it is not started again.
        limits: of actions, as ``ActionLimits.from_dict`` reads them; those that the policy states unless given.
        guarded: whether chunks are kept inside limits at all.
        standby: whether a process stands by for when the policy's dies; see ``process.Standby``.
    """

    def __init__(
        self,
        source: Source,
        *,
        window: float = 0.02,
        queue: int = 256,
        patience: float = 300.0,
        memory: int = 1 << 30,
        restarts: int = 5,
        limits: dict[str, Any] | None = None,
        guarded: bool = True,
        standby: bool = False,
    ) -> None:
        self.given, self.guarded = limits, guarded
        self.limits: ActionLimits | None = None
        self.source, self.window, self.limit, self.patience, self.restarts = source, window, queue, patience, restarts
        self.memory, self.held = memory, 0
        self.listeners: list[Listener] = []
        self.sessions: dict[str, Session] = {}
        self.waiting: deque[Command] = deque()
        self.process: Process | None = None
        self.standby = Standby(source, standby)
        self.introduction: dict[str, Any] = {}
        self.failed: BaseException | None = None
        self.draining = False
        self.asked = 0
        self._busy = True
        self._turn: list[Command] = []
        self._call = self._asked = 0.0
        self._free = 0.0
        self._company: list[Session] = []
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._deaths: deque[float] = deque(maxlen=restarts)
        self._mending: asyncio.Task[None] | None = None

    @property
    def contract(self) -> Contract:
        """The policy's conventions."""
        return self._contract

    @property
    def ready(self) -> bool:
        """Whether a request would be answered at once or after those before it."""
        return self.process is not None and self.failed is None

    async def start(self) -> None:
        """Load and warm the policy, and begin to answer.

        Raises:
            UserError: the policy cannot be loaded, and why.
        """
        await self._begin()
        self._next()

    async def drain(self, patience: float) -> None:
        """Take no more requests, and wait until nothing waits and nothing is under way, ``patience`` seconds at most."""
        self.draining = True
        self._tell("drain")
        until = time.monotonic() + patience
        while (self.waiting or self._turn or self.asked) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for _ in range(20):  # turns of the loop in which those who waited for an answer send it
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Refuse what still waits, and end the policy's process."""
        self._busy = True
        if self._watching is not None:
            self._watching.cancel()
        if self._mending is not None:
            self._mending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._mending
        for waiting in [*self._turn, *self._take_all()]:
            waiting.settle(Refusal("worker", "the server is stopping; connect again when it is back"))
        self._turn = []
        if self.process is not None:
            await self.process.stop()
            self.process = None
        await self.standby.stop()

    def room(self, size: int) -> np.ndarray:
        """Memory (size,) of uint8 for a message, where the policy's process can read it without a copy of ours."""
        taken = None if self.process is None else self.process.coder.mine.take(size, self.source.memory // 2)
        return np.empty(size, np.uint8) if taken is None else taken[1]  # the other half is for what comes by other ways

    def reset(self, session: str, seed: int, step: int = 0) -> Awaitable[None]:
        """Begin an episode of ``session``, whose noise is keyed by ``seed``, at its plan number ``step``: what is asked after this call is
        asked in it. What it gives ends when the policy has begun it, or raises ``Refusal``."""
        warden = None if self.limits is None else Warden(self.limits, self.contract)
        self.sessions[session] = Session(seed, step, warden=warden)
        self._tell("reset", session)
        return self._command("reset", session, [seed, step])

    def close(self, session: str) -> Awaitable[None]:
        """Forget a session, if it was ever begun: what is asked after this call is asked without it."""
        ended = self.sessions.pop(session, None)
        if ended is None:
            nothing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            nothing.set_result(None)
            return nothing
        ended.gap = 0.0
        self._tell("close", session)
        return self._command("close", session, None)

    async def plan(self, request: Request, deadline: float | None = None, foresight: bool = False) -> Reply:
        """Answer one request.

        Args:
            deadline: seconds from now after which the answer is of no use.
            foresight: whether to draw what the policy expects to see.

        Raises:
            Refusal: ``late``, ``busy``, ``bad_request``, ``worker`` or ``internal``, with a sentence for the client.
        """
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def answered(reply: Reply | Refusal) -> None:
            if future.done():  # whoever asked has gone
                return
            if isinstance(reply, Reply):
                future.set_result(reply)
            else:
                future.set_exception(reply)

        question = self.ask(request, answered, deadline, foresight)
        try:
            return await future
        finally:
            question.give_up()

    def ask(
        self, request: Request, answered: Callable[[Reply | Refusal], None], deadline: float | None = None, foresight: bool = False
    ) -> Question:
        """As ``plan``, without waiting: ``answered`` gets the reply or the refusal, maybe before this ends."""
        question = Question(self, request, answered, foresight)
        question.ask(deadline)
        return question

    def put(
        self,
        kind: Literal["reset", "close", "plan"],
        session: str,
        body: Any,
        answered: Callable[[Any], None],
        deadline: float | None = None,
        owner: Session | None = None,
    ) -> Command:
        """Take a command into the queue.

        Raises:
            Refusal: the queue is full, or nobody will ever answer.
        """
        if self.failed is not None:
            raise Refusal("worker", "the policy has ended and will not be started again; the server's log says why")
        if kind == "plan" and len(self.waiting) >= self.limit:
            raise Refusal("busy", f"{len(self.waiting)} requests wait already; ask less often, or serve this policy on more machines")
        waiting = Command(kind, session, body, answered, owner=owner)
        if deadline is not None:
            loop = asyncio.get_running_loop()
            waiting.deadline = loop.time() + deadline
            waiting.timer = loop.call_later(max(deadline, 0.0), self._late, waiting, deadline)
        self.waiting.append(waiting)
        self._go()
        return waiting

    def _command(self, kind: Literal["reset", "close"], session: str, body: Any) -> Awaitable[None]:
        """Put a command into the queue. No close is refused: a policy that has ended, or is about to, has forgotten its sessions."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answered(answer: Any) -> None:
            if future.done():  # whoever gave the command has gone
                return
            if kind == "reset" and isinstance(answer, Refusal):
                future.set_exception(answer)
            else:
                future.set_result(None)

        try:
            self.put(kind, session, body, answered)
        except Refusal as refusal:
            answered(refusal)
        return future

    @staticmethod
    def _late(waiting: Command, deadline: float) -> None:
        waiting.settle(Refusal("late", f"no answer within {1e3 * deadline:.0f} ms; hold, and ask again with a new observation"))

    def _go(self) -> None:
        """Begin a turn, if the policy is free and something waits whose time has come."""
        if self._busy or not self.waiting:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        hold = self._hold()
        if hold > 0:
            self._timer = asyncio.get_running_loop().call_later(hold, self._go)
            return
        turn = self._next_turn()
        if turn:
            self._busy = True
            self._take(turn)

    def _next(self) -> None:
        """The policy is free again."""
        self._busy, self._turn, self._free = False, [], time.perf_counter()
        self._go()

    def _hold(self) -> float:
        """Seconds that what waits should wait for company: for sessions of the last two turns that will ask again soon, as they did before.

        A batch waits no longer than ``window`` and a quarter of what a call takes, and never so long that it would miss a deadline. Without
        others that are expected it does not wait.
        """
        now, longest = time.perf_counter(), min(self.window, self._call / 4)
        if len(self._company) < 2 or len(self.waiting) >= self.source.batch:
            return 0.0
        if not any(s.left > s.asked and s.gap and abs(s.left + s.gap - now) < longest for s in self._company):
            return 0.0
        spare = [w.deadline - asyncio.get_running_loop().time() - 2 * self._call for w in self.waiting if w.deadline is not None]
        return min(max(self._free, self.waiting[0].since) + longest - now, *spare, longest)

    def _next_turn(self) -> list[Command]:
        """What the policy does next: commands in the order in which they came, one plan of a session, as many plans as a batch holds.

        Within a turn sessions end and begin before plans are made, so a turn ends where that would change the order.
        """
        turn: list[Command] = []
        planned: set[str] = set()
        while self.waiting:
            head = self.waiting[0]
            if head.kind == "plan" and head.done:  # late, or its client has gone
                self.waiting.popleft()
                continue
            if head.session in planned or len(planned) == self.source.batch:
                break
            if head.kind == "close" and any(w.session == head.session for w in turn):
                break
            if head.kind == "plan":
                planned.add(head.session)
            turn.append(self.waiting.popleft())
        return turn

    def _take(self, turn: list[Command]) -> None:
        """Send a turn to the policy."""
        assert self.process is not None
        self._turn = turn
        commands = {
            "close": [w.session for w in turn if w.kind == "close"],
            "reset": [[w.session, *w.body] for w in turn if w.kind == "reset"],
            "plan": [w.body for w in turn if w.kind == "plan"],
        }
        self._asked = time.perf_counter()
        if self._watching is None:
            self._watching = asyncio.get_running_loop().call_later(self.patience, self._watch)
        answered = partial(self._answered, turn)
        try:
            self.process.ask(commands, answered)
        except Exception as defect:  # some of it may be sent
            logger.exception("a turn cannot be sent")
            answered(ProcessDied(type(defect).__name__))

    def _watch(self) -> None:
        """End a process that hangs. One timer for all turns: most end soon."""
        left = self._asked + self.patience - time.perf_counter()
        if self._turn and left <= 0 and self.process is not None:
            self.process.kill()
        self._watching = asyncio.get_running_loop().call_later(left, self._watch) if self._turn and left > 0 else None

    def _answered(self, turn: list[Command], answer: dict[str, Any] | ProcessDied) -> None:
        if isinstance(answer, ProcessDied):
            self._mending = asyncio.create_task(self._died(turn, answer))
            return
        now, plans = time.perf_counter(), [w for w in turn if w.kind == "plan"]
        seconds, trees = now - self._asked, iter(answer["answers"])
        answers = [(w, next(trees) if w.kind == "plan" else None) for w in turn]
        for waiting, tree in answers:
            if tree is not None and "timing" in tree:
                assert waiting.owner is not None
                tree["timing"] |= {"queue": 1e3 * (self._asked - waiting.since), "turn": 1e3 * seconds, "batch": len(plans)}
                tree["step"] = waiting.owner.step
                waiting.owner.step += 1
        if plans:
            latest = [w.owner for w in plans if w.owner is not None]
            self._company = latest + [s for s in self._company[: self.source.batch] if s not in latest]
            self._call = seconds
            for session in latest:
                session.left = now
        self._next()  # the policy goes on while answers are sent
        for waiting, tree in answers:
            waiting.settle(tree)

    async def _died(self, turn: Iterable[Command], death: ProcessDied) -> None:
        """Refuse what was being answered, and start the policy again, with the sessions that it had."""
        logger.error("the policy's process ended (%s)", death)
        ended, self.process = self.process, None
        if ended is not None:
            await ended.stop(patience=0)
        for waiting in turn:
            if waiting.kind == "plan":
                again = "it is being started again: hold, and ask again"
                waiting.settle(Refusal("worker", f"the policy's process ended ({death}) and took this request with it; {again}"))
            else:
                waiting.settle(None)  # what the policy had is gone; sessions are begun anew below
        self._tell("died")
        now = time.monotonic()
        if len(self._deaths) == self.restarts and now - self._deaths[0] < 60:
            self.failed = UserError(f"the policy's process ended {self.restarts + 1} times within a minute, at last with {death}")
        else:
            self._deaths.append(now)
            try:
                await self._begin()
                self._next()
                return
            except (UserError, ProcessDied) as error:
                self.failed = error
        logger.error("the policy is not started again: %s", self.failed)
        self._turn = []
        for waiting in self._take_all():
            waiting.settle(Refusal("worker", "the policy has ended and will not be started again; the server's log says why"))

    async def _begin(self) -> None:
        process = await self.standby.start()
        try:
            self._introduced(process.introduction)
        except UserError:
            await process.stop(patience=0)
            raise
        if self.sessions:
            await process.tell({"close": [], "reset": [[name, s.seed, 0] for name, s in self.sessions.items()], "plan": []})
            for session in self.sessions.values():
                session.step = 0
        self.process = process
        self.standby.prepare(process.modules)
        self._tell("started")

    def _introduced(self, said: dict[str, Any]) -> None:
        self.introduction = said
        self._contract = parse(Contract, said["contract"], "the policy's contract")
        self.limits = read_limits(self.given or said.get("limits"), self._contract) if self.guarded else None

    def _take_all(self) -> list[Command]:
        taken = list(self.waiting)
        self.waiting.clear()
        return taken

    def _tell(self, event: str, session: str | None = None) -> None:
        for listener in self.listeners:
            listener.happened(event, session)

    def timed(self, stage: str, ms: float) -> None:
        """Tell listeners, soon, what a dialect spent on a message."""
        asyncio.get_running_loop().call_soon(self._timed, stage, ms)

    def _timed(self, stage: str, ms: float) -> None:
        for listener in self.listeners:
            listener.timed(stage, ms)

    def refused(self, refusal: Refusal, client: str) -> None:
        """Tell listeners of a message that was refused, unless they heard of it as a request."""
        for listener in self.listeners if not refusal.heard else ():
            listener.refused(refusal, client)

    def heard(self, exchange: Exchange) -> None:
        """Tell listeners of a request and what became of it."""
        for listener in self.listeners:
            listener.exchanged(exchange)

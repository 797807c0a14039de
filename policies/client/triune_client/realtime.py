"""Execution that never waits: the robot goes on with the chunk that it has while the next one is computed. numpy and threads only.

The control loop calls ``Realtime.tick`` at the control rate with the newest observation and sends what it returns. Questions have threads.
Time is counted in executed actions: the question asked before action n is answered by a chunk whose action k belongs to action n + k, so
when m actions were executed meanwhile, its first m are dropped (Black et al. 2025, arXiv 2506.07339, algorithm 1; lerobot's
``ActionQueue.merge``). Ticks in which the robot held do not count: it did not move on, and neither does the chunk.

======== =============================================================================================================
mode     when an answer comes
======== =============================================================================================================
sync     asked when nothing is left, the robot holds until it comes, ``horizon`` actions of it are executed: the baseline
async    it replaces what is left of the chunk before, faded in over ``blend`` actions
rtc      the same, and the question carries what is left (``prefix``) and how much of it will have been executed (``delay``),
         so that the policy continues it: real-time chunking, guided or trained
ensemble actions are weighted means of all chunks that cover them (``chunks.TemporalEnsemble``)
======== =============================================================================================================
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from .chunks import TemporalEnsemble, blend, checked
from .safety import Guard, Watchdog

MODES = ("sync", "async", "rtc", "ensemble")
GRACE = 1.0
"""Seconds by which the observation behind an action may be older than its chunk is long, unless ``stale`` says otherwise."""
PATIENCE = 10.0
"""The same in ``sync``, where the robot holds while it waits; also seconds that an answer is waited for before there is a chunk."""
LOST = 3
"""Questions given up that may still be running in their threads; with as many, none is asked."""
KEPT = 100_000
"""Numbers of each kind that statistics keep, the newest."""


class Clock(Protocol):
    """Where the time comes from: a robot's is ``Monotonic``, a test's is its own."""

    def now(self) -> float:
        """Seconds since some moment; never runs backwards."""

    def sleep(self, seconds: float) -> None:
        """Return ``seconds`` later."""


class Monotonic:
    """The machine's clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def paced(rate: float, clock: Clock | None = None) -> Iterator[float]:
    """Ticks of a control loop at ``rate`` Hz, as their times. After one that was late by a period or more they are counted from it anew:
    the robot is never hurried to catch up."""
    clock = clock or Monotonic()
    due = clock.now()
    while True:
        now = clock.now()
        if now < due:
            clock.sleep(due - now)
            now = clock.now()
        elif now >= due + 1 / rate:
            due = now
        yield now
        due += 1 / rate


class Answer(Protocol):
    """The part of ``concurrent.futures.Future`` that is used."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...

    def exception(self) -> BaseException | None: ...


class Runner(Protocol):
    """Where questions run."""

    def submit(self, work: Callable[[], Any]) -> Answer: ...


class Threads:
    """A thread for each question: one that hangs keeps neither the next one nor the end of the program waiting."""

    def submit(self, work: Callable[[], Any]) -> Answer:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 (whatever it was is raised, or counted, by whoever asks the future)
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


@dataclass
class Statistics:
    """What happened since ``reset``.

    Attributes:
        ticks, executed, chunks: calls of ``tick``, actions executed, chunks that took effect.
        held: why -> ticks without an action: ``first`` (none has come yet), ``empty`` (used up), ``stale`` (too old), ``starved``
            (observations stopped).
        events: what -> times: ``error`` (a question failed, or its answer is no chunk), ``stale`` (an answer came too late to be used),
            ``late`` (a question was given up), ``underestimated`` (more actions were executed meanwhile than ``delay`` said).
        reactions: seconds from an observation to the first action computed from it.
        delays: ticks from a question to its answer's effect; the first answer of all is not among them.
        jumps: (A,) by how much the action at a change of chunks differs from what the chunk before would have done.
    """

    ticks: int = 0
    executed: int = 0
    chunks: int = 0
    held: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    reactions: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    delays: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT))
    jumps: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def stalls(self) -> int:
        """Ticks in which the robot had to hold although it had begun and saw."""
        return self.held["empty"] + self.held["stale"]

    def summary(self) -> dict[str, Any]:
        """JSON-able; seconds, ticks, and jumps in the units of the actions."""
        found: dict[str, Any] = {"ticks": self.ticks, "executed": self.executed, "chunks": self.chunks, "stalls": self.stalls}
        found.update(held=dict(self.held), events=dict(self.events))
        for name in ("reactions", "delays"):
            values = np.array(getattr(self, name), dtype=np.float64)
            found[name] = {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99, 100)} if len(values) else {}
        found["largest_jump"] = np.max(np.stack(list(self.jumps)), axis=0).tolist() if self.jumps else []
        return found


class _Question(NamedTuple):
    answer: Answer
    step: int
    tick: int
    taken: float
    delay: int | None


class _Chunk(NamedTuple):
    first: int
    actions: np.ndarray
    taken: float
    limit: float


class Realtime:
    """Chunks of a policy as actions at the control rate.

    Args:
        infer: ``infer(observation, prefix=array (K, A) or None, delay=int)``, called in a thread: an array (C, A), or what has one as
            ``actions``, as an attribute or a key. An exception is counted, and asked again after ``retry`` seconds. It must end by itself,
            with a timeout: once ``LOST`` of them hang, nothing more is asked until one ends.
        rate: ticks per second.
        mode: see above.
        horizon: ticks between two questions at least (by default 1: the next is asked as soon as the last is answered); in ``sync``,
            actions executed of each chunk (by default all).
        remaining: ask only when at most so many actions are left.
        stale: an action is executed only while the observation behind it is at most so many seconds old; by default the length of its chunk
            and ``GRACE``. What is older is dropped, and an answer that takes longer is given up.
        longest: actions of a prefix that the policy was trained with at most; a larger ``delay`` is never sent.
        window: the newest delays of which the largest is expected next time.
        guard, watchdog: what limits actions, and says that observations stopped.

    Attributes:
        statistics: since ``reset``.
        why: the reason for which the last tick held, or ``None``.
        problem: a sentence about the last error.
    """

    def __init__(
        self,
        infer: Callable[..., Any],
        rate: float,
        mode: str = "rtc",
        horizon: int | None = None,
        remaining: int | None = None,
        stale: float | None = None,
        longest: int | None = None,
        blend: int = 0,
        decay: float = 0.01,
        window: int = 10,
        retry: float = 0.1,
        guard: Guard | None = None,
        watchdog: Watchdog | None = None,
        clock: Clock | None = None,
        runner: Runner | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"there is no mode '{mode}'; modes are {', '.join(MODES)}")
        if blend and mode not in ("async", "rtc"):
            raise ValueError(f"chunks are not blended in mode '{mode}'; take async or rtc, or leave blend out")
        if not rate > 0 or window < 1 or (horizon is not None and horizon < 1):
            raise ValueError(f"rate {rate}, window {window} and horizon {horizon} must be above 0")
        self.infer, self.rate, self.mode = infer, rate, mode
        self.horizon, self.remaining, self.stale, self.longest = horizon, remaining, stale, longest
        self.blend, self.retry = blend, retry
        self.guard, self.watchdog = guard, watchdog
        self.clock, self.runner = clock or Monotonic(), runner or Threads()
        self._ensemble = TemporalEnsemble(decay)
        self._delays: deque[int] = deque(maxlen=window)
        self._first_delay: int | None = None
        self._size: int | None = guard.limits.size if guard else None
        self._lost: list[Answer] = []
        self._question: _Question | None = None
        self.problem = ""
        self.reset()

    def reset(self) -> None:
        """An episode begins: nothing is left to do, answers on their way are not used. Measured delays stay."""
        self._drop()
        self.statistics = Statistics()
        self.why: str | None = None
        self._step, self._retry_at = 0, -np.inf
        self._taken: float | None = None
        for part in (self.guard, self.watchdog):
            if part is not None:
                part.reset()

    @property
    def delay(self) -> int:
        """Ticks after which the next answer is expected: the largest of the last delays. The first answer of all, which may wait for a
        server to start, counts only until there is another."""
        return max(self._delays) if self._delays else self._first_delay or 1

    @property
    def left(self) -> np.ndarray:
        """(K, A) what the present chunk still has to do."""
        return np.zeros((0, 0), np.float32) if self._chunk is None else self._chunk.actions[self._step - self._chunk.first :]

    def tick(self, observation: Mapping[str, Any] | None, now: float | None = None, taken: float | None = None) -> np.ndarray | None:
        """The action (A,) to send now; never waits.

        Args:
            observation: the newest, with ``state`` where a guard needs it; ``None`` where there is none since the last tick.
            now: the time, by default the clock's.
            taken: when the observation was taken, on the same clock, by default now; one that is not newer than the last counts as none.

        Returns:
            What the guard lets through. While the robot holds (``why`` says the reason) the guard's holding action; ``None``, which means
            to send nothing, where there is no guard or it knows none.
        """
        now = self.clock.now() if now is None else now
        taken = now if taken is None else taken
        fresh = observation is not None and (self._taken is None or taken > self._taken)
        state = None if observation is None else observation.get("state")
        self.statistics.ticks += 1
        if fresh:
            self._taken = taken
            if self.watchdog is not None:
                self.watchdog.feed(taken)
        if self.watchdog is not None and self.watchdog.starved(now):
            self._drop()  # what is done next must come from what is seen next
            return self._hold("starved", state)
        self._collect(now)
        if fresh and self._due(now):
            self._ask(observation, taken)
        action, why = self._next(now)
        if action is None:
            return self._hold(why, state)
        if self.guard is not None:
            action, _ = self.guard.check(action, state)
        self._step += 1
        self.statistics.executed += 1
        self.why = None
        return action

    def _drop(self) -> None:
        if self._question is not None:
            self._lost.append(self._question.answer)
        self._question = None
        self._chunk: _Chunk | None = None
        self._begun = False
        self._asked = -1
        self._ensemble.reset()

    def _hold(self, why: str, state: np.ndarray | None) -> np.ndarray | None:
        self.why = why
        self.statistics.held[why] += 1
        return None if self.guard is None else self.guard.hold(state)

    def _due(self, now: float) -> bool:
        self._lost = [answer for answer in self._lost if not answer.done()]
        if self._question is not None or now < self._retry_at or len(self._lost) >= LOST:
            return False
        left = len(self.left)
        if self.mode == "sync" or not left:
            return not left
        waited = self._asked < 0 or self.statistics.ticks - self._asked >= (self.horizon or 1)
        return waited and (self.remaining is None or left <= self.remaining)

    def _ask(self, observation: Any, taken: float) -> None:
        prefix, delay = None, 0
        if self.mode == "rtc" and len(self.left):
            prefix = self.left.copy()
            delay = min(self.delay, len(prefix), len(prefix) if self.longest is None else self.longest)
        answer = self.runner.submit(lambda: self.infer(observation, prefix=prefix, delay=delay))
        expected = None if prefix is None else delay
        self._question = _Question(answer, self._step, self.statistics.ticks, taken, expected)
        self._asked = self.statistics.ticks

    def _collect(self, now: float) -> None:
        """Take the answer, if there is one."""
        question, counted = self._question, self.statistics.events
        if question is None:
            return
        if not question.answer.done():
            if now - question.taken > self._patience():
                counted["late"] += 1
                self.problem = f"no answer for {now - question.taken:.1f} s; see whether the server is alive"
                self._lost.append(question.answer)
                self._question = None
            return
        self._question = None
        error = question.answer.exception()
        try:
            actions = None if error else checked(_actions(question.answer.result()), self._size)
        except ValueError as wrong:
            error, actions = wrong, None
        if actions is None:
            counted["error"] += 1
            self.problem = f"{type(error).__name__}: {error}"
            self._retry_at = now + self.retry
            return
        delay = self.statistics.ticks - question.tick
        if self._first_delay is None:
            self._first_delay = delay
        else:
            self._delays.append(delay)
            self.statistics.delays.append(delay)
        passed, age = self._step - question.step, now - question.taken
        limit = self._limit(actions)
        if passed >= len(actions) or age > limit:
            counted["stale"] += 1
            self.problem = f"an answer took {age:.2f} s, more than a chunk of {len(actions)} actions or `stale` allows; it was not used"
            return
        if question.delay is not None and passed > question.delay:
            counted["underestimated"] += 1
        self._merge(_Chunk(question.step, actions, question.taken, limit), now)

    def _merge(self, chunk: _Chunk, now: float) -> None:
        self._size = chunk.actions.shape[1]
        passed, before = self._step - chunk.first, self._present()
        if self.mode == "sync" and self.horizon is not None:
            chunk = chunk._replace(actions=chunk.actions[: self.horizon])
        if self.blend and len(self.left):
            chunk = chunk._replace(first=self._step, actions=blend(self.left, chunk.actions[passed:], self.blend))
        if self.mode == "ensemble":
            self._ensemble.add(chunk.actions, chunk.first)
            if self._chunk is not None and len(self.left) > len(chunk.actions) - passed:
                chunk = self._chunk._replace(taken=chunk.taken, limit=chunk.limit)  # the one that reaches furthest says how many are left
        self._chunk, self._begun = chunk, True
        after = self._present()
        self.statistics.chunks += 1
        self.statistics.reactions.append(now - chunk.taken)
        if before is not None and after is not None:
            self.statistics.jumps.append(np.abs(after - before))

    def _present(self) -> np.ndarray | None:
        if self.mode == "ensemble":
            return self._ensemble.at(self._step)
        return self.left[0] if len(self.left) else None

    def _next(self, now: float) -> tuple[np.ndarray | None, str]:
        action = self._present()
        if action is None:
            return None, "empty" if self._begun else "first"
        assert self._chunk is not None
        if now - self._chunk.taken > self._chunk.limit:
            self._chunk = None
            self._ensemble.reset()
            return None, "stale"
        return action, ""

    def _limit(self, actions: np.ndarray) -> float:
        grace = PATIENCE if self.mode == "sync" else GRACE
        return len(actions) / self.rate + grace if self.stale is None else self.stale

    def _patience(self) -> float:
        if self.stale is not None:
            return self.stale
        return PATIENCE if self._chunk is None else self._chunk.limit


def _actions(plan: Any) -> Any:
    if isinstance(plan, Mapping):
        if "actions" not in plan:
            raise ValueError("the answer has no `actions`")
        return plan["actions"]
    return getattr(plan, "actions", plan)

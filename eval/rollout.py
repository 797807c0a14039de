"""Many episodes over parallel worlds with one batched policy.

An episode is a generator (``play``): it yields what it needs next, a world command or a plan, and is sent the answer.
``rollout`` drives a fixed number of them at once, in two groups that take turns: while one group's worlds step in
their worker processes, the other group's plans are computed. A group waits for all its members, so that which episodes
share a batch depends on the jobs alone: outcomes are the same for any number of workers and any timing.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..data import Observation
from ..errors import UserError
from ..policies.base import Plan, Policy, Request
from .episodes import Job, Row
from .film import Cinema, Imagined, Reel
from .statistics import smoothness

logger = logging.getLogger(__name__)

EXPERT_STEPS = 20  # steps of a scripted expert per command to a worker


class Answer(Protocol):
    """What a pool of worlds answers; see ``envs.vector.Answer``."""

    slot: int
    observation: Observation
    info: dict[str, Any]
    frames: list[dict[str, np.ndarray]]
    error: str | None


class Pool(Protocol):
    """Worlds in slots; see ``envs.vector.WorldPool``."""

    def reset(self, slot: int, world: str, seed: int, render: str = ..., size: int = ...) -> None: ...
    def step_chunk(self, slot: int, actions: np.ndarray, video: bool) -> None: ...
    def expert_chunk(self, slot: int, n: int, video: bool) -> None: ...
    def wait(self) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Reset:
    """Begin the episode's world."""


@dataclass(frozen=True, eq=False)
class Step:
    """Execute ``actions`` (n, A); the world stops early at success or truncation."""

    actions: np.ndarray
    video: bool = False


@dataclass(frozen=True)
class Expert:
    """Let the world's scripted expert act for ``steps`` control steps."""

    steps: int
    video: bool = False


@dataclass(frozen=True, eq=False)
class Ask:
    """Ask the policy for a plan."""

    request: Request


Command = Reset | Step | Expert | Ask
Script = Generator[Command, Any, Row]


class EpisodeError(Exception):
    """One episode cannot go on; the others can."""


@dataclass
class Tape:
    """What happened in an episode so far."""

    steps: int = 0
    first_success: int | None = None
    success: bool = False
    truncated: bool = False
    actions: list[np.ndarray] = field(default_factory=list)
    foresight: list[Imagined] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    misses: int = 0

    def add(self, info: dict[str, Any]) -> int:
        """Count one answer of a world; returns the steps that it executed."""
        steps = int(info["steps"])
        self.steps += steps
        self.success = bool(info["is_success"])
        self.truncated = bool(info["truncated"])
        if self.success and self.first_success is None:
            self.first_success = self.steps
        return steps

    def over(self, settle: int) -> bool:
        return self.truncated or (self.first_success is not None and self.steps >= self.first_success + settle)


def play(job: Job, policy: Policy | None, settle: int, cinema: Cinema) -> Script:
    """One episode, acted by ``policy``, or by the world's scripted expert where that is None.

    After the first success it goes on for ``settle`` steps, to see whether the success lasts. An episode that cannot
    go on ends as a failure with its error.
    """
    tape, error, video = Tape(), None, None
    try:
        answer = yield Reset()
        if policy is None:
            while not tape.over(settle):
                answer = yield Expert(1 if tape.first_success is not None else EXPERT_STEPS)
                tape.add(answer.info)
        else:
            policy.reset(job.slug, job.seed)
            while not tape.over(settle):
                answer = yield from _chunk(job, policy, settle, tape, answer)
    except EpisodeError as problem:
        error = str(problem)
    success = tape.first_success is not None and error is None
    if error is None and cinema.wants(job, success):
        try:
            video = yield from _film(job, policy, tape, cinema)
        except EpisodeError as problem:
            error = f"while filming: {problem}"
    return Row(
        control=job.control,
        task=job.task,
        seed=job.seed,
        success_any=success,
        success_end=success and tape.success,
        steps=tape.steps,
        first_success_step=tape.first_success,
        smoothness=smoothness(np.concatenate(tape.actions), job.action_names) if tape.actions else None,
        deadline_misses=tape.misses,
        policy_ms=round(1000 * sum(tape.waits) / len(tape.waits), 2) if tape.waits else None,
        error=error,
        video=video,
    )


def _chunk(job: Job, policy: Policy, settle: int, tape: Tape, answer: Answer) -> Generator[Command, Any, Answer]:
    """Ask for a plan and execute its first ``contract.executed`` actions."""
    seen = answer.observation
    plan, seconds = yield Ask(Request(job.slug, job.change(seen) if job.change else seen))
    pending = plan.chunk.actions[: policy.contract.executed or len(plan.chunk)]
    tape.waits.append(seconds)
    tape.misses += seconds > len(pending) / plan.chunk.rate
    if plan.foresight is not None:
        tape.foresight.append(Imagined(tape.steps, tape.steps + len(pending), plan.foresight))
    while len(pending) and not tape.over(settle):
        answer = yield Step(pending[:1] if tape.first_success is not None else pending)
        steps = tape.add(answer.info)
        tape.actions.append(pending[:steps])
        pending = pending[steps:]
    return answer


def _film(job: Job, policy: Policy | None, tape: Tape, cinema: Cinema) -> Generator[Command, Any, str]:
    """Play the episode again, same seed and same actions, rendering every step; returns the path of the video."""
    answer = yield Reset()
    first = answer.observation
    frames, again, actions = [dict(first.images)], Tape(), np.concatenate(tape.actions) if tape.actions else np.zeros((0, 0))
    while again.steps < tape.steps:
        left = tape.steps - again.steps
        answer = yield Expert(min(left, EXPERT_STEPS), True) if policy is None else Step(actions[again.steps :][:50], True)
        frames += answer.frames
        again.add(answer.info)
    if (again.first_success, again.success) != (tape.first_success, tape.success):
        raise EpisodeError(f"the same seed and actions led to success at step {again.first_success}, not {tape.first_success}")
    given = job.change(first).instruction if job.change else first.instruction
    return cinema.save(job, Reel(given, job.rate, tape.first_success, frames, tape.foresight))


@dataclass
class _Stage:
    """The slots: the script that plays in each, and what it waits for."""

    pool: Pool
    start: Callable[[], tuple[Job, Script] | None]
    render: str
    size: int
    jobs: dict[int, Job] = field(default_factory=dict)
    scripts: dict[int, Script] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    inbox: dict[int, Answer] = field(default_factory=dict)
    asks: dict[int, Request] = field(default_factory=dict)
    finished: list[Row] = field(default_factory=list)

    def open(self, slot: int) -> None:
        """Start the next job in a free slot, if there is one."""
        begun = self.start()
        if begun is not None:
            self.jobs[slot], self.scripts[slot] = begun
            self.advance(slot, None)

    def advance(self, slot: int, answer: Any) -> None:
        """Give a script its answer, or the error instead, and run it to its next need."""
        script = self.scripts[slot]
        try:
            command = script.throw(answer) if isinstance(answer, EpisodeError) else script.send(answer)
        except StopIteration as end:
            self.finished.append(end.value)
            del self.scripts[slot], self.jobs[slot]
            self.open(slot)
            return
        if isinstance(command, Ask):
            self.asks[slot] = command.request
            return
        self.waiting.add(slot)
        if isinstance(command, Reset):
            job = self.jobs[slot]
            self.pool.reset(slot, job.world, job.seed, render=self.render, size=self.size)
        elif isinstance(command, Step):
            self.pool.step_chunk(slot, command.actions, command.video)
        else:
            self.pool.expert_chunk(slot, command.steps, command.video)

    def collect(self, group: range) -> None:
        """Wait for every world of the group, and give the answers to their scripts."""
        due = [slot for slot in group if slot in self.waiting]
        while any(slot not in self.inbox for slot in due):
            for answer in self.pool.wait():
                self.inbox[answer.slot] = answer
        for slot in due:
            self.waiting.discard(slot)
            answer = self.inbox.pop(slot)
            self.advance(slot, answer if answer.error is None else EpisodeError(answer.error))

    def think(self, policy: Policy) -> None:
        """Plan for all that asked, in one batch."""
        asks, self.asks = self.asks, {}
        began = time.perf_counter()
        plans = _plan(policy, list(asks.values()))
        seconds = time.perf_counter() - began
        for slot, plan in zip(asks, plans, strict=True):
            self.advance(slot, plan if isinstance(plan, EpisodeError) else (plan, seconds))


def rollout(
    jobs: Iterable[Job],
    policy: Policy | None,
    pool: Pool,
    cinema: Cinema,
    *,
    slots: int = 8,
    settle: int = 10,
    render: str = "fast",
    size: int = 96,
) -> Iterator[Row]:
    """Play ``jobs`` and yield their rows as they finish.

    Args:
        policy: acts in every episode; None lets the scripted experts of the worlds act.
        pool: the worlds; it may have any number of workers.
        cinema: decides which episodes are filmed, and keeps the films.
        slots: episodes played at once; half of them form one batch.
        settle: steps played on after the first success.
    """
    queue = deque(jobs)

    def start() -> tuple[Job, Script] | None:
        if not queue:
            return None
        job = queue.popleft()
        return job, play(job, policy, settle, cinema)

    stage = _Stage(pool, start, render, size)
    half = max(1, slots // 2)
    groups = [range(0, half), range(half, max(slots, half + 1))]
    for group in groups:
        for slot in group:
            stage.open(slot)
    while stage.scripts:
        for group in groups:
            stage.collect(group)
            while stage.asks and policy is not None:
                stage.think(policy)
            rows, stage.finished = stage.finished, []
            yield from rows


def _plan(policy: Policy, requests: list[Request]) -> list[Plan | EpisodeError]:
    """Plans of a batch; where the batch fails, each request alone, so that only the faulty ones end."""
    try:
        return list(policy.plan(requests))
    except UserError:
        raise
    except Exception:
        logger.exception("the policy failed on a batch of %d; asking one by one", len(requests))
    plans: list[Plan | EpisodeError] = []
    for request in requests:
        try:
            plans.append(policy.act(request))
        except Exception as error:
            plans.append(EpisodeError(f"{type(error).__name__}: {error}"))
    return plans

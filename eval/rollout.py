"""Many episodes over parallel worlds with one batched policy.

``rollout`` drives a fixed number of episodes at once, in two groups that take turns: while one group's worlds step in
their worker processes, the other group's plans are computed. A group waits for all its members, so that which episodes
share a batch depends on the jobs alone: outcomes are the same for any number of workers and any timing.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..envs.vector import Answer, WorldPool
from ..errors import UserError
from ..policies.base import Plan, Policy, Request
from .episodes import Job, Row
from .film import Cinema
from .script import Ask, EpisodeError, Reset, Script, Step, play

logger = logging.getLogger(__name__)


@dataclass
class _Stage:
    """The slots: the script that plays in each, and what it waits for."""

    pool: WorldPool
    start: Callable[[], tuple[Job, Script] | None]
    jobs: dict[int, Job] = field(default_factory=dict)
    scripts: dict[int, Script] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    brief: set[int] = field(default_factory=set)  # those among them that wait for one single step
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
            self.pool.reset(slot, job.world, job.seed, job.view)
        elif isinstance(command, Step):
            self.pool.step_chunk(slot, command.actions, command.video)
            self.brief |= {slot} if len(command.actions) == 1 else set()
        else:
            self.pool.expert_chunk(slot, command.steps, command.video)
            self.brief |= {slot} if command.steps == 1 else set()

    def collect(self, group: range) -> None:
        """Wait for every world of the group, and give the answers to their scripts.

        Single steps, in which episodes settle, are followed up at once: a turn of all for each of them would take long.
        """
        due = [slot for slot in group if slot in self.waiting]
        while due:
            while any(slot not in self.inbox for slot in due):
                for answer in self.pool.wait():
                    self.inbox[answer.slot] = answer
            for slot in due:
                self.waiting.discard(slot)
                self.brief.discard(slot)
                answer = self.inbox.pop(slot)
                self.advance(slot, answer if answer.error is None else EpisodeError(answer.error))
            due = [slot for slot in due if slot in self.brief]

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
    pool: WorldPool,
    cinema: Cinema,
    *,
    slots: int = 8,
    settle: int = 10,
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

    stage = _Stage(pool, start)
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
            logger.exception("the policy failed on episode %s", request.session)
            plans.append(EpisodeError(f"{type(error).__name__}: {error}"))
    return plans

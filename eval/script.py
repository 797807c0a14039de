"""One episode as a generator that says what it needs next: a command to its world, or a plan of the policy.

Written as if it were alone; ``rollout`` runs many of them at once and sends each the answers to its commands.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..envs.vector import Answer
from ..policies.base import Policy, Request
from .episodes import Job, Row
from .film import Cinema, Imagined, Reel
from .statistics import smoothness

EXPERT_STEPS = 20  # steps of a scripted expert per command
FILM_STEPS = 20  # steps of a replay per command: their frames travel in one message


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
    finally:
        if policy is not None:
            policy.close(job.slug)
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
    tape.misses += seconds > len(pending) / job.rate
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
        count = 1 if again.first_success is not None else min(tape.steps - again.steps, FILM_STEPS)
        answer = yield Expert(count, True) if policy is None else Step(actions[again.steps :][:count], True)
        frames += answer.frames
        again.add(answer.info)
    if (again.first_success, again.success) != (tape.first_success, tape.success):
        raise EpisodeError(f"the same seed and actions led to success at step {again.first_success}, not {tape.first_success}")
    given = job.change(first).instruction if job.change else first.instruction
    return cinema.save(job, Reel(given, job.rate, tape.first_success, frames, tape.foresight))

"""Asking a policy again what a flight recorder wrote down: the same sessions, seeds, steps, observations and settled actions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...data import ActionChunk
from ...data.incidents import Recorded, runs
from ...errors import UserError
from ..base import Request
from .exchange import Refusal
from .process import Source
from .service import Service


@dataclass(frozen=True)
class Replayed:
    """One request asked again.

    Attributes:
        recorded, now: ``answered``, or the code of the refusal.
        error: largest absolute difference of an action, in the action's units; None where there are no two answers to compare.
        ms_recorded, ms: of the model in the record and now; queueing is not in them.
        passed: whether the actions are the same within the tolerance; where there was no answer it is not asked for.
    """

    session: str
    step: int
    recorded: str
    now: str
    error: float | None
    ms_recorded: float
    ms: float
    passed: bool


async def replay(
    source: Source, rows: Sequence[Recorded], tolerance: float = 0.0, progress: Callable[[int, int], None] | None = None
) -> list[Replayed]:
    """Ask the policy of ``source``, in a process of its own, what ``rows`` were asked, one at a time; compared is what it said itself,
    before the guard.

    Args:
        tolerance: largest difference of an action that passes; 0 asks for the same bits.
        progress: called with (requests done, all).

    Raises:
        UserError: the policy cannot be loaded, or cannot begin a session in the middle as the record does.
    """
    service = Service(source, window=0.0, guarded=False)  # what the guard changes depends on what was sent before
    await service.start()
    found: list[Replayed] = []
    try:
        for number, run in enumerate(runs(rows)):
            session = f"{number} {run[0].session}"
            for row in run:
                known = service.sessions.get(session)
                if known is None or known.step != row.step:
                    if row.step and not service.introduction["skips"]:
                        raise UserError(
                            f"the record of session {row.session} has a gap before its request {row.step}, and this policy can only go on "
                            "from the first; replay a record that holds its sessions from their beginning (record.mode=always)"
                        )
                    await service.reset(session, row.seed, row.step)
                found.append(await _ask(service, session, row, tolerance))
                if progress is not None:
                    progress(len(found), len(rows))
            await service.close(session)
    finally:
        await service.stop()
    return found


async def _ask(service: Service, session: str, row: Recorded, tolerance: float) -> Replayed:
    prefix = None if row.prefix is None else ActionChunk(row.prefix, service.contract.rate or 0.0, row.observation.timestamp)
    was, actions, began, ms = row.code or "answered", None, time.perf_counter(), 0.0
    try:
        reply = await service.plan(Request(session, row.observation, prefix, row.delay, row.samples))
        now, actions, ms = "answered", reply.actions, reply.timing["turn"]
    except Refusal as refusal:
        now, ms = refusal.code, 1e3 * (time.perf_counter() - began)
    error = None
    if actions is not None and row.actions is not None:
        error = difference(actions, row.actions if row.planned is None else row.planned)
    passed = row.actions is None or (error is not None and error <= tolerance)
    return Replayed(row.session, row.step, was, now, error, row.timing.get("turn", 1e3 * row.seconds), ms, passed)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference; 0 where they are the same, also where both are not a number; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    found = np.abs(a.astype(np.float64) - b)
    return float(np.where(np.isnan(found), np.inf, found).max())

"""``vla trial``: two policies on the same starts, in blind random order, judged run by run.

A folder keeps the plan (``trial.json``) and one line per judged run (``runs.jsonl``), each on the disk before the next run begins, so a
trial goes on where it was left. While it goes on the policies are X and Y; who they are is said at the end.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import Strict, parse
from ..data.files import write_file
from ..errors import UserError
from .live import Drive
from .statistics import Interval, exact_difference, wilson

Side = Literal["a", "b"]


class Plan(Strict):
    """What a trial was begun with; it goes on with nothing else.

    Attributes:
        a, b: the policies, as they were named; contracts: what they state of themselves.
        body: what is driven. pairs: starts, from ``seed`` on. order_seed: of the order within pairs, and of who is X.
        loop: how bodies are driven.
    """

    a: str
    b: str
    contracts: tuple[dict[str, Any], dict[str, Any]]
    body: str
    pairs: int
    seed: int
    order_seed: int
    loop: dict[str, Any]

    def order(self, pair: int) -> tuple[Side, Side]:
        """Who runs first and second from the start of a pair."""
        flipped = bool(np.random.default_rng([self.order_seed, pair]).integers(2))
        return ("b", "a") if flipped else ("a", "b")

    @property
    def names(self) -> dict[Side, str]:
        """Side -> the letter by which it goes."""
        flipped = bool(np.random.default_rng([self.order_seed, 1 << 40]).integers(2))
        return {"a": "Y", "b": "X"} if flipped else {"a": "X", "b": "Y"}


@dataclass(frozen=True)
class Run:
    """One judged run: ``turn`` 0 or 1 within its pair."""

    pair: int
    turn: int
    side: Side
    seed: int
    success: bool
    note: str
    drive: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a run. ``again``: the run does not count and is repeated."""

    success: bool
    note: str = ""
    again: bool = False


class Stopped(Exception):
    """The judge leaves; the trial goes on another time."""


@dataclass(frozen=True)
class Score:
    """Where a trial stands.

    Attributes:
        pairs: of which both runs were judged. successes: per side, over those.
        difference, ci95: rate of a minus rate of b, and an interval that holds for any number of pairs.
    """

    pairs: int
    successes: dict[Side, int]
    only_a: int
    only_b: int
    difference: float
    ci95: Interval

    def swapped(self) -> "Score":
        """The same with a and b exchanged."""
        successes: dict[Side, int] = {"a": self.successes["b"], "b": self.successes["a"]}
        return Score(self.pairs, successes, self.only_b, self.only_a, -self.difference, (-self.ci95[1], -self.ci95[0]))


def begin(folder: Path, plan: Plan) -> list[Run]:
    """Write the plan of a new trial, or find that it is the one that was begun there; gives the runs that were judged.

    Raises:
        UserError: another trial was begun there, or its files cannot be read.
    """
    file = folder / "trial.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file, plan.model_dump_json(indent=1) + "\n")
        return []
    try:
        begun = parse(Plan, json.loads(file.read_text()), file)
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}); choose another --out, or mend it") from None
    now = plan.model_copy(update={"order_seed": begun.order_seed})
    changed = [name for name in Plan.model_fields if name != "pairs" and getattr(begun, name) != getattr(now, name)]
    if changed:
        raise UserError(f"{folder} holds a trial with another {', '.join(changed)}; give it the same settings, or choose another --out")
    return _runs(folder)


def go_on(
    folder: Path, plan: Plan, play: Callable[[Side, int], Drive], judge: Callable[[Run], Verdict], told: Callable[[Score], None]
) -> Score:
    """Play and judge what is left of a trial.

    Args:
        play: drives the body by one side's policy from the start of a seed.
        judge: gets a run whose ``success`` is the body's own opinion, and that does not say whose it is.
        told: the score after each pair; X stands for a.

    Raises:
        Stopped: the judge leaves.
    """
    plan = parse(Plan, json.loads((folder / "trial.json").read_text()), folder).model_copy(update={"pairs": plan.pairs})
    runs = _runs(folder)
    judged = {(run.pair, run.turn) for run in runs}
    for pair in range(plan.pairs):
        for turn, side in enumerate(plan.order(pair)):
            while (pair, turn) not in judged:
                done = play(side, plan.seed + pair)
                run = Run(pair, turn, side, plan.seed + pair, bool(done.success), "", asdict(done))
                verdict = judge(run)
                if verdict.again:
                    continue
                runs.append(Run(**(asdict(run) | {"success": verdict.success, "note": verdict.note})))
                _append(folder / "runs.jsonl", asdict(runs[-1]))
                judged.add((pair, turn))
        standing = score(runs)
        told(standing if plan.names["a"] == "X" else standing.swapped())
    return score(runs)


def score(runs: list[Run]) -> Score:
    """The score over the pairs of which both runs were judged."""
    by: dict[int, dict[Side, bool]] = {}
    for run in runs:
        by.setdefault(run.pair, {})[run.side] = run.success
    whole = [pair for pair in by.values() if len(pair) == 2]
    successes: dict[Side, int] = {"a": sum(p["a"] for p in whole), "b": sum(p["b"] for p in whole)}
    only_a, only_b = sum(p["a"] and not p["b"] for p in whole), sum(p["b"] and not p["a"] for p in whole)
    difference = (only_a - only_b) / len(whole) if whole else 0.0
    return Score(len(whole), successes, only_a, only_b, difference, exact_difference(only_a, only_b, len(whole)))


def report(plan: Plan, standing: Score) -> dict[str, Any]:
    """The result of a trial: JSON for machines."""
    sides: tuple[tuple[Side, str], ...] = (("a", plan.a), ("b", plan.b))
    rows = [
        {
            "policy": name,
            "successes": standing.successes[side],
            "pairs": standing.pairs,
            "ci95": list(wilson(standing.successes[side], standing.pairs)),
        }
        for side, name in sides
    ]
    out = {"body": plan.body, "policies": rows, "only_a": standing.only_a, "only_b": standing.only_b}
    return out | {"difference": standing.difference, "ci95": list(standing.ci95), "loop": plan.loop}


def _runs(folder: Path) -> list[Run]:
    """The judged runs; a last line that was cut off by a crash is left out."""
    file = folder / "runs.jsonl"
    lines = file.read_text().split("\n") if file.exists() else []
    return [Run(**json.loads(line)) for line in lines[:-1]]


def _append(file: Path, row: dict[str, Any]) -> None:
    """Add a line so that a crash leaves all lines before it whole."""
    kept = file.read_text() if file.exists() else ""
    write_file(file, kept[: kept.rfind("\n") + 1] + json.dumps(row) + "\n")

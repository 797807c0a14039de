"""Trials: blind order, exact intervals, what a crash or a change leaves."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from triune.errors import UserError
from triune.eval.live import Drive, Loop
from triune.eval.statistics import exact_difference
from triune.eval.trial import Plan, Run, Score, Stopped, Verdict, begin, go_on, report


def plan(pairs: int = 12, **changes: object) -> Plan:
    given = {"a": "one", "b": "two", "contracts": ({}, {}), "body": "world", "pairs": pairs, "seed": 100, "order_seed": 3}
    return Plan(**(given | {"loop": asdict(Loop())} | changes))  # type: ignore[arg-type]


def play(side: str, seed: int) -> Drive:
    """One solves two starts of three, the other one of two."""
    return Drive(seed, success=bool(seed % 3) if side == "a" else bool(seed % 2))


def agree(run: Run) -> Verdict:
    return Verdict(run.success)


def test_order_and_letters_are_random_and_balanced_and_fixed_by_the_plan() -> None:
    orders = [plan().order(pair) for pair in range(200)]
    assert orders == [plan().order(pair) for pair in range(200)]
    assert 70 < sum(order == ("a", "b") for order in orders) < 130
    assert {plan(order_seed=i).names["a"] for i in range(20)} == {"X", "Y"}


def test_a_trial_counts_pairs(tmp_path: Path) -> None:
    said: list[Score] = []
    begin(tmp_path, plan())
    score = go_on(tmp_path, plan(), play, agree, said.append)
    seeds = range(100, 112)
    a, b = ([bool(s % 3) for s in seeds], [bool(s % 2) for s in seeds])
    assert score.pairs == 12 and score.successes == {"a": sum(a), "b": sum(b)}
    assert score.difference == pytest.approx((sum(a) - sum(b)) / 12)
    assert score.ci95 == exact_difference(score.only_a, score.only_b, 12)
    assert [s.pairs for s in said] == list(range(1, 13))
    assert said[-1] == (score if plan().names["a"] == "X" else score.swapped())
    assert report(plan(), score)["policies"][0]["policy"] == "one"


def test_a_trial_that_was_left_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begin(whole, plan())
    expected = go_on(whole, plan(), play, agree, lambda _: None)
    left, played = iter([5, 1, 7, 100]), []
    begin(parts, plan())
    while True:
        begin(parts, plan(order_seed=99))  # the order is that of the first time
        patience = itertools.count(next(left), -1)

        def judge(run: Run, patience: "itertools.count[int]" = patience) -> Verdict:
            if next(patience) == 0:
                raise Stopped
            played.append((run.pair, run.turn))
            return Verdict(run.success)

        try:
            assert go_on(parts, plan(), play, judge, lambda _: None) == expected
            break
        except Stopped:
            with (parts / "runs.jsonl").open("a") as file:
                file.write('{"pair": 3, "turn"')  # a line that a crash cut off
    assert played == [(pair, turn) for pair in range(12) for turn in range(2)]
    assert (parts / "runs.jsonl").read_text() == (whole / "runs.jsonl").read_text()


def test_a_run_can_be_repeated_and_judged_otherwise_than_the_body_thinks(tmp_path: Path) -> None:
    verdicts = iter([Verdict(True, again=True), Verdict(False, "dropped it"), Verdict(True)])
    begin(tmp_path, plan(1))
    score = go_on(tmp_path, plan(1), lambda side, seed: Drive(seed, success=None), lambda _: next(verdicts), lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(row["success"], row["note"]) for row in rows] == [(False, "dropped it"), (True, "")]
    assert score.pairs == 1 and abs(score.difference) == 1


def test_another_trial_is_refused_and_more_pairs_are_not(tmp_path: Path) -> None:
    begin(tmp_path, plan(2))
    go_on(tmp_path, plan(2), play, agree, lambda _: None)
    for change in ({"b": "three"}, {"seed": 1}, {"loop": asdict(Loop("sync"))}):
        with pytest.raises(UserError, match=f"another {next(iter(change))}"):
            begin(tmp_path, plan(2, **change))
    assert len(begin(tmp_path, plan(4))) == 4
    assert go_on(tmp_path, plan(4), play, agree, lambda _: None).pairs == 4


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_exact_interval_covers_at_least_as_often_as_it_says(n: int) -> None:
    found = {(b, c): exact_difference(b, c, n) for b in range(n + 1) for c in range(n + 1 - b)}
    for (b, c), (low, high) in found.items():
        assert low <= (b - c) / n <= high
        assert found[c, b] == pytest.approx((-high, -low))
    for p, q in itertools.product(np.linspace(0, 1, 13), repeat=2):
        if p + q > 1:
            continue
        covered = sum(
            math.comb(n, b) * math.comb(n - b, c) * p**b * q**c * (1 - p - q) ** (n - b - c)
            for (b, c), (low, high) in found.items()
            if low - 1e-6 <= p - q <= high + 1e-6
        )
        assert covered >= 0.95 - 1e-6


def test_the_exact_interval_agrees_with_the_test_on_whether_there_is_a_difference() -> None:
    assert exact_difference(5, 0, 5)[0] < 0 < exact_difference(12, 0, 12)[0]
    assert exact_difference(0, 0, 0) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="discordant pairs"):
        exact_difference(3, 3, 5)

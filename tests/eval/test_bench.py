"""The one shape of benchmark results."""

import json
from pathlib import Path

import pytest

from triune import UserError
from triune.eval.bench import BENCHES, bench, write
from triune.eval.bench.run import row, seconds


def test_rates_are_better_when_larger_and_times_when_smaller() -> None:
    assert row("a", 10, 5, "them", "samples/s", gate=2)["passed"]
    assert not row("a", 10, 6, "them", "samples/s", gate=2)["passed"]
    assert row("a", 5, 10, "them", "ms")["ratio"] == 2
    assert row("a", 5, 10, "them", "ms")["gate"] is None


def test_a_result_has_the_shape_that_machines_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("triune.eval.bench.inference.run", lambda: [row("case", 1, 2, "them", "ms", 1.5)])
    result = bench("inference")
    assert list(result) == ["bench", "command", "hardware", "date", "rows"]
    assert list(result["rows"][0]) == ["name", "ours", "peer", "peer_name", "ratio", "unit", "gate", "passed"]
    table = write([result], tmp_path).read_text()
    assert "| inference | case | 1 ms | 2 (them) | 2 | >= 1.5 | yes |" in table
    assert json.loads((tmp_path / "bench-inference.json").read_text()) == result


def test_every_benchmark_is_known_by_name() -> None:
    with pytest.raises(UserError, match="did you mean 'rollout'"):
        bench("rolout")
    assert BENCHES


def test_seconds_takes_the_median_after_a_first_call() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(1), repeats=3) >= 0
    assert len(calls) == 4

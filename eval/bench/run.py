"""Runs benchmarks and keeps their results: JSON for machines, one Markdown table for people."""

import difflib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from ...data.files import write_file
from ...errors import UserError
from ..provenance import command, hardware, versions

BENCHES = ("loader", "inference", "rollout", "server")
Row = dict[str, Any]


def bench(name: str, **options: Any) -> dict[str, Any]:
    """Run one benchmark: ``bench, command, hardware, versions, load, date, rows``; ``load`` is how many processes others kept
    running in the minute before.

    Args:
        options: of that benchmark's ``run``.

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in BENCHES:
        near = difflib.get_close_matches(name, BENCHES, n=1)
        raise UserError(f"there is no benchmark '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(BENCHES)}"))
    load = os.getloadavg()[0]
    rows: list[Row] = import_module(f".{name}", __package__).run(**options)
    return {
        "bench": name,
        "command": command(),
        "hardware": hardware(),
        "versions": versions(),
        "load": round(load, 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def row(
    name: str,
    ours: float,
    peer: float,
    peer_name: str,
    unit: str,
    gate: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Row:
    """One line of a benchmark; ``ratio`` says how many times better ours is, and ``gate`` the least that passes.

    Rates (``.../s``) are better when larger, times when smaller. ``interval`` is that of the ratio, where pairs were measured.
    """
    ratio = ours / peer if unit.endswith("/s") else peer / ours
    return {
        "name": name,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "peer_name": peer_name,
        "ratio": round(ratio, 2),
        "interval": None if interval is None else [round(bound, 2) for bound in interval],
        "unit": unit,
        "gate": None if gate is None else f">= {gate:g}",
        "passed": gate is None or ratio >= gate,
    }


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of ``work``, after one call that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turns(works: Sequence[Callable[[], object]], repeats: int = 21) -> list[list[float]]:
    """Seconds of the processor that each of ``works`` takes, ``repeats`` times, after two rounds that are not counted.

    They run in turns, every second round backwards, so that what slows the machine for a while slows all of them. Meant for
    one thread: the processor's time then leaves out what other processes do.
    """
    times: list[list[float]] = [[] for _ in works]
    for i in range(repeats + 2):
        order = list(zip(works, times, strict=True))
        for work, spent in order if i % 2 else reversed(order):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
    return [spent[2:] for spent in times]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval of the median of what ``values`` are drawn from: those between two ranks, by the binomial distribution."""
    ordered, n = sorted(values), len(values)
    rank, outside = 0, 2 / 2**n
    while outside <= 1 - confidence and 2 * rank < n - 2:
        rank += 1
        outside += 2 * math.comb(n, rank) / 2**n
    rank -= outside > 1 - confidence
    return ordered[max(rank, 0)], ordered[n - 1 - max(rank, 0)]


def write(results: list[dict[str, Any]], folder: Path) -> Path:
    """``bench-<name>.json`` for each result and ``bench.md`` over all that lie in ``folder``; returns the latter."""
    for result in results:
        write_file(folder / f"bench-{result['bench']}.json", json.dumps(result, indent=1) + "\n")
    kept = [json.loads(path.read_text()) for name in BENCHES if (path := folder / f"bench-{name}.json").is_file()]
    lines = ["| benchmark | case | ours | peer | ratio | gate | passed |", "|---|---|---|---|---|---|---|"]
    for result in kept:
        for r in result["rows"]:
            ours, peer = f"{r['ours']:g} {r['unit']}", f"{r['peer']:g} ({r['peer_name']})"
            ratio = f"{r['ratio']:g}" + (" ({:g} to {:g})".format(*r["interval"]) if r.get("interval") else "")
            passed = "yes" if r["passed"] else "no"
            lines.append(f"| {result['bench']} | {r['name']} | {ours} | {peer} | {ratio} | {r['gate'] or ''} | {passed} |")
    text = "# Benchmarks\n\n" + "\n".join(lines) + "\n\n" + "\n".join(_origin(result) for result in kept) + "\n"
    write_file(folder / "bench.md", text)
    return folder / "bench.md"


def _origin(result: dict[str, Any]) -> str:
    machine, made = result["hardware"], result.get("versions", {})
    parts = [f"`{result['command']}`", result["date"][:10], machine["cpu"], f"{machine['cores']} cores", machine["gpu"]]
    parts += [f"{package} {made[package]}" for package in ("torch", "transformers", "lerobot") if package in made]
    parts += [f"load {result['load']:g} before it began"] if "load" in result else []
    return f"- {result['bench']}: " + ", ".join(part for part in parts if part)

"""Runs benchmarks and keeps their results: JSON for machines, one Markdown table for people."""

import difflib
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from ...data.files import write_file
from ...errors import UserError
from ..provenance import command, hardware

BENCHES = ("loader", "inference", "rollout")
Row = dict[str, Any]


def bench(name: str) -> dict[str, Any]:
    """Run one benchmark: ``bench, command, hardware, date, rows``.

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in BENCHES:
        near = difflib.get_close_matches(name, BENCHES, n=1)
        raise UserError(f"there is no benchmark '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(BENCHES)}"))
    rows: list[Row] = import_module(f".{name}", __package__).run()
    return {
        "bench": name,
        "command": command(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def row(name: str, ours: float, peer: float, peer_name: str, unit: str, gate: float | None = None) -> Row:
    """One line of a benchmark; ``ratio`` says how many times better ours is, and ``gate`` the least that passes.

    Rates (``.../s``) are better when larger, times when smaller.
    """
    ratio = ours / peer if unit.endswith("/s") else peer / ours
    return {
        "name": name,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "peer_name": peer_name,
        "ratio": round(ratio, 2),
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


def write(results: list[dict[str, Any]], folder: Path) -> Path:
    """``bench-<name>.json`` for each result and ``bench.md`` over all of them; returns the latter."""
    lines = ["| benchmark | case | ours | peer | ratio | gate | passed |", "|---|---|---|---|---|---|---|"]
    for result in results:
        write_file(folder / f"bench-{result['bench']}.json", json.dumps(result, indent=1) + "\n")
        for r in result["rows"]:
            ours, peer = f"{r['ours']:g} {r['unit']}", f"{r['peer']:g} ({r['peer_name']})"
            passed = "yes" if r["passed"] else "no"
            lines.append(f"| {result['bench']} | {r['name']} | {ours} | {peer} | {r['ratio']:g} | {r['gate'] or ''} | {passed} |")
    machine, date = results[-1]["hardware"], results[-1]["date"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    text = f"# Benchmarks\n\n`vla bench`, {date[:10]}, {machine['cpu']}, {machine['cores']} cores{gpu}.\n\n" + "\n".join(lines) + "\n"
    write_file(folder / "bench.md", text)
    return folder / "bench.md"

"""What commands print: tables and bars for people, JSON for machines. Progress goes to stderr, results to stdout."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(result, indent=2))


def print_renderable(thing: Any) -> None:
    """Something that rich can draw, on stdout."""
    from rich.console import Console

    Console().print(thing)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout: the first column to the left, the others to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    print_renderable(table)


def print_rates(results: dict[str, Any]) -> None:
    """The tasks, controls and overall rate of an evaluation's results (shape: eval/README.md)."""
    rows = [_rate_row(row, "" if row["scored"] else "not scored") for row in results["tasks"]]
    rows += [_rate_row(row, "control") for row in results["controls"]]
    if results["overall"] is not None:
        rows.append(_rate_row(results["overall"] | {"name": "overall"}, "the scored tasks"))
    print_table("Success rates", ("task", "episodes", "successes", "rate", "95 % interval", "note"), rows)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; the callable that it gives takes (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def duration(seconds: float) -> str:
    """``75.2`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _rate_row(row: dict[str, Any], note: str) -> tuple[object, ...]:
    low, high = row["ci95"]
    return row["name"], row["episodes"], row["successes"], f"{100 * row['rate']:.1f} %", f"{100 * low:.0f}-{100 * high:.0f} %", note


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

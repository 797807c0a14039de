"""``vla bench``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_table


def bench(
    what: Annotated[list[str] | None, typer.Argument(help="loader, inference, rollout, server; all, in this order, unless said.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON files and a Markdown table into this folder.")] = None,
    peer: Annotated[
        Path | None, typer.Option(help="server: a Python file that serves openpi's protocol on the port of its first argument.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="server: how long the control loop at 50 Hz runs.")] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure this machine: ours beside a peer, with gates. Exit code 1 when a gate is missed."""
    from ..eval.bench import BENCHES, write
    from ..eval.bench import bench as run

    options = {"server": {"peer": peer, "minutes": minutes}}
    results = [run(name, **options.get(name, {})) for name in what or BENCHES]
    if out is not None:
        write(results, out)
    if json:
        print_json(results[0] if len(results) == 1 else results)
    else:
        for result in results:
            columns = list(result["rows"][0])
            print_table(result["bench"], columns, ([row[column] for column in columns] for row in result["rows"]))
    if not all(row["passed"] for result in results for row in result["rows"]):
        sys.exit(1)

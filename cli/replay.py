"""``vla replay``."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .output import print_json, print_table, progress_bar

SHOWN = 20
"""Rows of the table; of more those that differ most."""


def replay(
    incident: Annotated[Path, typer.Argument(help="A folder that the flight recorder of `vla serve` wrote.")],
    policy: Annotated[str | None, typer.Option(help="Checkpoint or run folder; the recorded one unless given.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of an action that passes; 0: the same bits.")] = 0.0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"] | None, typer.Option(help="What the weights are held in; as recorded unless given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Ask a policy again what a server was asked before an incident, and compare the actions."""
    import asyncio

    from ..data.incidents import read_incident
    from ..errors import UserError

    try:
        from ..policies.serve import Source
        from ..policies.serve.replay import replay as run
    except ImportError as error:
        raise UserError(f"replaying needs packages that are not here ({error}): pip install 'triune-vla[serve]'") from None

    head, rows = read_incident(incident)
    recorded = head.get("policy", {})
    path = policy or recorded.get("path")
    if path is None:
        raise UserError(f"{incident} does not say which policy was served; give one with --policy")
    source = Source("triune.policies:open_policy", {"path": path, "precision": precision or recorded.get("precision", "auto")}, 1)
    with progress_bar("replay") as progress:
        found = asyncio.run(run(source, rows, tolerance, progress))
    passed = all(row.passed for row in found)
    errors = [row.error for row in found if row.error is not None]
    summary = {
        "incident": str(incident),
        "reason": head.get("reason"),
        "policy": path,
        "requests": len(found),
        "compared": len(errors),
        "same_bits": sum(error == 0 for error in errors),
        "largest_error": max(errors, default=None),
        "passed": passed,
    }
    if json:
        print_json(summary | {"rows": [asdict(row) for row in found]})
    else:
        worst = sorted(found, key=lambda row: (row.passed, -(row.error or 0.0), row.recorded == "answered"))[:SHOWN]
        columns = ("session", "step", "recorded", "now", "largest difference", "ms recorded", "ms now", "passed")
        cells = [[v if v is not None else "-" for v in asdict(row).values()] for row in worst]
        print_table(f"{head.get('reason')}: {head.get('sentence')}", columns, cells)
        shown = f", the {SHOWN} that matter most are shown" if len(found) > SHOWN else ""
        print(f"{len(found)} requests{shown}; {summary['same_bits']} of {len(errors)} answers have the same bits")
    if not passed:
        sys.exit(1)

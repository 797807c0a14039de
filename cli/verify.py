"""``vla verify``."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .output import print_json, print_table


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run's folder.")],
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="What the weights are held in; auto as in other commands.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Prove that a checkpoint acts as it was trained: files by their hashes, actions by its golden observations."""
    from ..policies import load_policy
    from ..policies.checkpoint import read_checkpoint
    from ..policies.checkpoint import verify as run

    found = read_checkpoint(checkpoint)
    policy = load_policy(str(found.folder), precision=precision)
    rows = [asdict(row) for row in run(found, policy, policy.dtype)]
    passed = all(row["passed"] for row in rows)
    if json:
        print_json({"checkpoint": str(checkpoint), "files": len(found.manifest.files), "rows": rows, "passed": passed})
    else:
        print_table("Golden observations", list(rows[0]), [list(row.values()) for row in rows])
    if not passed:
        sys.exit(1)

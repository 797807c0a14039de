"""``vla verify``."""

from pathlib import Path
from typing import Annotated

import typer


def verify(checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")]) -> None:
    """Prove that a checkpoint acts as it was trained: its golden observations give its golden actions again."""
    from ..policies.checkpoint import verify as run

    run(checkpoint)
    print(f"{checkpoint} is whole and acts as it was trained")

"""``vla train``."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A name in configs/train, or a path to a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as train.lr=1e-3.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/<recipe> unless said.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")] = False,
) -> None:
    """Train a policy, or another network, by a recipe."""
    from ..policies.train.recipe import run

    checkpoint = run(recipe, overrides or [], out or Path("runs") / Path(recipe).stem, resume)
    print(f"checkpoint: {checkpoint}")

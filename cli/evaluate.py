"""``vla eval``."""

from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_rates


def evaluate(
    suite: Annotated[str, typer.Argument(help="A name in configs/suite, or a path to a YAML file.")],
    policy: Annotated[str, typer.Option(help="Checkpoint folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the suite.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes per task; as the suite says unless given.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="First seed; as the suite says unless given.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.json, episodes.jsonl, videos and report.html.")] = Path("runs/eval"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that simulate; the outcome does not depend on it.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate a policy in closed loop: rates with intervals, videos, one HTML report."""
    from ..eval.suite import evaluate as run

    results = run(suite, policy, episodes=episodes, seed=seed, out=out, workers=workers, overrides=overrides or [])
    if json:
        print_json(results)
    else:
        print_rates(results)
        print(f"report: {out / 'report.html'}")

"""``vla eval``."""

from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_rates, progress_bar


def evaluate(
    suite: Annotated[str, typer.Argument(help="A name in configs/suite, or a path to a YAML file.")],
    policy: Annotated[str, typer.Option(help="Checkpoint or run folder; 'expert' for the worlds' scripted experts.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the suite.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes per task; as the suite says unless given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed; evaluation seeds begin at 1,000,000.")] = 1_000_000,
    out: Annotated[Path, typer.Option(help="Folder of results.json, episodes.jsonl, videos and report.html.")] = Path("runs/eval"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that simulate; the outcome does not depend on it.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate a policy in closed loop: rates with intervals, videos, one HTML report."""
    from ..eval import evaluate as run
    from ..eval import write_report

    with progress_bar("episodes") as progress:
        results = run(
            suite,
            policy,
            episodes=episodes,
            seed=seed,
            out=out,
            workers=workers,
            overrides=overrides,
            on_episode=lambda _, done, total: progress(done, total),
        )
    report = write_report(out)
    if json:
        print_json(results)
    else:
        print_rates(results)
        print(f"report: {report}")

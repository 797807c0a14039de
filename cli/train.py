"""``vla train``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..policies.train.dry_run import Memory, Report


def train(
    recipe: Annotated[str, typer.Argument(help="A name in configs/train, or a path to a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as train.lr=1e-3.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/<recipe> unless said.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what the run will take: parameters, memory, FLOPs, time. Nothing is written.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: processes that will share each batch.")] = 1,
    flops: Annotated[
        float | None, typer.Option(help="With --dry-run: peak FLOP/s of the device that will train, such as 989e12; else steps are timed.")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --flops: the share of the peak that is reached.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON document.")] = False,
) -> None:
    """Train a policy, or another network, by a recipe."""
    if dry_run:
        from ..policies.train.dry_run import dry_run as estimate
        from .output import print_json

        report = estimate(recipe, overrides or [], processes, flops, utilisation)
        return print_json(report.tree()) if as_json else _show(report)
    from ..policies.train.recipe import run

    checkpoint = run(recipe, overrides or [], out or Path("runs") / Path(recipe).stem, resume)
    print(f"checkpoint: {checkpoint}")


def _show(report: "Report") -> None:
    from .output import duration, print_table

    print_table("parameters", ("part", "total", "trained"), [(part, *(f"{n:,}" for n in row)) for part, row in report.parameters.items()])
    both: list[tuple[str, Memory]] = [("with" if report.checkpointing else "without", report.memory)]
    if report.other is not None:
        both.append(("without" if report.checkpointing else "with", report.other))
    shared = "" if report.processes == 1 else f" of {report.processes} ({report.parallel})"
    title = f"memory of one process{shared} in GB, {report.share} samples at a time, {report.precision}"
    rows = [(key, *(f"{getattr(memory, key) / 1e9:.3f}" for _, memory in both)) for key in vars(report.memory)]
    print_table(title, ("", *(f"{way} checkpointing" for way, _ in both)), rows)
    print(f"FLOPs of a step: {report.flops:.3e} (batch of {report.batch_size})")
    if report.epochs is not None:
        print(f"data: {report.samples:,} starts of chunks, each seen {report.epochs:.2f} times")
    if report.step_seconds is not None and report.seconds is not None:
        waiting = "" if report.waiting_seconds is None else f" ({report.waiting_seconds / report.step_seconds:.0%} of it waiting for data)"
        print(f"time: {report.step_seconds:.3f} s a step{waiting}, {duration(report.seconds)} for {report.steps} steps")
    if report.preparation_seconds is not None:
        print(f"before the first step: {duration(report.preparation_seconds)}")
    print(f"time is {report.time_from}")

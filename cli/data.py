"""``vla data``: record and inspect datasets."""

from pathlib import Path
from typing import Annotated

import typer

from .output import print_json, print_table, progress_bar

app = typer.Typer(name="data", no_args_is_help=True, help="Record and inspect datasets.")
SCENES = "scenes:"


@app.command()
def record(
    world: Annotated[str, typer.Argument(help="A world, such as cubes/lift-red; or scenes:<world> for rendered scenes with captions.")],
    episodes: Annotated[int, typer.Option(min=1, help="Episodes (or scenes) to keep.")],
    out: Annotated[Path, typer.Option(help="Folder of the dataset; episodes already there are kept.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode; training seeds are below 500,000.")] = 0,
    noise: Annotated[float, typer.Option(min=0, help="Noise on executed actions (standard deviation).")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that simulate.")] = 2,
    keep_failures: Annotated[bool, typer.Option("--all", help="Keep failed episodes too.")] = False,
) -> None:
    """Record demonstrations of a world's scripted expert as a LeRobotDataset."""
    if world.startswith(SCENES):
        from ..envs.scenes import record_scenes

        with progress_bar("scenes") as progress:
            record_scenes(world, episodes, out, seed=seed, workers=workers, progress=progress)
    else:
        from ..envs.record import record as run

        run(world, episodes, out, seed=seed, noise=noise, workers=workers, keep_failures=keep_failures)
    print(f"dataset: {out}")


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="Folder of a LeRobotDataset.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a dataset holds: episodes, tasks, cameras, and the range of every state and action dimension."""
    from ..data.inspect import inspect as run

    found = run(dataset)
    if json:
        print_json(found)
        return
    print_table(str(dataset), ("fact", "value"), [(k, v) for k, v in found.items() if not isinstance(v, list | dict)])

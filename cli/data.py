"""``vla data``: record and inspect datasets."""

from pathlib import Path
from typing import Annotated

import typer

from .output import duration, print_json, print_table, progress_bar

app = typer.Typer(name="data", no_args_is_help=True, help="Record and inspect datasets.")


@app.command()
def record(
    world: Annotated[str, typer.Argument(help="A world, such as cubes/lift-red; or scenes:<world> for rendered scenes with captions.")],
    episodes: Annotated[int, typer.Option(min=1, help="Episodes (or scenes) to keep.")],
    out: Annotated[Path, typer.Option(help="Folder of the dataset; episodes already there are kept.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode; training seeds are below 500,000.")] = 0,
    noise: Annotated[float, typer.Option(min=0, help="Noise on executed actions (standard deviation).")] = 0.0,
    pushes: Annotated[float, typer.Option(min=0, max=1, help="Chance per step of a random push, from which the expert recovers.")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that simulate.")] = 2,
    keep_failures: Annotated[bool, typer.Option("--all", help="Keep failed episodes too.")] = False,
    size: Annotated[str, typer.Option(metavar="SIDE|HxW", help="Pixels of the images: 96, or height and width as 120x160.")] = "96",
    cameras: Annotated[str | None, typer.Option(metavar="A,B,...", help="Cameras of the world; agentview,wrist unless given.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Control rate in Hz; the world's own unless given.")] = None,
    render: Annotated[str, typer.Option(help="Render profile: fast (no shadows, no reflections) or default.")] = "fast",
    video: Annotated[bool, typer.Option("--video", help="Store AV1 video instead of PNG: smaller, no longer bit for bit.")] = False,
) -> None:
    """Record demonstrations of a world's scripted expert as a LeRobotDataset."""
    from ..envs.record import record as record_episodes
    from ..envs.scenes import record_scenes
    from ..envs.view import choose, read_size
    from ..errors import UserError

    pixels = read_size(size)
    with progress_bar(world) as progress:
        if world.startswith("scenes:"):
            if not isinstance(pixels, int) or cameras is not None or rate is not None:
                raise UserError(f"{world} are square pictures of agentview and wrist; give one side as --size, no --cameras and no --rate")
            record_scenes(world, episodes, out, seed=seed, workers=workers, size=pixels, progress=progress)
        else:
            record_episodes(
                world,
                episodes,
                out,
                seed=seed,
                noise=noise,
                pushes=pushes,
                workers=workers,
                keep_failures=keep_failures,
                view=choose(render=render, size=pixels, cameras=None if cameras is None else cameras.split(","), rate=rate),
                video=video,
                progress=progress,
            )
    print(f"dataset: {out}")


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="Folder of a LeRobotDataset.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a dataset holds: episodes, tasks, cameras, and the range of every state and action dimension."""
    from ..data.readers.lerobot import inspect as run

    found = run(dataset)
    if json:
        print_json(found)
        return
    length = found["episode_length"]
    facts = [
        ("episodes", f"{found['episodes']} of {length['min']} to {length['max']} frames, {length['mean']:.0f} on average"),
        ("frames", f"{found['frames']} at {found['fps']:g} Hz, {duration(found['seconds'])}"),
        ("cameras", ", ".join(f"{camera['name']} {camera['height']}x{camera['width']}" for camera in found["cameras"])),
        ("worlds", ", ".join(found["worlds"]) or "not recorded"),
        ("unknown", ", ".join(found["unknown"]) or "nothing"),
    ]
    print_table(found["path"], ("fact", "value"), facts)
    print_table("Tasks", ("task", "episodes"), found["tasks"].items())
    rows = [(key, *row.values()) for key, ranges in found["ranges"].items() for row in ranges]
    print_table("Ranges", ("feature", "dimension", "min", "max", "mean", "constant"), rows)

"""``vla data``: record, inspect, convert and repair datasets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .data_stats import bench, stats
from .output import duration, print_json, print_table, progress_bar

app = typer.Typer(name="data", no_args_is_help=True, help="Record, inspect, convert and repair datasets.")
app.command()(stats)
app.command()(bench)


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
    dataset: Annotated[str, typer.Argument(help="A LeRobotDataset folder (v2.0 to v3.0), an HDF5 file or a folder of them, or a hub id.")],
    write: Annotated[Path | None, typer.Option(help="Write a proposed mapping, such as configs/robot/mine.yaml.")] = None,
    images: Annotated[Path | None, typer.Option(help="Write the first frame of each camera as PNG into this folder.")] = None,
    robot: Annotated[str | None, typer.Option(help="Look through a mapping: a name in configs/robot or a YAML file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a dataset holds, what is doubtful about it, and how to mend it."""
    from ..data import open_dataset
    from ..data.inspect import inspect as run
    from ..data.propose import write_images, write_proposal
    from ..data.robot import load_robot

    opened = open_dataset(dataset)
    found = run(load_robot(robot).view(opened) if robot else opened)
    if images is not None:
        write_images(opened, images)
    if write is not None:
        write_proposal(opened, found if robot is None else run(opened), write)
    if json:
        print_json(found)
        return
    _print_inspection(found)
    if write is not None:
        print(f"mapping: {write}")


def _print_inspection(found: dict[str, Any]) -> None:
    length, idle = found["episode_length"], found["idle"]
    seconds = f"{found['fps']:g} Hz, {duration(found['seconds'])}" if found["fps"] else "an unknown rate"
    still = f"{idle['share']:.1%} ({idle['starts']:.1%} at starts, {idle['ends']:.1%} at ends)" if idle else "not measurable"
    facts = [
        ("episodes", f"{found['episodes']} of {length['min']} to {length['max']} frames, {length['mean']:.0f} on average"),
        ("frames", f"{found['frames']} at {seconds}"),
        ("state", " + ".join(found["state"]) or "none"),
        ("action", f"{found['action']}, looks {found['mode'] or 'neither absolute nor relative'}" if found["action"] else "none"),
        ("idle frames", still),
        ("worlds", ", ".join(found["worlds"]) or "not recorded"),
        ("unknown", ", ".join(found["unknown"]) or "nothing"),
    ]
    print_table(found["path"], ("fact", "value"), facts)
    cameras = []
    for camera in found["cameras"]:
        size = "x".join(map(str, camera["decoded"])) if camera["decoded"] else "does not decode"
        twice = "-" if camera["duplicates"] is None else f"{camera['duplicates']} of {camera['pairs']}"
        cameras.append((camera["name"], size, camera["colour"] or "unknown", camera["flip"] or "unknown", twice))
    print_table("Cameras", ("camera", "size", "colour", "flip", "same picture twice"), cameras)
    print_table("Tasks", ("task", "episodes"), found["tasks"].items())
    columns = ("min", "max", "mean", "constant", "not_finite")
    rows = [
        (key, row["name"], *(row[c] for c in columns), f"{found['clipped'].get(row['name'], 0.0):.1%}" if key == found["action"] else "")
        for key, ranges in found["ranges"].items()
        for row in ranges
    ]
    print_table("Ranges", ("feature", "dimension", "min", "max", "mean", "constant", "not finite", "at an end"), rows)
    print("Findings:" if found["findings"] else "Findings: none")
    for finding in found["findings"]:
        print(f"* {finding['sentence']}\n    -> {finding['mend']}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A dataset of any format that `vla data inspect` reads.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new dataset; an unfinished one is continued.")],
    to: Annotated[str, typer.Option(help="Format: v3.0 or v2.1 of LeRobotDataset.")] = "v3.0",
    video: Annotated[bool, typer.Option("--video", help="Keep images as video instead of PNG: smaller, no longer bit for bit.")] = False,
    robot: Annotated[str | None, typer.Option(help="Mapping: a name in configs/robot or a YAML file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write a dataset in another format, and read it back to compare."""
    from ..data import open_dataset
    from ..data.convert import convert as run
    from ..data.robot import load_robot

    mapping = load_robot(robot) if robot else None
    opened = open_dataset(source)
    with progress_bar("convert") as progress:
        viewed, name = (mapping.view(opened), mapping.name) if mapping else (opened, None)
        done = run(viewed, out, to, video=video, robot=name, progress=progress)
    if json:
        print_json(done)
        return
    print(f"{done['path']}: LeRobotDataset {done['version']}, {done['episodes']} episodes, {done['frames']} frames, read back")
    for camera, found in done["images"].items():
        said = "every pixel equal" if found == "equal" else f"{found['mean_db']:.1f} dB, worst frame {found['worst_db']:.1f} dB"
        print(f"  camera {camera}: {said}")
    if done["skipped"]:
        print(f"  left out, of one frame: episodes {', '.join(map(str, done['skipped']))}")


@app.command()
def repair(
    dataset: Annotated[Path, typer.Argument(help="Folder of a LeRobotDataset v3.0 that was cut off or never finalised.")],
    out: Annotated[Path | None, typer.Option(help="Write here; default: in its place, and keep the broken one beside it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Save every whole episode of a broken recording, and say what was lost."""
    from ..data.repair import repair as run

    done = run(dataset, out)
    if json:
        print_json(done)
    elif not done["changed"]:
        print(f"{done['path']}: nothing is broken, {done['kept']} episodes")
    else:
        print(f"{done['path']}: {done['kept']} episodes kept, {len(done['lost'])} lost")
        for entry in done["lost"]:
            print(f"  lost episode {entry['episode']}: {entry['why']}")
        if done["backup"]:
            print(f"what was there before: {done['backup']}")

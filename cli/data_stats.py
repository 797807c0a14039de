"""``vla data stats`` and ``vla data bench``: what the numbers of a dataset are, and how fast it loads."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json, print_table


def stats(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    relative: Annotated[
        str | None, typer.Option(help="Actions less the state: per action dimension the state dimension, - for none; such as 0,1,2,-.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Actions per chunk; relative ones are offsets from the chunk's first state.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="A checkpoint: use its statistics, or these?")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the statistics as JSON to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Statistics of states and actions over all frames, in one pass; true quantiles, and what is next to constant."""
    from ..data import ChunkSampler, Normaliser, open_dataset
    from ..data.compare import Comparison, compare_statistics
    from ..data.statistics import save_statistics, sketch_actions, sketch_dataset
    from ..data.transforms import Relative
    from ..errors import UserError

    if (relative is None) != (chunk is None):
        raise UserError("--relative and --chunk belong together: the offsets depend on how long a chunk is; give both, or neither")
    counted = None if relative is None else Relative(state_of=_dimensions(relative)).apply
    opened = open_dataset(dataset)
    sketches = sketch_dataset(opened)
    if chunk is not None:
        sketches["action"] = sketch_actions(ChunkSampler(opened, chunk, 1, seed=0, foresight=0), counted)
    found = {key: sketch.statistics() for key, sketch in sketches.items()}
    names = {"observation.state": opened.contract.state.names, "action": opened.contract.action.names}
    compared: dict[str, Comparison] = {}
    if against is not None:
        known = _known(against)
        compared = {key: compare_statistics(known[key], sketches[key], names.get(key, ())) for key in known if key in sketches}
    if out is not None:
        save_statistics(found, out)
    guards = {key: Normaliser(entry, "quantile").guarded for key, entry in found.items()}
    if json:
        tree: dict[str, Any] = {key: entry.model_dump(mode="json") | {"guarded": guards[key]} for key, entry in found.items()}
        print_json(
            {"path": str(dataset), "statistics": tree} | ({"against": {k: c.tree() for k, c in compared.items()}} if compared else {})
        )
        return
    for key, entry in found.items():
        labels = names.get(key, ())
        labels = labels if len(labels) == len(entry.mean) else tuple(map(str, range(len(entry.mean))))
        numbers = (entry.mean, entry.std, entry.min, entry.q01, entry.q99, entry.max)
        title = f"{key}, {entry.count} rows" + (f", relative, chunks of {chunk}" if key == "action" and relative else "")
        columns = ("dimension", "mean", "std", "min", "q01", "q99", "max", "scaled by")
        print_table(title, columns, zip(labels, *numbers, map(_guard, guards[key]), strict=True))
    for key, comparison in compared.items():
        rows = ((row.name, row.shift, row.width, f"{row.outside:.1%}", row.doubt or "fits") for row in comparison.dimensions)
        verdicts = ("dimension", "shift", "width", "outside q01-q99", "verdict")
        print_table(f"{key} in ranges of {against}", verdicts, rows)
        print(f"Use the statistics of the {comparison.use}: {comparison.reason}.\n")


def bench(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    chunk: Annotated[int, typer.Option(min=1, help="Actions per sample.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 32,
    cache: Annotated[int, typer.Option(min=1, help="Megabytes of decoded frames.")] = 1024,
    limit: Annotated[int, typer.Option("--samples", min=1, help="Samples that each measurement loads at most.")] = 4096,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """How fast a dataset loads on this machine, where the time goes, and how many workers to use."""
    from ..data import open_dataset
    from ..data.speed import measure

    found = measure(open_dataset(dataset), chunk, batch, cache * 2**20, limit)
    if json:
        print_json(found)
        return
    print_table(
        f"{dataset}: cameras", ("camera", "kept as", "size", "frames/s one by one in order"), (c.values() for c in found["cameras"])
    )
    print_table("Samples", ("loaded", "samples/s"), found["rates"].items())
    print_table("Processor time of a sample", ("part", "ms"), found["milliseconds"].items())
    for sentence in found["advice"]:
        print(sentence)


def _guard(word: str) -> str:
    return {"": "q01-q99", "range": "min-max (!)", "constant": "1, constant (!)"}[word]


def _dimensions(text: str) -> tuple[int | None, ...]:
    from ..errors import UserError

    words = [word.strip() for word in text.split(",")]
    if not all(word == "-" or word.isdecimal() for word in words):
        raise UserError(f"--relative '{text}' must list a state dimension from 0 on, or -, per action dimension, with commas: 0,1,2,-")
    return tuple(None if word == "-" else int(word) for word in words)


def _known(checkpoint: Path) -> dict[str, Any]:
    """Statistics, or the affine maps of a converted policy, by feature."""
    from json import loads

    from ..config import parse
    from ..data.statistics import Statistics
    from ..data.transforms import Affine
    from ..policies.checkpoint import find_checkpoint

    tree = loads((find_checkpoint(checkpoint) / "statistics.json").read_text())
    return {key: parse(Affine if "shift" in entry else Statistics, entry, f"{checkpoint}, {key}") for key, entry in tree.items()}

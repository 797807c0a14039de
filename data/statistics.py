"""Statistics of vectors over a whole dataset, as normalisation needs them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import Strict, parse
from ..errors import UserError
from .files import write_file
from .readers import Dataset

Row = tuple[float, ...]


class Statistics(Strict):
    """Statistics per dimension. The quantiles are those of all values, not averages of per-episode ones."""

    mean: Row
    std: Row
    min: Row
    max: Row
    q01: Row
    q99: Row
    count: int


def statistics_of(values: np.ndarray) -> Statistics:
    """Statistics of ``values`` (..., D); every leading entry counts once.

    Raises:
        UserError: there are no values, or some are not finite.
    """
    rows = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    if not len(rows):
        raise UserError("statistics need at least one frame; the selection of episodes is empty")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(0)).tolist()
        raise UserError(f"dimensions {bad} hold values that are not finite; drop these frames from the dataset")
    q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
    found = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0), "q01": q01, "q99": q99}
    return Statistics(count=len(rows), **{name: tuple(value.tolist()) for name, value in found.items()})


def compute_statistics(dataset: Dataset, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> dict[str, Statistics]:
    """Statistics of each vector feature over all frames of the dataset, or of some episodes.

    Args:
        dataset: an opened dataset.
        keys: features; default: all.
        episodes: episode indices; default: all. Give the training split, so that nothing is learnt from the other.
    """
    chosen = dataset.episodes if episodes is None else [dataset.episodes[i] for i in episodes]
    frames = np.concatenate([np.arange(e.start, e.start + e.length) for e in chosen] or [np.zeros(0, np.int64)])
    return {key: statistics_of(dataset.vectors[key][frames]) for key in keys or dataset.vectors}


def save_statistics(statistics: Mapping[str, Statistics], path: str | Path) -> None:
    """Write JSON: feature -> {mean, std, min, max, q01, q99, count}."""
    write_file(Path(path), json.dumps({key: entry.model_dump(mode="json") for key, entry in statistics.items()}, indent=1))


def load_statistics(path: str | Path) -> dict[str, Statistics]:
    """Read what ``save_statistics`` wrote.

    Raises:
        UserError: the file is missing or broken.
    """
    file = Path(path)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no statistics file {file}; a checkpoint folder holds one") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is cut off or not JSON ({error}); restore it from a copy") from None
    return {key: parse(Statistics, entry, f"{file}, {key}") for key, entry in tree.items()}

"""Statistics of vectors over a whole dataset, as normalisation needs them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..errors import UserError
from .files import write_text
from .readers import Dataset

NEAR_CONSTANT = 1e-4
"""A dimension whose standard deviation and q01-q99 range are below this is taken as constant."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per dimension, float64 (D,): true quantiles of all values, not averages of per-episode ones."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    count: int

    @property
    def constant(self) -> np.ndarray:
        """Dimensions that hardly vary, bool (D,): normalisation leaves their scale alone."""
        return (self.std < NEAR_CONSTANT) & (self.q99 - self.q01 < NEAR_CONSTANT)


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
    return Statistics(rows.mean(0), rows.std(0), rows.min(0), rows.max(0), q01, q99, len(rows))


def compute_statistics(dataset: Dataset, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> dict[str, Statistics]:
    """Statistics of each vector feature over all frames of the dataset, or of some episodes.

    Args:
        dataset: an opened dataset.
        keys: features; default: all.
        episodes: episode indices; default: all. Give the training split, so that nothing is learnt from the other.
    """
    chosen = dataset.episodes if episodes is None else [dataset.episodes[i] for i in episodes]
    frames = np.concatenate([np.arange(e.start, e.start + e.length) for e in chosen]) if chosen else np.zeros(0, np.int64)
    return {key: statistics_of(dataset.vectors[key][frames]) for key in keys or dataset.vectors}


def save_statistics(statistics: Mapping[str, Statistics], path: str | Path) -> None:
    """Write JSON: feature -> {mean, std, min, max, q01, q99, count}, the layout of LeRobot's ``stats.json``."""
    tree = {
        key: {f.name: [entry.count] if f.name == "count" else getattr(entry, f.name).tolist() for f in fields(Statistics)}
        for key, entry in statistics.items()
    }
    write_text(Path(path), json.dumps(tree, indent=1))


def load_statistics(path: str | Path) -> dict[str, Statistics]:
    """Read what ``save_statistics`` wrote.

    Raises:
        UserError: the file is missing, broken, or lacks an entry.
    """
    file = Path(path)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: Statistics(count=int(entry["count"][0]), **{f.name: np.array(entry[f.name], np.float64) for f in fields(Statistics) if f.name != "count"})
            for key, entry in tree.items()
        }
    except FileNotFoundError:
        raise UserError(f"there is no statistics file {file}; compute it with `vla data stats`") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a statistics file ({type(error).__name__}: {error}); compute it anew with `vla data stats`") from None

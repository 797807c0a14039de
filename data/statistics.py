"""Statistics of vectors over a whole dataset, as normalisation needs them: one pass, in blocks, parts merge in any order.

Up to ``EXACT`` rows are kept as they are, and the numbers are numpy's. Beyond that mean, deviation and ends stay exact, and a
quantile is at most 0.004 % of the range off (see ``sketch``).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import Strict, parse
from ..errors import UserError
from .files import write_file
from .readers import Dataset
from .sampler import ChunkSampler
from .sketch import Lattice

EXACT = 2**17
"""Rows that a sketch keeps before it begins to count in cells."""
BLOCK = 2**16
"""Rows that are looked at together."""
SHARES = (0.01, 0.99)
SMALLEST = 1e-250
"""Magnitudes below this count as zero, so that cells never meet subnormal numbers."""

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


class Sketch:
    """What is kept of rows (n, D) that stream by.

    Args:
        dims: D.
    """

    def __init__(self, dims: int) -> None:
        self._rows: list[np.ndarray] = [np.zeros((0, dims), np.float32)]
        self._waiting = 0
        self._lattices: list[Lattice] = []
        self._counted = 0
        self._mean: np.ndarray = np.zeros(dims)
        self._squares: np.ndarray = np.zeros(dims)

    @property
    def dims(self) -> int:
        return len(self._mean)

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._counted + self._waiting

    def add(self, values: np.ndarray) -> None:
        """Take in ``values`` (..., D); every leading entry counts once.

        Raises:
            UserError: some are not finite.
        """
        rows = np.asarray(values).reshape(-1, self.dims)
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK].copy()
            if not np.isfinite(block).all():
                bad = np.flatnonzero(~np.isfinite(block).all(0)).tolist()
                raise UserError(f"dimensions {bad} hold values that are not finite; drop these frames from the dataset")
            self._rows.append(block)
            self._waiting += len(block)
            if self._waiting > (BLOCK if self._lattices else EXACT):
                self._count()

    def merge(self, other: "Sketch") -> None:
        """Take in all that ``other`` took in, which stays as it is.

        Raises:
            UserError: it has other dimensions.
        """
        if other.dims != self.dims:
            raise UserError(f"statistics of {other.dims} dimensions cannot join those of {self.dims}; map both to one action space first")
        for rows in other._rows:
            self.add(rows)
        if other._lattices:
            self._count()
            self._lattices = self._lattices or [Lattice(x.low, x.high) for x in other._lattices]
            for mine, its in zip(self._lattices, other._lattices, strict=True):
                mine.merge(its)
            self._join(other._counted, other._mean, other._squares)

    def statistics(self) -> Statistics:
        """
        Raises:
            UserError: there were no values.
        """
        if not self.count:
            raise UserError("statistics need at least one frame; the selection of episodes is empty")
        if self._lattices:
            self._count()
            q01, q99 = np.array([x.quantiles(np.array(SHARES)) for x in self._lattices]).T
            low, high = np.array([(x.low, x.high) for x in self._lattices]).T
            mean, std = self._mean, np.sqrt(self._squares / self.count)
        else:
            rows = np.concatenate(self._rows).astype(np.float64)
            q01, q99 = np.quantile(rows, SHARES, axis=0)
            mean, std, low, high = rows.mean(0), rows.std(0), rows.min(0), rows.max(0)
        found = {"mean": mean, "std": std, "min": low, "max": high, "q01": q01, "q99": q99}
        return Statistics(count=self.count, **{name: tuple(value.tolist()) for name, value in found.items()})

    def below(self, values: Sequence[float]) -> np.ndarray:
        """Share of the rows that are smaller than ``values`` (D,), per dimension."""
        if self._lattices:
            self._count()
            return np.array([x.below(value) for x, value in zip(self._lattices, values, strict=True)])
        return (np.concatenate(self._rows) < np.asarray(values)).mean(0)

    def _count(self) -> None:
        """From rows that wait to cells and moments."""
        if not self._waiting:
            return
        values, self._rows, self._waiting = np.concatenate(self._rows).astype(np.float64), [], 0
        values[np.abs(values) < SMALLEST] = 0
        low, high = values.min(0).tolist(), values.max(0).tolist()
        self._lattices = self._lattices or [Lattice(*ends) for ends in zip(low, high, strict=True)]
        for lattice, column, least, most in zip(self._lattices, values.T, low, high, strict=True):
            lattice.widen(least, most)
            lattice.add(column)
        mean = values.mean(0)
        self._join(len(values), mean, np.square(values - mean).sum(0))

    def _join(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        """Chan, Golub and LeVeque's merge of means and of sums of squared deviations (1979)."""
        total = self._counted + count
        apart = mean - self._mean
        self._mean = self._mean + apart * (count / total)
        self._squares = self._squares + squares + np.square(apart) * (self._counted * count / total)
        self._counted = total


def statistics_of(values: np.ndarray) -> Statistics:
    """Statistics of ``values`` (..., D); every leading entry counts once.

    Raises:
        UserError: there are no values, or some are not finite.
    """
    sketch = Sketch(values.shape[-1])
    sketch.add(values)
    return sketch.statistics()


def sketch_dataset(dataset: Dataset, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> dict[str, Sketch]:
    """Sketches of each vector feature over all frames of the dataset, or of some episodes.

    Args:
        dataset: an opened dataset.
        keys: features; default: all.
        episodes: episode indices; default: all. Give the training split, so that nothing is learnt from the other.
    """
    chosen = dataset.episodes if episodes is None else [dataset.episodes[i] for i in episodes]
    found = {key: Sketch(dataset.vectors[key].shape[1]) for key in keys or dataset.vectors}
    for key, sketch in found.items():
        for episode in chosen:
            sketch.add(dataset.vectors[key][episode.frames])
    return found


def compute_statistics(dataset: Dataset, keys: Sequence[str] | None = None, episodes: Sequence[int] | None = None) -> dict[str, Statistics]:
    """The statistics of ``sketch_dataset``."""
    return {key: sketch.statistics() for key, sketch in sketch_dataset(dataset, keys, episodes).items()}


def sketch_actions(sampler: ChunkSampler, counted: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> Sketch:
    """Actions as a network meets them: those of every chunk that ``sampler`` may draw; padding does not count.

    Args:
        counted: what actions (B, C, A) become with the state (B, S) at their chunk's start, such as ``Relative.apply``.
    """
    sketch: Sketch | None = None
    rows = max(1, BLOCK // sampler.chunk)
    for start in range(0, len(sampler.frames), rows):
        batch = sampler.gather(sampler.frames[start : start + rows])
        action = batch["action"] if counted is None else counted(batch["action"], batch["state"])
        sketch = sketch or Sketch(action.shape[-1])
        sketch.add(action[batch["mask"]])
    assert sketch is not None, "a sampler has at least one frame"
    return sketch


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

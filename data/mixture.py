"""Several datasets in one batch, by weight. As pure a function of (seed, step) as a sampler of one dataset."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from .order import Order, Shuffled
from .readers import Dataset
from .sampler import Batch, ChunkSampler, lanes_of, rows_of, split_episodes

BLOCK = 2**14
"""Consecutive samples (of a lane) in which each dataset has exactly its share, to the nearest sample and at least one."""


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset in a mixture.

    Attributes:
        dataset: an opened dataset.
        weight: its share of the samples, relative to the other weights; how long it is does not matter.
        episodes: indices of those to draw from; default: all.
    """

    dataset: Dataset
    weight: float = 1.0
    episodes: Sequence[int] | None = None


def split_sources(sources: Sequence[Source], held_out: float, seed: int = 0) -> tuple[list[Source], list[Source]]:
    """The same sources with their training episodes, and those with held-out ones, as ``split_episodes`` divides each."""
    pairs = [split_episodes(source.dataset, held_out, seed, source.episodes) for source in sources]
    train = [replace(source, episodes=ours) for source, (ours, _) in zip(sources, pairs, strict=True)]
    return train, [replace(source, episodes=out) for source, (_, out) in zip(sources, pairs, strict=True) if out]


class Mixture:
    """Draws from several datasets, each of which goes through its own epochs without replacement; see ``ChunkSampler``.

    A mixture of one dataset is that dataset's ``ChunkSampler``. Batches hold ``dataset`` int64 (B,) besides: which source a row is from,
    and ``index`` counts in it. State and action are in the units of each source; normalise by ``dataset``.

    Args:
        sources: at least one.
        chunk, batch_size, seed, action_key, foresight, stride, order: as for ``ChunkSampler``.

    Raises:
        UserError: a weight is not positive, or the sources differ in state or action dimensions.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        chunk: int,
        batch_size: int,
        seed: int,
        action_key: str = "action",
        foresight: int = 1,
        stride: int = 1,
        order: Order | None = None,
    ) -> None:
        if not sources or not all(math.isfinite(source.weight) and source.weight > 0 for source in sources):
            raise UserError("a mixture needs at least one dataset, and each needs a weight above 0; leave out those that are not wanted")
        order = order or Shuffled()
        self.sources = tuple(sources)
        self.datasets = tuple(source.dataset for source in sources)
        self.batch_size, self.seed, self.foresight = batch_size, seed, foresight
        self.samplers = tuple(
            ChunkSampler(s.dataset, chunk, batch_size, _seed(seed, i), action_key, foresight, s.episodes, stride, order)
            for i, s in enumerate(sources)
        )
        for key in ("observation.state", action_key):
            sizes = [dataset.vectors[key].shape[1] for dataset in self.datasets]
            if len(set(sizes)) > 1:
                named = ", ".join(f"{size} in {dataset.path}" for size, dataset in zip(sizes, self.datasets, strict=True))
                raise UserError(f"'{key}' has {named} dimensions; a mixture needs the same of each: map them to one robot first")
        self.lanes = min(sampler.lanes for sampler in self.samplers)
        self._counts = _quotas([source.weight for source in sources])
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of samples that each source has."""
        return tuple((self._counts / BLOCK).tolist())

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Datasets and frames (rows,) of this rank's part of the batch of ``step``, both int64."""
        rows = np.arange(self.batch_size)[rows_of(self.batch_size, rank, ranks)]
        lanes, places = lanes_of(rows, step, self.batch_size, self.lanes)
        blocks, inside = np.divmod(places, BLOCK)
        source, nth = np.empty((2, len(rows)), np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            source[here], nth[here] = (table[lanes[here], inside[here]] for table in self._block(block))
        index = np.empty(len(rows), np.int64)
        for i in np.unique(source).tolist():
            mine = source == i
            index[mine] = self.samplers[i].at(blocks[mine] * self._counts[i] + nth[mine], lanes[mine], self.lanes)
        return source, index

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of ``step``, or a rank's part of it; see ``ChunkSampler.batch``."""
        return self.collect(*self.draw(step, rank, ranks))

    def collect(self, dataset: np.ndarray, index: np.ndarray) -> Batch:
        """The samples that start at frames ``index`` (B,) of datasets ``dataset`` (B,)."""
        parts = {i: self.samplers[i].gather(index[dataset == i]) for i in np.unique(dataset).tolist()}
        batch: Batch = {"dataset": dataset}
        for key, value in next(iter(parts.values())).items():
            batch[key] = np.empty((len(index), *value.shape[1:]), value.dtype)
            for i, part in parts.items():
                batch[key][dataset == i] = part[key]
        return batch

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each lane and place of a block, (lanes, BLOCK): the source, and how many of that source stand before it."""
        if block not in self._blocks:
            while len(self._blocks) > 1:
                self._blocks.pop(next(iter(self._blocks)))
            tables = np.empty((2, self.lanes, BLOCK), np.int64)
            for lane in range(self.lanes):
                of = np.repeat(np.arange(len(self._counts)), self._counts)
                if len(self._counts) > 1:
                    of = np.random.default_rng((self.seed, lane, block, 1)).permutation(of)
                tables[0, lane] = of
                nth = np.arange(BLOCK) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
                tables[1, lane, np.argsort(of, kind="stable")] = nth
            self._blocks[block] = tables[0], tables[1]
        return self._blocks[block]


def _seed(seed: int, source: int) -> int:
    """The first source has the seed itself, so that a mixture of one draws as its sampler does."""
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0]) if source else seed


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Samples per block, by largest remainders; each source has one at least."""
    exact = BLOCK * np.asarray(weights) / sum(weights)
    counts = np.maximum(1, np.floor(exact).astype(np.int64))
    while (short := BLOCK - int(counts.sum())) != 0:
        counts[np.argmax(exact - counts) if short > 0 else np.argmax(counts)] += np.sign(short)
    return counts

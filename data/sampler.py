"""Batches of action chunks as a pure function of (seed, step): nothing to save, nothing to restore, the same on any rank.

A batch is global. Rank r of n takes the rows ``r B / n`` to ``(r + 1) B / n``, so the parts in the order of the ranks are the batch
of one process.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import UserError
from .order import Order, Shuffled, shares
from .readers import Dataset

Batch = dict[str, np.ndarray]


class Sampler(Protocol):
    """What draws samples from one dataset or several.

    Attributes:
        datasets: by the number that ``draw`` gives; batch_size: B, global.
    """

    datasets: tuple[Dataset, ...]
    batch_size: int
    foresight: int

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Datasets and frames (rows,) of this rank's part of the batch of ``step``, both int64."""

    def collect(self, dataset: np.ndarray, index: np.ndarray) -> Batch:
        """What the vectors hold for samples that were drawn."""


def rows_of(batch_size: int, rank: int, ranks: int) -> slice:
    """The rows of a global batch that a rank takes.

    Raises:
        UserError: the batch cannot be divided evenly.
    """
    if batch_size % ranks or not 0 <= rank < ranks:
        raise UserError(f"a global batch of {batch_size} cannot be divided among {ranks} processes; make batch_size a multiple of {ranks}")
    return slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)


def split_episodes(dataset: Dataset, held_out: float, seed: int = 0, episodes: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Episode indices for training and for validation, each task divided alike.

    Args:
        dataset: an opened dataset.
        held_out: share of each task's episodes that is held out, in [0, 1); rounded, but at least one where it is not 0.
        seed: of the choice.
        episodes: indices to divide; default: all.

    Raises:
        UserError: nothing would be left for training.
    """
    generator = np.random.default_rng(seed)
    among = dataset.episodes if episodes is None else [dataset.episodes[i] for i in sorted(episodes)]
    train: list[int] = []
    validation: list[int] = []
    for task in dataset.tasks:
        members = np.array([episode.index for episode in among if episode.task == task], np.int64)
        count = max(1, round(held_out * len(members))) if held_out > 0 and len(members) else 0
        chosen = generator.permutation(len(members))[:count]
        validation += members[chosen].tolist()
        train += np.delete(members, chosen).tolist()
    if not train:
        raise UserError(f"{dataset.path}: no episode is left for training when {held_out:.0%} of each task are held out; hold out less")
    return sorted(train), sorted(validation)


class ChunkSampler:
    """Draws frames without replacement, epoch by epoch, each with the chunk of actions that follows it.

    A batch near the end of an epoch is filled up from the next one, so that every batch has ``batch_size`` frames.

    Args:
        dataset: an opened dataset.
        chunk: actions per sample, C.
        batch_size: B, global.
        seed: of the order.
        action_key: the actions to learn: ``action``, or ``action.expert`` where noise was put on the executed ones.
        foresight: how many frames ahead ``future`` looks.
        episodes: episode indices; default: all.
        stride: frames between the starts of samples; 1 uses every frame.
        order: ``Shuffled()``, or ``Windowed()`` where frames come from videos.

    Steps that the dataset marks as ``disturbed`` are not learned: no sample begins where one comes before ``foresight``,
    and chunks end where one comes.

    Raises:
        UserError: the dataset has no such actions, or no frame is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        chunk: int,
        batch_size: int,
        seed: int,
        action_key: str = "action",
        foresight: int = 1,
        episodes: Sequence[int] | None = None,
        stride: int = 1,
        order: Order | None = None,
    ) -> None:
        for key in ("observation.state", action_key):
            if key not in dataset.vectors:
                raise UserError(f"{dataset.path} has no '{key}'; it has {', '.join(dataset.vectors)}")
        chosen = dataset.episodes if episodes is None else [dataset.episodes[i] for i in episodes]
        self.datasets: tuple[Dataset, ...] = (dataset,)
        self.chunk = chunk
        self.batch_size = batch_size
        self.seed = seed
        self.foresight = foresight
        self.frames = np.concatenate([np.arange(e.start, e.start + e.length, stride) for e in chosen] or [np.zeros(0, np.int64)])
        self._disturbed = _next(dataset.vectors["disturbed"][:, 0] > 0) if "disturbed" in dataset.vectors else None
        if self._disturbed is not None:
            self.frames = self.frames[self._disturbed[self.frames] >= self.frames + max(1, foresight)]
        if not len(self.frames):
            raise UserError(f"{dataset.path}: no frames to sample from; choose at least one episode")
        self._end = np.repeat([e.frames.stop - 1 for e in dataset.episodes], [e.length for e in dataset.episodes])
        self._state = dataset.vectors["observation.state"]
        self._action = dataset.vectors[action_key]
        self._steps = np.arange(chunk)
        self._order = order or Shuffled()
        self.lanes = self._order.lanes(batch_size, len(self.frames))
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.frames)

    def indices(self, step: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Frame indices (B / ranks,) of this rank's part of the batch of ``step``."""
        rows = np.arange(self.batch_size)[rows_of(self.batch_size, rank, ranks)]
        lane, place = lanes_of(rows, step, self.batch_size, self.lanes)
        return self.at(place, lane, self.lanes)

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """See ``Sampler``."""
        index = self.indices(step, rank, ranks)
        return np.zeros_like(index), index

    def collect(self, dataset: np.ndarray, index: np.ndarray) -> Batch:
        """See ``Sampler``."""
        return self.gather(index)

    def at(self, places: np.ndarray, lane: np.ndarray | int = 0, lanes: int = 1) -> np.ndarray:
        """Frames (n,) at ``places`` (n,) of the endless sequences of some of ``lanes``, which share each epoch's frames."""
        offset, share = shares(len(self.frames), np.asarray(lane), lanes)
        epochs, inside = np.divmod(places, share)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._epoch(first, lanes)[offset + inside]
        drawn = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            drawn[here] = self._epoch(epoch, lanes)[(offset + inside)[here]]
        return drawn

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of ``step``, or a rank's part of it.

        Returns:
            ``index`` int64 (B,); ``state`` float32 (B, S); ``action`` float32 (B, C, A), the last action of the episode
            repeated beyond its end; ``mask`` bool (B, C), False there and from a disturbance on; ``future`` int64 (B,),
            the frame ``foresight`` steps on, or the last of the episode.
        """
        return self.gather(self.indices(step, rank, ranks))

    def gather(self, index: np.ndarray) -> Batch:
        """The samples that start at frames ``index`` (B,), in the form of ``batch``."""
        end = self._end[index]
        steps = index[:, None] + self._steps
        mask = steps <= end[:, None]
        if self._disturbed is not None:
            mask &= steps < self._disturbed[index][:, None]
        return {
            "index": index,
            "state": self._state[index],
            "action": self._action[np.minimum(steps, end[:, None])],
            "mask": mask,
            "future": np.minimum(index + self.foresight, end),
        }

    def _epoch(self, epoch: int, lanes: int) -> np.ndarray:
        """The frames of an epoch, lane by lane; neighbouring epochs are kept, as a batch may touch two."""
        if (epoch, lanes) not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            generator = np.random.default_rng((self.seed, epoch))
            self._orders[epoch, lanes] = self._order.arrange(self.frames, self._end[self.frames], epoch, lanes, generator)
        return self._orders[epoch, lanes]


def lanes_of(rows: np.ndarray, step: int, batch_size: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Lane, and place in the lane's sequence, of rows of the batch of ``step``: lanes are equal runs of rows."""
    width = batch_size // lanes
    return rows // width, step * width + rows % width


def _next(marked: np.ndarray) -> np.ndarray:
    """For each place of a bool array (N,) the next one that is marked, itself included; out of reach where there is none."""
    places = np.where(marked, np.arange(len(marked)), np.iinfo(np.int64).max)
    return np.minimum.accumulate(places[::-1])[::-1]

"""Batches of action chunks as a pure function of (seed, step): nothing to save, nothing to restore, the same on any rank."""

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .readers import Dataset

Batch = dict[str, np.ndarray]


def split_episodes(dataset: Dataset, held_out: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Episode indices for training and for validation, each task divided alike.

    Args:
        dataset: an opened dataset.
        held_out: share of each task's episodes that is held out, in [0, 1); rounded, but at least one where it is not 0.
        seed: of the choice.

    Raises:
        UserError: nothing would be left for training.
    """
    generator = np.random.default_rng(seed)
    train: list[int] = []
    validation: list[int] = []
    for task in dataset.tasks:
        members = np.array([episode.index for episode in dataset.episodes if episode.task == task])
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
        batch_size: B.
        seed: of the order.
        action_key: the actions to learn: ``action``, or ``action.expert`` where noise was put on the executed ones.
        foresight: how many frames ahead ``future`` looks.
        episodes: episode indices; default: all.
        stride: frames between the starts of samples; 1 uses every frame.

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
    ) -> None:
        for key in ("observation.state", action_key):
            if key not in dataset.vectors:
                raise UserError(f"{dataset.path} has no '{key}'; it has {', '.join(dataset.vectors)}")
        chosen = dataset.episodes if episodes is None else [dataset.episodes[i] for i in episodes]
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
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.frames)

    def indices(self, step: int) -> np.ndarray:
        """Frame indices (B,) of the batch of ``step``."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = places // len(self.frames)
        drawn = np.empty(self.batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            drawn[here] = self._order(epoch)[places[here] % len(self.frames)]
        return drawn

    def batch(self, step: int) -> Batch:
        """The batch of ``step``.

        Returns:
            ``index`` int64 (B,); ``state`` float32 (B, S); ``action`` float32 (B, C, A), the last action of the episode
            repeated beyond its end; ``mask`` bool (B, C), False there and from a disturbance on; ``future`` int64 (B,),
            the frame ``foresight`` steps on, or the last of the episode.
        """
        return self.gather(self.indices(step))

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

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a batch touches at most neighbouring epochs at a time
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.frames)
        return self._orders[epoch]


def _next(marked: np.ndarray) -> np.ndarray:
    """For each place of a bool array (N,) the next one that is marked, itself included; out of reach where there is none."""
    places = np.where(marked, np.arange(len(marked)), np.iinfo(np.int64).max)
    return np.minimum.accumulate(places[::-1])[::-1]

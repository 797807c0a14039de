"""Chunks of actions as they are executed: one after the other, averaged where they overlap, faded into each other. numpy only, no I/O.

Actions are counted from the beginning of an episode: ``step`` is how many were executed before.
"""

from __future__ import annotations

import numpy as np


def checked(actions: np.ndarray, size: int | None = None) -> np.ndarray:
    """``actions`` as an array (C, A), C and A at least 1.

    Raises:
        ValueError: they are no chunk, are not finite, or have another size A than ``size``.
    """
    found = np.asarray(actions)
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiu":
        raise ValueError(f"a chunk is an array of numbers of shape (steps, dimensions), not {found.dtype} {found.shape}")
    if size is not None and found.shape[1] != size:
        raise ValueError(f"a chunk has {found.shape[1]} dimensions, and those before it had {size}")
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found).all(0)).tolist()
        raise ValueError(f"a chunk is not finite in dimensions {bad}")
    return found


def blend(old: np.ndarray, new: np.ndarray, steps: int) -> np.ndarray:
    """``new`` (C, A), faded in over its first ``steps`` steps from ``old`` (K, A), which begins at the same step.

    Of step k the new chunk has the share (k + 1) / (n + 1), n the smaller of ``steps``, K and C. Numbers are averaged as they are: of
    angles that jump at half a turn, or of quaternions, this is no rotation between both.
    """
    n = max(0, min(steps, len(old), len(new)))
    share = (np.arange(1, n + 1) / (n + 1))[:, None]
    out = np.array(new, dtype=np.result_type(new, np.float32))
    out[:n] = (1 - share) * old[:n] + share * new[:n]
    return out


class ChunkBroker:
    """Executes the first ``executed`` steps of a chunk, then asks for the next one; all of them where it is ``None``."""

    def __init__(self, executed: int | None = None) -> None:
        if executed is not None and executed < 1:
            raise ValueError(f"executed is {executed}; at least one step of a chunk must be")
        self.executed = executed
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self.left: np.ndarray = np.zeros((0, 0), np.float32)

    @property
    def due(self) -> bool:
        """Whether the next chunk is needed."""
        return not len(self.left)

    def put(self, actions: np.ndarray) -> None:
        """The next chunk (C, A); what is left of the one before is dropped."""
        self.left = checked(actions)[: self.executed]

    def next(self) -> np.ndarray:
        """The next action (A,).

        Raises:
            IndexError: a chunk is due.
        """
        if self.due:
            raise IndexError("no action is left; put the next chunk first")
        action, self.left = self.left[0], self.left[1:]
        return action


class TemporalEnsemble:
    """The weighted mean of what all chunks say about a step, as in ACT (Zhao et al. 2023, arXiv 2304.13705, algorithm 2).

    The weight of a prediction is ``exp(-decay i)``, i = 0 for the *oldest* chunk that covers the step. ``decay`` 0 is the plain mean, above
    0 favours older predictions (ACT's 0.01, lerobot's ``temporal_ensemble_coeff``), below 0 newer ones. Code that counts i from the newest
    means ``-decay``. Numbers are averaged as they are, see ``blend``.
    """

    def __init__(self, decay: float = 0.01) -> None:
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self._chunks: list[tuple[int, np.ndarray]] = []

    def add(self, actions: np.ndarray, step: int) -> None:
        """A chunk (C, A), whose first action is for ``step``; chunks are added in the order in which their observations were taken."""
        self._chunks.append((step, checked(actions, self._chunks[0][1].shape[1] if self._chunks else None)))

    def at(self, step: int) -> np.ndarray | None:
        """The action (A,) for ``step``, ``None`` where no chunk covers it. Chunks that end before it are forgotten."""
        self._chunks = [(first, chunk) for first, chunk in self._chunks if first + len(chunk) > step]
        said = [chunk[step - first] for first, chunk in self._chunks if first <= step]
        if not said:
            return None
        weights = np.exp(-self.decay * np.arange(len(said)))
        return (weights[:, None] * np.stack(said)).sum(0) / weights.sum()

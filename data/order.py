"""In which order an epoch's frames are drawn: a pure function of the frames, the epoch and its generator."""

import math
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from ..config import Strict

LANES = 16
"""Most lanes of a batch. Each process should get whole lanes: 1, 2, 4, 8 or 16 processes for a batch of a multiple of 16."""


def shares(frames: int, lane: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each lane begins among the ``frames`` of an epoch, and how many it has."""
    each, over = divmod(frames, lanes)
    return lane * each + np.minimum(lane, over), each + (lane < over)


class Shuffled(Strict):
    """Every order is as likely as any other."""

    kind: Literal["shuffled"] = "shuffled"

    def lanes(self, batch_size: int, frames: int) -> int:
        """One: no order is better for any process."""
        return 1

    def arrange(self, frames: np.ndarray, ends: np.ndarray, epoch: int, lanes: int, generator: np.random.Generator) -> np.ndarray:
        """The frames (N,), those of one lane after those of another, as ``shares`` divides them."""
        return generator.permutation(frames)


class Windowed(Strict):
    """Shuffled so that a video is decoded forward: episodes are cut into segments, these are shuffled and dealt to lanes, and within a
    lane samples are shuffled over the segments of one window at a time.

    A lane is a run of rows of every batch. Lanes share no segment but where they meet, so a process that takes whole lanes decodes no
    frame for another. Cuts move from epoch to epoch.

    Attributes:
        segment: frames of a video between two jumps.
        window: samples that are mixed at a time, over all lanes together: what a decoder must hold.
    """

    kind: Literal["windowed"] = "windowed"
    segment: PositiveInt = 32
    window: PositiveInt = 1024

    def lanes(self, batch_size: int, frames: int) -> int:
        """As many as divide the batch, and leave each lane a frame."""
        return math.gcd(batch_size, LANES) if frames >= LANES else 1

    def arrange(self, frames: np.ndarray, ends: np.ndarray, epoch: int, lanes: int, generator: np.random.Generator) -> np.ndarray:
        """The frames (N,), whose episodes end with ``ends`` (N,), those of one lane after those of another. Windows begin at multiples
        of their length in a lane's endless sequence, not anew in each epoch."""
        shift = generator.integers(0, self.segment)
        cuts = np.stack([ends, (frames + shift) // self.segment])
        starts = np.flatnonzero(np.r_[True, (np.diff(cuts) != 0).any(0)])
        lengths = np.diff(np.r_[starts, len(frames)])
        order = generator.permutation(len(starts))
        first = np.cumsum(lengths[order]) - lengths[order]
        mixed = frames[np.arange(len(frames)) + np.repeat(starts[order] - first, lengths[order])]
        offset, share = shares(len(frames), np.arange(lanes), lanes)
        lane = np.repeat(np.arange(lanes), share)
        window = (np.arange(len(frames)) - offset[lane] + epoch * share[lane]) // max(1, self.window // lanes)
        return mixed[np.lexsort([generator.random(len(frames)), window, lane])]


Order = Shuffled | Windowed

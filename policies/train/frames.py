"""What a policy in training sees: all frames in memory where they fit, else loaded ahead; and what is kept of frozen networks."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ...config import Strict
from ...data.loader import Loaded, Loader
from ...data.mixture import Mixture
from ...data.sampler import Batch, ChunkSampler
from ...vla import Spec
from .demonstrations import Demonstrations
from .launch import is_main, processes, rank
from .team import Part

Views = list[Tensor]
"""One uint8 tensor (B, F, H, W, 3) per camera, in the spec's order: its past, the oldest first."""


class Cache(Strict):
    """What is kept in memory where it fits.

    Attributes:
        variants: augmented copies of each frame's frozen prefix beside the plain one.
        limit_gb: above this size prefixes are computed in every step instead.
        images_gb: above this size images are decoded when they are needed, into a block of this size.
    """

    variants: NonNegativeInt = 1
    limit_gb: PositiveFloat = 8.0
    images_gb: PositiveFloat = 4.0


class InMemory:
    """Every frame of one dataset, decoded once.

    Attributes:
        images: per camera of the spec, uint8 (N, H, W, 3).
    """

    def __init__(self, demonstrations: Demonstrations, spec: Spec, foreseen: tuple[str, ...]) -> None:
        self.dataset, self.spec = demonstrations.datasets[0], spec
        self.images = {camera: self.dataset.load_images(camera) for camera in dict.fromkeys((*spec.cameras, *foreseen))}
        self.foreseen = foreseen
        self._starts = np.array([e.start for e in self.dataset.episodes])

    def __len__(self) -> int:
        """Frames of the dataset."""
        return len(self.dataset)

    def views(self, drawn: Batch, part: Part) -> Views:
        return self.at(drawn["index"])

    def future(self, drawn: Batch, part: Part) -> Tensor:
        return foreseen_frames([self.images[c][drawn["future"]] for c in self.foreseen])

    def at(self, frames: np.ndarray) -> Views:
        """What is seen at frames (B,) of the dataset."""
        history = self.spec.history
        first = self._starts[np.searchsorted(self._starts, frames, side="right") - 1]
        past = np.stack([np.maximum(frames - back * history.every, first) for back in range(history.frames - 1, -1, -1)], axis=1)
        return [torch.from_numpy(self.images[camera][past]) for camera in self.spec.cameras]


class Streamed:
    """Frames decoded ahead of the steps that need them (``data.Loader``). ``alone``: every process loads whole batches, not its rows."""

    def __init__(
        self, sampler: ChunkSampler | Mixture, spec: Spec, foreseen: tuple[str, ...], cache: Cache, workers: int, alone: bool = False
    ) -> None:
        history, self.spec, self.foreseen, self.ranks = spec.history, spec, foreseen, 1 if alone else processes()
        self.loader = Loader(
            sampler,
            spec.cameras,
            past=history.frames,
            every=history.every,
            future=foreseen,
            workers=workers or None,
            cache_bytes=int(cache.images_gb * 1e9),
            rank=0 if alone else rank(),
            ranks=self.ranks,
        )
        self._step, self._loaded = -1, cast(Loaded, None)

    def views(self, drawn: Batch, part: Part) -> Views:
        loaded, rows = self._load(part)
        return [torch.from_numpy(loaded.images[camera][rows]) for camera in self.spec.cameras]

    def future(self, drawn: Batch, part: Part) -> Tensor:
        loaded, rows = self._load(part)
        return foreseen_frames([loaded.future[c][rows] for c in self.foreseen])

    def close(self) -> None:
        """End the threads."""
        self.loader.close()

    def _load(self, part: Part) -> tuple[Loaded, slice]:
        """What this process sees in a step, of which a part takes some rows."""
        if self._step != part.step:
            self._step, self._loaded = part.step, self.loader.batch(part.step)
        parts = part.of // self.ranks
        return self._loaded, Part(part.step, part.number % parts, parts).rows(len(self._loaded.values["index"]))


def foreseen_frames(cameras: list[np.ndarray]) -> Tensor:
    """Frames (B, V, 3, Y, X) of cameras (B, H, W, 3) each; nothing, (0,), where there are none."""
    return torch.from_numpy(np.stack(cameras, axis=1)).permute(0, 1, 4, 2, 3) if cameras else torch.zeros(0)


def open_frames(
    demonstrations: Demonstrations, sampler: ChunkSampler | Mixture, spec: Spec, foreseen: tuple[str, ...], cache: Cache, workers: int
) -> InMemory | Streamed:
    """All frames in memory if they are of one dataset and fit, else a loader."""
    if fits(demonstrations, spec, foreseen, cache):
        return InMemory(demonstrations, spec, foreseen)
    return Streamed(sampler, spec, foreseen, cache, workers)


def fits(demonstrations: Demonstrations, spec: Spec, foreseen: tuple[str, ...], cache: Cache) -> bool:
    """Whether the frames are of one dataset and within the cache's limit."""
    dataset, cameras = demonstrations.datasets[0], dict.fromkeys((*spec.cameras, *foreseen))
    size = sum(dataset.frames(camera, [0]).nbytes for camera in cameras) * len(dataset)
    return len(demonstrations.datasets) == 1 and size <= cache.images_gb * 1e9


class Kept:
    """Something that was computed once for some frames of a dataset.

    Attributes:
        frames: which; values: (frames, ...), or one such row per augmented variant, (variants, frames, ...).
    """

    def __init__(self, total: int, frames: np.ndarray) -> None:
        self.frames = frames
        self._row = np.full(total, -1, np.int64)
        self._row[frames] = np.arange(len(frames))

    def holds(self, frames: np.ndarray) -> bool:
        """Whether all of ``frames`` are kept."""
        return bool((self._row[frames] >= 0).all())

    def rows(self, frames: np.ndarray) -> np.ndarray:
        """Rows of ``frames``, all of which must be kept."""
        return self._row[frames]


def parts_of(frames: np.ndarray, what: str, size: int = 64) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows and frames in parts of ``size``, with a progress bar on standard error."""
    starts = range(0, len(frames), size)
    for start in track(starts, f"encoding {what}", console=Console(stderr=True), transient=True, disable=not is_main()):
        yield slice(start, start + size), frames[start : start + size]

"""An opened dataset: vectors in memory, images decoded when asked for. Every format is read into this one shape."""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import UserError
from ..contract import Contract
from .images import ImageSource

DECODE_BLOCK = 64
"""Frames that one thread decodes at a time in ``Dataset.load_images``."""

DAMAGE = (OSError, ValueError, LookupError, TypeError, EOFError, SyntaxError, RuntimeError, struct.error, pa.ArrowException)
"""What PIL, pyarrow, PyAV, torchcodec and h5py raise over bytes that are not what they should be."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EpisodeInfo:
    """One episode: frames ``start`` to ``start + length - 1`` of the dataset, its instruction and recorded facts."""

    index: int
    start: int
    length: int
    task: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> slice:
        return slice(self.start, self.start + self.length)


class Dataset:
    """An opened dataset; made by ``open_dataset``.

    Attributes:
        path: the folder, or the file.
        contract: conventions of cameras, state and action; what the dataset does not say is ``None``.
        fps: frames (= control steps) per second; nan where the files do not say it (``Robot.view`` puts the mapping's rate here).
        cameras: camera names, without the prefix ``observation.images.``.
        episodes: in order; together they cover all N frames without gaps.
        vectors: feature name -> float32 (N, D): ``observation.state``, ``action``, ``action.expert``, ...
        tasks: instructions.
        task_index: int64 (N,), index into ``tasks`` of each frame.
        timestamps: float32 (N,), recorded seconds since the episode began, or ``None`` where none were recorded.
        sources: camera name -> its frames, in the order of ``cameras``.
    """

    def __init__(
        self,
        path: Path,
        contract: Contract,
        fps: float,
        sources: dict[str, ImageSource],
        episodes: list[EpisodeInfo],
        vectors: dict[str, np.ndarray],
        tasks: tuple[str, ...],
        task_index: np.ndarray,
        timestamps: np.ndarray | None = None,
    ) -> None:
        self.path = path
        self.contract = contract
        self.fps = fps
        self.cameras = tuple(sources)
        self.episodes = episodes
        self.vectors = vectors
        self.tasks = tasks
        self.task_index = task_index
        self.timestamps = timestamps
        self.sources = sources

    def __len__(self) -> int:
        """Number of frames N."""
        return len(self.task_index)

    @property
    def task_of_frame(self) -> list[str]:
        """The instruction of each frame."""
        return [self.tasks[i] for i in self.task_index]

    def frames(self, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode frames of one camera: uint8 (n, H, W, 3), RGB, in the order of ``indices``.

        Raises:
            UserError: there is no such camera, or a frame does not decode.
            IndexError: an index is not in [0, N).
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"frames {wanted.min()}..{wanted.max()} asked of a dataset of {len(self)} frames")
        return self._read(camera, wanted)

    def load_images(self, camera: str, threads: int | None = None, progress: Progress | None = None) -> np.ndarray:
        """Decode every frame of one camera once, in parallel: uint8 (N, H, W, 3). 96 px frames take 27 kB each.

        Args:
            camera: camera name.
            threads: default: one per processor core.
            progress: called with (frames done, N).
        """
        blocks = [np.arange(start, min(start + DECODE_BLOCK, len(self))) for start in range(0, len(self), DECODE_BLOCK)]
        first = self._read(camera, blocks[0])
        images = np.empty((len(self), *first.shape[1:]), np.uint8)
        images[blocks[0]] = first
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for block, decoded in zip(blocks[1:], pool.map(lambda block: self._read(camera, block), blocks[1:]), strict=True):
                images[block] = decoded
                if progress is not None:
                    progress(int(block[-1]) + 1, len(self))
        return images

    def source(self, camera: str) -> ImageSource:
        """Where the frames of one camera come from.

        Raises:
            UserError: there is no such camera.
        """
        if camera not in self.sources:
            raise UserError(f"{self.path} has no camera '{camera}'; it has {', '.join(self.cameras) or 'none'}")
        return self.sources[camera]

    def fill(self, camera: str, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Decode frames ``indices`` (n,) of one camera into ``rows`` (n,) of ``out`` (m, H, W, 3), uint8.

        Raises:
            UserError: there is no such camera, a frame has another size than ``out``, or does not decode.
        """
        source = self.source(camera)
        with self._told(camera, indices):
            source.fill(indices, out, rows)

    def _read(self, camera: str, indices: np.ndarray) -> np.ndarray:
        source = self.source(camera)
        if not len(indices):
            raise ValueError("no frames were asked for")
        with self._told(camera, indices):
            return source.read(indices)

    @contextmanager
    def _told(self, camera: str, indices: np.ndarray) -> Iterator[None]:
        """Damage as a sentence."""
        try:
            yield
        except DAMAGE as error:
            where = f"camera {camera} of {self.path}, frames {indices.min()} to {indices.max()}"
            raise UserError(f"{where}, cannot be decoded ({error}); copy the dataset again, or run `vla data repair`") from error

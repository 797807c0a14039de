"""Camera frames of a LeRobotDataset: PNG columns of parquet files, or videos. Only what is asked for is decoded.

A source has one method, ``read(indices) -> uint8 (n, H, W, 3)``, safe to call from several threads.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import UserError

ROW_GROUP_CACHE = 128 * 2**20
"""Bytes of encoded images that one PNG column keeps in memory."""


class ImageSource(Protocol):
    """Frames of one camera by their index in the dataset."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3), RGB, in the order of ``indices`` (n,)."""


class PngColumn:
    """Images that lie as PNG (or JPEG) bytes in a parquet column.

    Args:
        key: column name.
        files: parquet files in the order of the dataset.
        starts: index of each file's first frame in the dataset, int64 (files,).
    """

    def __init__(self, key: str, files: Sequence[Path], starts: np.ndarray) -> None:
        self.key = key
        self.files = list(files)
        self.starts = starts
        self._lock = threading.Lock()
        self._open: dict[int, tuple[pq.ParquetFile, np.ndarray]] = {}
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self._bytes = 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        order = np.argsort(indices, kind="stable")
        frames: np.ndarray | None = None
        for position in order:
            image = self._decode(int(indices[position]))
            if frames is None:
                frames = np.empty((len(indices), *image.shape), np.uint8)
            if image.shape != frames.shape[1:]:
                sizes = f"{image.shape} and {frames.shape[1:]}"
                raise UserError(f"{self.key} holds frames of different sizes, {sizes}; convert them to one size")
            frames[position] = image
        if frames is None:
            raise ValueError("no frames were asked for")
        return frames

    def _decode(self, index: int) -> np.ndarray:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        with self._lock:
            encoded = self._encoded(file, index - int(self.starts[file]))
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))

    def _encoded(self, file: int, row: int) -> bytes:
        """The bytes of one row; its row group stays in memory while there is room."""
        if file not in self._open:
            handle = pq.ParquetFile(self.files[file], memory_map=True)
            sizes = [handle.metadata.row_group(i).num_rows for i in range(handle.metadata.num_row_groups)]
            self._open[file] = (handle, np.cumsum([0, *sizes]))
        handle, edges = self._open[file]
        group = int(np.searchsorted(edges, row, side="right")) - 1
        if (file, group) not in self._groups:
            column = handle.read_row_group(group, columns=[f"{self.key}.bytes"], use_threads=False).column(self.key)
            self._groups[file, group] = pa.concat_arrays([chunk.field("bytes") for chunk in column.chunks])
            self._bytes += self._groups[file, group].nbytes
            while self._bytes > ROW_GROUP_CACHE and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end((file, group))
        encoded: bytes = self._groups[file, group][row - int(edges[group])].as_py()
        return encoded


@dataclass(frozen=True)
class Clip:
    """Where one episode's frames lie: frame ``i`` of the episode is shown at ``start + i / fps`` seconds in ``path``."""

    path: Path
    start: float


class VideoColumn:
    """Images that lie in mp4 files, many episodes in one.

    Args:
        clips: one per episode.
        starts: index of each episode's first frame in the dataset, int64 (episodes,).
        fps: frames per second.
    """

    def __init__(self, clips: Sequence[Clip], starts: np.ndarray, fps: float) -> None:
        self.clips = list(clips)
        self.starts = starts
        self.fps = fps
        self._decode = _decoder()

    def read(self, indices: np.ndarray) -> np.ndarray:
        episodes = np.searchsorted(self.starts, indices, side="right") - 1
        wanted: dict[Path, list[tuple[float, int]]] = {}
        for position, (index, episode) in enumerate(zip(indices, episodes, strict=True)):
            clip = self.clips[int(episode)]
            wanted.setdefault(clip.path, []).append((clip.start + (int(index) - int(self.starts[episode])) / self.fps, position))
        frames: np.ndarray | None = None
        for path, asked in wanted.items():
            asked.sort()
            decoded = self._decode(path, [time for time, _ in asked], self.fps)
            if frames is None:
                frames = np.empty((len(indices), *decoded.shape[1:]), np.uint8)
            frames[[position for _, position in asked]] = decoded
        if frames is None:
            raise ValueError("no frames were asked for")
        return frames


class _Decode(Protocol):
    def __call__(self, path: Path, times: list[float], fps: float) -> np.ndarray: ...


def _decoder() -> _Decode:
    """torchcodec where its FFmpeg libraries are installed, PyAV (which brings its own) otherwise."""
    try:
        import torchcodec  # type: ignore[import-untyped]  # noqa: F401  # raises RuntimeError or OSError without FFmpeg
    except (ImportError, RuntimeError, OSError):
        return decode_pyav
    return decode_torchcodec


def decode_torchcodec(path: Path, times: list[float], fps: float) -> np.ndarray:
    """Frames shown at ``times`` (ascending seconds) as uint8 (n, H, W, 3); half a frame later absorbs rounding.

    Raises:
        UserError: the video ends before a frame that is asked for.
    """
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-untyped]

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    if times[-1] + 0.5 / fps >= decoder.metadata.end_stream_seconds:
        raise UserError(f"{path} ends before {times[-1]:.3f} s: {CUT_OFF}")
    frames: np.ndarray = decoder.get_frames_played_at([time + 0.5 / fps for time in times]).data.numpy()
    return frames


def decode_pyav(path: Path, times: list[float], fps: float) -> np.ndarray:
    """Frames shown at ``times`` (ascending seconds) as uint8 (n, H, W, 3); decodes forward, and jumps where it pays.

    Raises:
        UserError: the video ends before a frame that is asked for.
    """
    import av

    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"  # frame threads would decode ahead of what is asked
        shown: av.VideoFrame | None = None
        flow = container.decode(stream)
        last = -np.inf
        for time in times:
            if time - last > JUMP_SECONDS:  # to the key frame before it
                container.seek(int(max(time - 0.5 / fps, 0) / stream.time_base), stream=stream)
                flow = container.decode(stream)
                shown = None
            while shown is None or shown.time < time - 0.5 / fps:
                shown = next(flow, None)
                if shown is None:
                    raise UserError(f"{path} ends before {time:.3f} s: {CUT_OFF}")
            frames.append(shown.to_ndarray(format="rgb24"))
            last = time
    return np.stack(frames)


CUT_OFF = "the recording was cut off; record these episodes again"
JUMP_SECONDS = 1.0
"""A gap longer than this is jumped over, a shorter one decoded through."""

"""Camera frames of a LeRobotDataset: PNG columns of parquet files, or videos. Only what is asked for is decoded.

Sources may be called from several threads.
"""

import io
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import UserError

if TYPE_CHECKING:
    import av

ROW_GROUP_CACHE = 128 * 2**20
"""Bytes of encoded images that one PNG column keeps in memory."""


class ImageSource(ABC):
    """Frames of one camera by their index in the dataset.

    Attributes:
        kind: how they are kept and what decodes them, in words.
        forward: whether neighbours are cheaper together than one by one.
    """

    kind: str
    forward: bool = False

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Height and width of one frame."""

    @abstractmethod
    def fill(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Decode frames ``indices`` (n,) into ``rows`` (n,) of ``out`` (m, H, W, 3), uint8, RGB.

        Raises:
            UserError: a frame has another size than ``out``, or cannot be decoded.
        """

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3), RGB, in the order of ``indices`` (n,), at least one."""
        out = np.empty((len(indices), *self.size(int(indices[0])), 3), np.uint8)
        self.fill(indices, out, np.arange(len(indices)))
        return out

    def check(self, where: object, size: tuple[int, ...], out: np.ndarray) -> None:
        """
        Raises:
            UserError: frames of ``size`` do not fit ``out``.
        """
        if size != out.shape[1:3]:
            said = f"{size[0]}x{size[1]} and {out.shape[1]}x{out.shape[2]}"
            raise UserError(f"{where} holds frames of different sizes, {said}; convert them to one size")


class PngColumn(ImageSource):
    """Images that lie as PNG (or JPEG) bytes in a parquet column.

    Args:
        key: column name.
        files: parquet files in the order of the dataset.
        starts: index of each file's first frame in the dataset, int64 (files,).
    """

    kind = "PNG, PIL"

    def __init__(self, key: str, files: Sequence[Path], starts: np.ndarray) -> None:
        self.key = key
        self.files = list(files)
        self.starts = starts
        self._lock = threading.Lock()
        self._open: dict[int, tuple[pq.ParquetFile, np.ndarray]] = {}
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self._bytes = 0

    def size(self, index: int) -> tuple[int, int]:
        with Image.open(io.BytesIO(self._bytes_of(index))) as image:
            return image.height, image.width

    def fill(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        for position in np.argsort(indices, kind="stable"):
            with Image.open(io.BytesIO(self._bytes_of(int(indices[position])))) as image:
                self.check(self.key, (image.height, image.width), out)
                out[rows[position]] = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))

    def _bytes_of(self, index: int) -> bytes:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        with self._lock:
            return self._encoded(file, index - int(self.starts[file]))

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


class VideoColumn(ImageSource):
    """Images that lie in mp4 files, many episodes in one. Files stay open for the next call; each thread has its own.

    Args:
        clips: one per episode.
        starts: index of each episode's first frame in the dataset, int64 (episodes,).
        fps: frames per second.
    """

    forward = True

    def __init__(self, clips: Sequence[Clip], starts: np.ndarray, fps: float) -> None:
        self.clips = list(clips)
        self.starts = starts
        self.fps = fps
        self.decoder = video_decoder()
        self.kind = f"video, {self.decoder.__name__}"
        self._lock = threading.Lock()
        self._idle: list[Decoder] = []

    def size(self, index: int) -> tuple[int, int]:
        with self._open(self.clips[int(np.searchsorted(self.starts, index, side="right")) - 1].path) as decoder:
            return decoder.size

    def fill(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        episodes = np.searchsorted(self.starts, indices, side="right") - 1
        wanted: dict[Path, list[tuple[float, int]]] = {}
        for index, episode, row in zip(indices.tolist(), episodes.tolist(), rows.tolist(), strict=True):
            clip = self.clips[episode]
            wanted.setdefault(clip.path, []).append((clip.start + (index - int(self.starts[episode])) / self.fps, row))
        for path, asked in wanted.items():
            asked.sort()
            with self._open(path) as decoder:
                self.check(path, decoder.size, out)
                decoder.read([time for time, _ in asked], out, [row for _, row in asked])

    @contextmanager
    def _open(self, path: Path) -> Iterator["Decoder"]:
        """A decoder that no other thread has; one that fails is not used again."""
        with self._lock:
            found = next((i for i, idle in enumerate(self._idle) if idle.path == path), None)
            decoder = None if found is None else self._idle.pop(found)
        decoder = decoder or self.decoder(path, self.fps)
        yield decoder
        with self._lock:
            self._idle.append(decoder)
            del self._idle[:-OPEN_FILES]


class Decoder(Protocol):
    """One open video.

    Attributes:
        size: height and width.
    """

    path: Path
    size: tuple[int, int]

    def __init__(self, path: Path, fps: float) -> None: ...

    def read(self, times: Sequence[float], out: np.ndarray, rows: Sequence[int]) -> None:
        """Write the frames shown at ``times`` (ascending seconds) into ``rows`` of ``out`` (n, H, W, 3), uint8.

        Raises:
            UserError: the video ends before a frame that is asked for.
        """


def video_decoder() -> type[Decoder]:
    """torchcodec where its FFmpeg libraries are installed, PyAV (which brings its own) otherwise."""
    try:
        import torchcodec  # type: ignore[import-untyped]  # noqa: F401  # raises RuntimeError or OSError without FFmpeg
    except (ImportError, RuntimeError, OSError):
        return Pyav
    return Torchcodec


class Torchcodec:
    """torchcodec's decoder. Half a frame later than asked absorbs rounding."""

    def __init__(self, path: Path, fps: float) -> None:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-untyped]

        self.path, self.fps = path, fps
        try:
            self._decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is not a video that can be read ({self._told(error)}): {CUT_OFF}") from None
        self.size = (self._decoder.metadata.height, self._decoder.metadata.width)

    def read(self, times: Sequence[float], out: np.ndarray, rows: Sequence[int]) -> None:
        if times[-1] + 0.5 / self.fps >= self._decoder.metadata.end_stream_seconds:
            raise UserError(f"{self.path} ends before {times[-1]:.3f} s: {CUT_OFF}")
        try:
            frames = self._decoder.get_frames_played_at([time + 0.5 / self.fps for time in times]).data
        except RuntimeError as error:
            raise UserError(f"{self.path} cannot be decoded at {times[0]:.3f} s ({self._told(error)}): {CUT_OFF}") from None
        out[list(rows)] = frames.numpy()

    @staticmethod
    def _told(error: Exception) -> str:
        """The first line, without the place in torchcodec's source that stands before it."""
        return re.sub(r"^.*\.cpp:\d+, ", "", str(error).split("\n")[0])


class Pyav:
    """PyAV: decodes forward, and jumps to a key frame where less lies between. One thread: callers have several of these instead, and
    threads of a decoder would work ahead of what is asked."""

    def __init__(self, path: Path, fps: float) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self.path, self.fps = path, fps
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise UserError(f"{path} is not a video that can be read ({error}): {CUT_OFF}") from None
        if self._stream.codec_context is None:
            raise UserError(f"{path} holds a video of a kind that cannot be decoded: {CUT_OFF}")
        self._stream.codec_context.thread_count = 1
        self.size = (self._stream.codec_context.height, self._stream.codec_context.width)
        self._reformatter = VideoReformatter()  # keeps the conversion that ``VideoFrame.to_ndarray`` sets up for each frame
        self._flow = self._container.decode(self._stream)
        self._shown: av.VideoFrame | None = None
        self._key: float | None = None
        self._between = 0.0

    def read(self, times: Sequence[float], out: np.ndarray, rows: Sequence[int]) -> None:
        import av

        half = 0.5 / self.fps
        height, width = self.size
        for time, row in zip(times, rows, strict=True):
            ahead = np.inf if self._shown is None else time - self._shown.time
            if ahead < -half or ahead > max(self._between, JUMP_FRAMES / self.fps):
                self._container.seek(int(max(time - half, 0) / self._stream.time_base), stream=self._stream)
                self._flow = self._container.decode(self._stream)
                before, self._shown, self._key = self._shown, None, None
            else:
                before = None
            try:
                while self._shown is None or self._shown.time < time - half:
                    self._shown = self._next(time)
                    if before is not None and ahead > 0 and self._shown.time <= before.time:  # no key frame lay between
                        self._between = max(self._between, ahead)
                rgb = self._reformatter.reformat(self._shown, format="rgb24").planes[0]
            except av.FFmpegError as error:
                raise UserError(f"{self.path} cannot be decoded at {time:.3f} s ({error}): {CUT_OFF}") from None
            out[row] = np.frombuffer(rgb, np.uint8).reshape(height, rgb.line_size)[:, : 3 * width].reshape(height, width, 3)

    def _next(self, time: float) -> "av.VideoFrame":
        """The next frame; learns how far apart key frames are."""
        frame = next(self._flow, None)
        if frame is None:
            self._shown = None
            raise UserError(f"{self.path} ends before {time:.3f} s: {CUT_OFF}")
        if frame.key_frame:
            self._between = max(self._between, 0.0 if self._key is None else frame.time - self._key)
            self._key = frame.time
        return frame


CUT_OFF = "the recording was cut off; record these episodes again"
JUMP_FRAMES = 4
"""Fewer frames are decoded through rather than jumped over: a jump costs about two. Videos with key frames further apart than that
are jumped in where a key frame lies between."""
OPEN_FILES = 16
"""Videos of one camera that stay open."""

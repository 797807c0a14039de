"""Writing LeRobotDataset v2.1 folders, one parquet file and one video per episode: what openpi, GR00T and older lerobot read.

As in ``writer.py`` an episode exists from the moment ``meta/info.json`` counts it; what a killed writer left beyond that is removed by
the next one. Layout and metadata are those that lerobot 0.6.1 expects in its ``convert_dataset_v21_to_v30.py``.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .contract import Contract
from .encode import png
from .features import episode_features, refuse_headless, vectors_of
from .files import append_json, lock, publish, room, vacant, write_file, write_json_lines
from .readers.metadata import CONTRACT_FILE, DEFAULT_COLUMNS, EPISODES_FILE, read_contract, read_info, read_json_lines
from .types import Episode

CHUNK = 1000
DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
LINES = ("episodes.jsonl", "episodes_stats.jsonl")
CRF = 18
"""Quality of x264: 35 dB on rendered 96 px frames, of which halved colour is most; every second frame is a key frame."""


class WriterV21:
    """Appends episodes to a v2.1 dataset; the arguments and errors of ``writer.DatasetWriter``. Videos are h264."""

    def __init__(self, path: str | Path, contract: Contract, fps: float, *, video: bool = False, robot: str | None = None) -> None:
        self.path, self.contract, self.fps, self.video, self.robot = Path(path), contract, int(fps), video, robot
        self._info: dict[str, Any] | None = None
        self._tasks: dict[str, int] = {}
        if self.fps != fps:
            raise UserError(f"a LeRobotDataset has a whole number of frames per second, not {fps}; convert at another rate")
        begun = (self.path / CONTRACT_FILE).is_file() or (self.path / "meta" / "info.json").is_file()
        if not begun and not vacant(self.path):
            raise UserError(f"{self.path} exists and is not a dataset; choose another folder, or remove it")
        refuse_headless(self.path)
        with room(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = lock(self.path)
            try:
                if (self.path / "meta" / "info.json").is_file():
                    self._info = read_info(self.path, ("v2.1",))
                    self._check()
                self._forget_uncounted()
                write_file(self.path / CONTRACT_FILE, json.dumps({"version": 1, "contract": contract.model_dump(mode="json")}, indent=1))
            except BaseException:
                self.close()
                raise

    def __len__(self) -> int:
        """Episodes that are published."""
        return int(self._info["total_episodes"]) if self._info else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, episode: Episode) -> int:
        """Publish one episode; when this returns it is on the disk and readable. Returns its index.

        Raises:
            UserError: as of ``DatasetWriter.add``.
        """
        if self._lock is None:
            raise ValueError(f"the writer of {self.path} is closed")
        odd = [f"{n} {i.shape[1]}x{i.shape[2]}" for n, i in episode.images.items() if self.video and (i.shape[1] % 2 or i.shape[2] % 2)]
        wrong = [f"h264 video needs an even height and width, unlike {', '.join(odd)}"] if odd else []
        before = self._info["features"] if self._info else None
        features = episode_features(episode, self.path, self.contract, self.video, before, wrong)
        try:
            with room(self.path):
                return self._append(episode, features)
        except BaseException:
            self.close()
            raise

    def _append(self, episode: Episode, features: dict[str, Any]) -> int:
        index, first = len(self), int(self._info["total_frames"]) if self._info else 0
        known = dict(self._tasks)
        task = known.setdefault(episode.task, len(known))
        columns = _columns(episode, index, first, task, self.fps)
        where = {"episode_chunk": index // CHUNK, "episode_index": index}
        self._publish(self.path / DATA.format(**where), lambda file: _write_table(file, columns, episode, self.video))
        if self.video:
            for camera, images in episode.images.items():
                file = self.path / VIDEO.format(video_key=f"observation.images.{camera}", **where)
                self._publish(file, lambda file, images=images: encode_video(file, images, self.fps))
        rows: list[dict[str, Any]] = [{"tasks": [episode.task], "length": len(episode)}, {"stats": _statistics(columns, episode)}]
        for name, row in zip(LINES, rows, strict=True):
            append_json(self.path / "meta" / name, {"episode_index": index, **row})
        if task == len(self._tasks):
            append_json(self.path / "meta" / "tasks.jsonl", {"task_index": task, "task": episode.task})
        append_json(self.path / EPISODES_FILE, {"episode_index": index, **episode.meta})
        info = self._next_info(features, index + 1, first + len(episode), len(known))
        write_file(self.path / "meta" / "info.json", json.dumps(info, indent=4))  # from here on it exists
        self._info, self._tasks = info, known
        return index

    def _publish(self, file: Path, write: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".tmp-{file.name}")
        write(temporary)
        publish(temporary, file)

    def _next_info(self, features: dict[str, Any], episodes: int, frames: int, tasks: int) -> dict[str, Any]:
        table = {key: {**feature, "shape": list(feature["shape"])} for key, feature in features.items()}
        for feature in table.values():
            if feature["dtype"] == "video":
                height, width, _ = feature["shape"]
                plain = {"video.height": height, "video.width": width, "video.fps": self.fps, "video.channels": 3, "has_audio": False}
                feature["info"] = plain | {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.is_depth_map": False}
        for key in DEFAULT_COLUMNS:
            table[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
        videos = sum(feature["dtype"] == "video" for feature in table.values())
        return {
            "codebase_version": "v2.1",
            "robot_type": self.robot,
            "total_episodes": episodes,
            "total_frames": frames,
            "total_tasks": tasks,
            "total_videos": videos * episodes,
            "total_chunks": -(-episodes // CHUNK),
            "chunks_size": CHUNK,
            "fps": self.fps,
            "splits": {"train": f"0:{episodes}"},
            "data_path": DATA,
            "video_path": VIDEO if videos else None,
            "features": table,
        }

    def _check(self) -> None:
        assert self._info is not None
        if int(self._info["fps"]) != self.fps:
            raise UserError(f"{self.path} has {self._info['fps']} frames per second, not {self.fps}; write into another folder")
        if (self._info.get("data_path"), self._info["chunks_size"]) != (DATA, CHUNK):
            raise UserError(f"{self.path} names its files otherwise than we do; convert into another folder")
        stored = read_contract(self.path)
        if stored is not None:
            self.contract.require(stored, "the recording", str(self.path))

    def _forget_uncounted(self) -> None:
        """Remove files and lines of episodes that ``info.json`` does not count; take up the tasks."""
        meta, count = self.path / "meta", len(self)
        for file in [*self.path.glob("data/*/*"), *self.path.glob("videos/*/*/*")]:
            digits = file.stem.removeprefix("episode_")
            if not digits.isdigit() or int(digits) >= count:
                file.unlink()
        for name, path in [*((name, meta / name) for name in LINES), ("facts", self.path / EPISODES_FILE)]:
            if count or path.is_file():
                rows = read_json_lines(path) if path.is_file() or name != "facts" else []
                write_json_lines(path, (row for row in rows if row.get("episode_index", count) < count))
        tasks = meta / "tasks.jsonl"
        if count or tasks.is_file():
            kept = [row for row in read_json_lines(tasks) if row["task_index"] < (self._info["total_tasks"] if self._info else 0)]
            write_json_lines(tasks, kept)
            self._tasks = {row["task"]: row["task_index"] for row in kept}


def encode_video(file: Path, images: np.ndarray, fps: int) -> None:
    """Write frames uint8 (T, H, W, 3) as h264 mp4."""
    import av

    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(CRF), "g": "2", "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        stream.thread_count = 1
        stream.time_base = Fraction(1, fps)
        for step, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = step, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _columns(episode: Episode, index: int, first: int, task: int, fps: int) -> dict[str, np.ndarray]:
    """All columns but images."""
    steps = np.arange(len(episode))
    return {
        **vectors_of(episode),
        "timestamp": (steps / fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full(len(steps), index),
        "index": first + steps,
        "task_index": np.full(len(steps), task),
    }


def _write_table(file: Path, columns: dict[str, np.ndarray], episode: Episode, video: bool) -> None:
    arrays: dict[str, pa.Array] = {}
    spec: dict[str, Any] = {}
    for camera, images in ({} if video else episode.images).items():
        with ThreadPoolExecutor(4) as pool:
            encoded = pa.array(pool.map(png, images), pa.binary())
        names = pa.array([f"frame_{step:06d}.png" for step in range(len(images))])
        key = f"observation.images.{camera}"
        arrays[key] = pa.StructArray.from_arrays([encoded, names], ["bytes", "path"])
        spec[key] = {"_type": "Image"}
    for key, values in columns.items():
        value = {"dtype": str(values.dtype), "_type": "Value"}
        if values.ndim == 1 or values.shape[1] == 1:
            arrays[key], spec[key] = pa.array(values.reshape(-1)), value
        else:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            arrays[key] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            spec[key] = {"feature": value, "length": values.shape[1], "_type": "Sequence"}
    table = pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": spec}})})
    pq.write_table(table, file, compression="snappy")


def _statistics(columns: dict[str, np.ndarray], episode: Episode) -> dict[str, Any]:
    """Per feature min, max, mean, std and count; images from every fourth pixel of some eight frames, in [0, 1], shape (3, 1, 1)."""
    found = {key: _row(values.reshape(len(values), -1).astype(np.float64), (-1,)) for key, values in columns.items()}
    for camera, images in episode.images.items():
        pixels = images[:: max(1, len(images) // 8), ::4, ::4]
        row = _row(pixels.reshape(-1, 3) / 255.0, (3, 1, 1))
        found[f"observation.images.{camera}"] = row | {"count": [len(pixels)]}
    return found


def _row(values: np.ndarray, shape: Iterable[int]) -> dict[str, Any]:
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {name: value.reshape(tuple(shape)).tolist() for name, value in statistics.items()} | {"count": [len(values)]}

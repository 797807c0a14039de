"""Recording LeRobotDataset v3.0 folders through lerobot, so that nothing is lost when the recorder is killed.

lerobot's own recorder keeps one parquet file open until ``finalize()``; killed before, all of it is unreadable. Here
each episode is finished in a staging folder and published by renaming whole files: frames first, ``meta/info.json``
last. Readers, ours and lerobot's, take from ``info.json`` how many episodes there are, so at every moment they see
exactly the published ones. The last parquet file of the folder is replaced by a longer one until it holds
``FILE_BYTES``, so that a dataset does not become thousands of small files.

Beside lerobot's files lie ``meta/triune.json`` (the contract) and ``meta/triune_episodes.jsonl`` (facts per episode).
"""

import fcntl
import importlib.util
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from ..errors import UserError
from .contract import Contract
from .files import publish, write_text
from .readers.lerobot import CONTRACT_FILE, DEFAULT_COLUMNS, EPISODES_FILE, read_contract, read_episode_rows, read_facts, read_info
from .types import Episode

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

FILE_BYTES = 4 * 2**20
"""A parquet file that has grown to this size is not written to again."""
PNG_LEVEL = 1
"""zlib level: 0.6 ms and 9.5 kB for a rendered 96 px frame; lerobot's 6 takes 1.5 ms for 9.0 kB."""
SMALLEST_VIDEO = 64
"""The AV1 encoder ends the whole process with a floating point exception at 16 pixels."""
STAGING = ".staging"
REPOSITORY = "local/triune"
"""lerobot asks for a hub id; a folder on disk never uses it."""


@dataclass
class _Tail:
    """The last parquet file of a series (``data`` or ``meta/episodes``): one row group per episode."""

    folder: Path
    chunk: int = 0
    file: int = 0
    groups: list[pa.Table] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"chunk-{self.chunk:03d}" / f"file-{self.file:03d}.parquet"

    def make_room(self, chunk_size: int) -> None:
        """Go on to the next file when this one is full."""
        if sum(group.nbytes for group in self.groups) >= FILE_BYTES:
            self.chunk, self.file = (self.chunk, self.file + 1) if self.file + 1 < chunk_size else (self.chunk + 1, 0)
            self.groups = []

    def add(self, group: pa.Table) -> None:
        """Publish the file with one more row group."""
        self.groups = [*self.groups, group.cast(self.groups[0].schema) if self.groups else group]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with pq.ParquetWriter(temporary, self.groups[0].schema, compression="snappy", use_dictionary=False) as writer:
            for group in self.groups:
                writer.write_table(group)
        publish(temporary, self.path)

    def load(self, episodes: int) -> None:
        """Read the file back without what a killed recorder left: rows of uncounted episodes, and later files."""
        for path in self.folder.glob("*/*.parquet"):
            if path.parent.name > self.path.parent.name or (path.parent == self.path.parent and path.name > self.path.name):
                path.unlink()
        table = pq.read_table(self.path)
        column = table.column("episode_index")
        self.groups = [table.filter(pc.equal(column, index)) for index in sorted(set(column.to_pylist())) if index < episodes]
        if sum(map(len, self.groups)) < len(table):
            self.write()


class DatasetWriter:
    """Appends episodes to a dataset; a new folder is begun, an existing one continued.

    Args:
        path: the dataset folder.
        contract: conventions of the episodes to come.
        fps: control rate in Hz, a whole number (lerobot stores no other).
        video: keep images as AV1 video instead of PNG. Smaller for large images; not bit for bit.
        robot: name of the robot type that is written into ``info.json``.

    Raises:
        UserError: the folder is something else, or a dataset of other features, rate or contract.
    """

    def __init__(self, path: str | Path, contract: Contract, fps: float, *, video: bool = False, robot: str | None = None) -> None:
        check_lerobot()
        self.path = Path(path)
        self.contract = contract
        self.fps = int(fps)
        self.video = video
        self.robot = robot
        self._stage = self.path / STAGING
        self._data = _Tail(self.path / "data")
        self._episodes = _Tail(self.path / "meta" / "episodes")
        self._state: _State | None = None
        self._count = 0
        if self.fps != fps:
            raise UserError(f"a LeRobotDataset has a whole number of frames per second, not {fps}; record at another control rate")
        begun = (self.path / CONTRACT_FILE).is_file() or (self.path / "meta" / "info.json").is_file()
        if self.path.exists() and not begun and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists and is not a dataset; choose another folder, or remove it")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = _lock(self.path)
        try:
            if (self.path / "meta" / "info.json").is_file():
                self._resume()
            else:  # also where a recorder died in its first episode
                for name in ("data", "videos", "meta"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            write_text(self.path / CONTRACT_FILE, json.dumps({"version": 1, "contract": contract.model_dump(mode="json")}, indent=1))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Episodes that are published: readable whatever happens now."""
        return self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the staging folder and let others write. All episodes were on the disk when ``add`` returned."""
        shutil.rmtree(self._stage, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, episode: Episode) -> int:
        """Publish one episode; when this returns it is on the disk and readable.

        Returns:
            its index.

        Raises:
            UserError: its cameras or sizes are not those of the contract, or of the episodes before.
        """
        if self._lock is None:
            raise ValueError(f"the writer of {self.path} is closed")
        features = self._features(episode)
        shutil.rmtree(self._stage, ignore_errors=True)
        state = self._state or _State()
        self._data.make_room(state.chunk_size)
        self._episodes.make_room(state.chunk_size)
        meta, frames = (self._encode_videos if self.video else self._encode_images)(episode, features, state)

        self._data.add(frames)
        for video in sorted((self._stage / "videos").rglob("*.mp4")):
            publish(video, self.path / video.relative_to(self._stage))
        row = pq.read_table(self._stage / self._episodes.path.relative_to(self.path))
        self._episodes.add(row)
        if (self._stage / "meta" / "tasks.parquet").is_file():
            publish(self._stage / "meta" / "tasks.parquet", self.path / "meta" / "tasks.parquet")
        publish(self._stage / "meta" / "stats.json", self.path / "meta" / "stats.json")
        with (self.path / EPISODES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"episode_index": self._count, **_plain(episode.meta)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        publish(self._stage / "meta" / "info.json", self.path / "meta" / "info.json")  # from here on it exists

        self._state = _State(meta.info, meta.tasks, meta.stats, _without_statistics(row))
        self._count += 1
        return self._count - 1

    def _encode_images(self, episode: Episode, features: dict[str, Any], state: "_State") -> tuple["LeRobotDatasetMetadata", pa.Table]:
        """Rows with PNG images in lerobot's schema.

        ``LeRobotDataset.add_frame`` writes each image to a file, reads it back for its statistics, and a third time to
        put it into the table: 0.6 s for 45 frames of two cameras, against 0.1 s here.
        """
        from lerobot.datasets import LeRobotDatasetMetadata
        from lerobot.datasets.compute_stats import compute_episode_stats, get_feature_stats
        from lerobot.datasets.feature_utils import get_hf_features_from_features

        meta = LeRobotDatasetMetadata.create(
            REPOSITORY, self.fps, features, robot_type=self.robot, root=self._stage, use_videos=False, metadata_buffer_size=1
        )
        state.restore(meta, self._data, self._episodes)
        meta.save_episode_tasks([episode.task])
        count, first = len(episode), meta.total_frames
        steps = np.arange(count)
        vectors: dict[str, np.ndarray] = {
            "timestamp": steps / self.fps,
            "frame_index": steps,
            "episode_index": np.full(count, self._count),
            "index": first + steps,
            "task_index": np.full(count, meta.get_task_index(episode.task)),
            **{key: value[:, 0] if value.shape[1] == 1 else value for key, value in _vectors(episode).items()},
        }
        columns: dict[str, pa.Array] = {}
        schema = get_hf_features_from_features(meta.features).arrow_schema
        statistics = compute_episode_stats(vectors, meta.features)
        names = [f"frame-{step:06d}.png" for step in steps]
        with ThreadPoolExecutor(4) as pool:
            for camera, images in episode.images.items():
                pixels = images[:: max(1, count // 8), ::4, ::4].transpose(0, 3, 1, 2)
                found = get_feature_stats(pixels, axis=(0, 2, 3), keepdims=True)
                key = f"observation.images.{camera}"
                statistics[key] = {name: value if name == "count" else np.squeeze(value / 255.0, axis=0) for name, value in found.items()}
                encoded = pa.array(pool.map(_png, images), pa.binary())
                columns[key] = pa.StructArray.from_arrays([encoded, pa.array(names)], ["bytes", "path"])
        for key, value in vectors.items():
            kind = schema.field(key).type
            flat = pa.array(np.ascontiguousarray(value).reshape(-1), kind if value.ndim == 1 else kind.value_type)
            columns[key] = flat if value.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, type=kind)
        frames = pa.table([columns[name] for name in schema.names], schema=schema)
        place = {"data/chunk_index": self._data.chunk, "data/file_index": self._data.file}
        meta.save_episode(self._count, count, [episode.task], statistics, place)
        meta.finalize()
        return meta, frames

    def _encode_videos(self, episode: Episode, features: dict[str, Any], state: "_State") -> tuple["LeRobotDatasetMetadata", pa.Table]:
        """Rows without images, which lerobot encodes into one mp4 file per camera."""
        from lerobot.datasets import LeRobotDataset
        from lerobot.utils.utils import SuppressProgressBars

        os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints 40 lines per file otherwise
        dataset = LeRobotDataset.create(
            REPOSITORY,
            self.fps,
            features,
            root=self._stage,
            robot_type=self.robot,
            video_backend="pyav",
            streaming_encoding=True,
            metadata_buffer_size=1,
        )
        state.restore(dataset.meta, self._data, self._episodes)
        dataset.clear_episode_buffer()
        columns = {f"observation.images.{camera}": images for camera, images in episode.images.items()} | _vectors(episode)
        with SuppressProgressBars():
            for step in range(len(episode)):
                dataset.add_frame({key: values[step] for key, values in columns.items()} | {"task": episode.task})
            dataset.save_episode()
            dataset.finalize()
        return dataset.meta, pq.read_table(self._stage / self._data.path.relative_to(self.path))

    def _features(self, episode: Episode) -> dict[str, Any]:
        """lerobot's feature table of an episode, after checking it."""
        features: dict[str, Any] = {}
        for camera, images in episode.images.items():
            features[f"observation.images.{camera}"] = {
                "dtype": "video" if self.video else "image",
                "shape": images.shape[1:],
                "names": ["height", "width", "channels"],
            }
        for key, value in _vectors(episode).items():
            known = {"observation.state": self.contract.state.names}.get(key, self.contract.action.names)
            names = list(known) if len(known) == value.shape[1] else [f"{key}_{i}" for i in range(value.shape[1])]
            features[key] = {"dtype": "float32", "shape": (value.shape[1],), "names": names}
        problems = [
            f"{key} has {len(value)} frames and action {len(episode)}"
            for key, value in [*episode.images.items(), *_vectors(episode).items()]
            if len(value) != len(episode)
        ]
        smallest = min(min(images.shape[1:3]) for images in episode.images.values())
        if self.video and smallest < SMALLEST_VIDEO:
            problems.append(f"AV1 video needs at least {SMALLEST_VIDEO} pixels each way and its images have {smallest}")
        if len(episode) < 2:
            problems.append("it has fewer than two frames")
        if sorted(episode.images) != sorted(self.contract.camera_names):
            problems.append(f"its cameras are {', '.join(episode.images)} and the contract's {', '.join(self.contract.camera_names)}")
        for name, value, vector in (("state", episode.state, self.contract.state), ("action", episode.action, self.contract.action)):
            if value.shape[1] != vector.size:
                problems.append(f"its {name} has {value.shape[1]} dimensions and the contract's {vector.size}")
        if self._state is not None:
            mine, stored = _kinds(features), _kinds(self._state.info.features)
            different = [key for key in sorted(mine | stored) if mine.get(key) != stored.get(key)]
            problems += [
                f"its {key} is {mine.get(key, 'absent')}, and {stored.get(key, 'absent')} in the episodes before" for key in different
            ]
        if problems:
            raise UserError(f"an episode does not fit {self.path}: {'; '.join(problems)}. Record it into another folder")
        return features

    def _resume(self) -> None:
        """Take up a dataset where its last published episode ends."""
        from lerobot.datasets.io_utils import load_info, load_stats, load_tasks

        info = read_info(self.path)
        stored = read_contract(self.path)
        if int(info["fps"]) != self.fps:
            raise UserError(f"{self.path} was recorded at {info['fps']} frames per second, not {self.fps}; record into another folder")
        if stored is not None:
            self.contract.require(stored, "the recording", str(self.path))
        self._count = int(info["total_episodes"])
        last = [row for row in read_episode_rows(self.path) if row["episode_index"] == self._count - 1][-1]
        for tail, name in ((self._data, "data"), (self._episodes, "meta/episodes")):
            tail.chunk, tail.file = last[f"{name}/chunk_index"], last[f"{name}/file_index"]
            tail.load(self._count)
        self._state = _State(load_info(self.path), load_tasks(self.path), load_stats(self.path), last)
        facts = read_facts(self.path)
        lines = [json.dumps({"episode_index": index, **facts[index]}) + "\n" for index in sorted(facts) if index < self._count]
        write_text(self.path / EPISODES_FILE, "".join(lines))


@dataclass
class _State:
    """What lerobot's metadata object must know of the episodes before."""

    info: Any = None
    tasks: Any = None
    stats: Any = None
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def chunk_size(self) -> int:
        return int(self.info.chunks_size) if self.info is not None else 1000

    def restore(self, meta: "LeRobotDatasetMetadata", data: _Tail, episodes: _Tail) -> None:
        """lerobot goes on in the file after the last one; it is told one less, so that it means our tail."""
        if self.info is None:
            return
        before = {"data/chunk_index": data.chunk, "data/file_index": data.file - 1}
        before |= {"meta/episodes/chunk_index": episodes.chunk, "meta/episodes/file_index": episodes.file - 1}
        meta.info, meta.tasks, meta.stats, meta.episodes = self.info, self.tasks, self.stats, [self.last | before]


def check_lerobot() -> None:
    """
    Raises:
        UserError: lerobot is not installed.
    """
    if importlib.util.find_spec("lerobot") is None:
        raise UserError("recording needs lerobot, which is not installed; run `pip install 'triune-vla[lerobot]'` (Python 3.12)")


def _lock(path: Path) -> int:
    """Hold the folder for one writer until the descriptor is closed or the process dies."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{path} is being written by another recorder; wait until it ends, or choose another folder") from None
    return descriptor


def _vectors(episode: Episode) -> dict[str, np.ndarray]:
    columns = {"observation.state": episode.state, "action": episode.action, **episode.extra}
    return {key: np.asarray(value, np.float32).reshape(len(value), -1) for key, value in columns.items()}


def _kinds(features: dict[str, Any]) -> dict[str, str]:
    """What of lerobot's feature table must not change between episodes."""
    return {key: f"{f['dtype']} {tuple(f['shape'])}" for key, f in features.items() if key not in DEFAULT_COLUMNS}


def _without_statistics(row: pa.Table) -> dict[str, Any]:
    plain: dict[str, Any] = row.select([name for name in row.column_names if not name.startswith("stats/")]).to_pylist()[0]
    return plain


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """``value`` with numpy's arrays and numbers as JSON's."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

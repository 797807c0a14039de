"""LeRobotDataset v3.0 folders, read with pyarrow: lerobot is not imported and the network is never touched.

Vectors (states, actions) are loaded once as contiguous float32 arrays; images are decoded when asked for. Episodes
that ``meta/info.json`` does not count yet are ignored: it is the last file that our writer replaces.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import UserError
from ..contract import Contract
from .columns import mapped
from .images import Clip, ImageSource, PngColumn, VideoColumn
from .metadata import (
    DEFAULT_COLUMNS,
    MEND,
    camera_name,
    derive_contract,
    read_contract,
    read_episode_rows,
    read_facts,
    read_info,
    read_parquet,
    read_tasks,
)

DECODE_BLOCK = 64
"""Frames that one thread decodes at a time in ``Dataset.load_images``."""

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
        path: the folder.
        contract: conventions of cameras, state and action; what the dataset does not say is ``None``.
        fps: frames (= control steps) per second.
        cameras: camera names, without the prefix ``observation.images.``.
        episodes: in order; together they cover all N frames without gaps.
        vectors: feature name -> float32 (N, D): ``observation.state``, ``action``, ``action.expert``, ...
        tasks: instructions.
        task_index: int64 (N,), index into ``tasks`` of each frame.
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
    ) -> None:
        self.path = path
        self.contract = contract
        self.fps = fps
        self.cameras = tuple(sources)
        self.episodes = episodes
        self.vectors = vectors
        self.tasks = tasks
        self.task_index = task_index
        self._sources = sources

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
            UserError: there is no such camera.
            IndexError: an index is not in [0, N).
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"frames {wanted.min()}..{wanted.max()} asked of a dataset of {len(self)} frames")
        return self.source(camera).read(wanted)

    def source(self, camera: str) -> ImageSource:
        """Where the frames of one camera come from.

        Raises:
            UserError: there is no such camera.
        """
        if camera not in self._sources:
            raise UserError(f"{self.path} has no camera '{camera}'; it has {', '.join(self.cameras) or 'none'}")
        return self._sources[camera]

    def load_images(self, camera: str, threads: int | None = None, progress: Progress | None = None) -> np.ndarray:
        """Decode every frame of one camera once, in parallel: uint8 (N, H, W, 3). 96 px frames take 27 kB each.

        Args:
            camera: camera name.
            threads: default: one per processor core.
            progress: called with (frames done, N).
        """
        source = self.source(camera)
        blocks = [np.arange(start, min(start + DECODE_BLOCK, len(self))) for start in range(0, len(self), DECODE_BLOCK)]
        first = source.read(blocks[0])
        images = np.empty((len(self), *first.shape[1:]), np.uint8)
        images[blocks[0]] = first
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for block, decoded in zip(blocks[1:], pool.map(source.read, blocks[1:]), strict=True):
                images[block] = decoded
                if progress is not None:
                    progress(int(block[-1]) + 1, len(self))
        return images


def open_dataset(path: str | Path) -> Dataset:
    """Open a LeRobotDataset v3.0 folder.

    Raises:
        UserError: the folder is missing, is not such a dataset, is of another version, is empty, or has broken files.
    """
    root = Path(path)
    info = read_info(root)
    total = int(info["total_episodes"])
    if total == 0:
        raise UserError(f"{root} holds no episodes yet; record some with `vla data record`")
    rows = sorted((row for row in read_episode_rows(root) if row["episode_index"] < total), key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(total)):
        raise UserError(f"{root}/meta/episodes describes {len(rows)} of the {total} episodes that meta/info.json counts; {MEND}")
    facts = read_facts(root)
    episodes: list[EpisodeInfo] = []
    for row in rows:
        start = episodes[-1].frames.stop if episodes else 0
        episodes.append(EpisodeInfo(row["episode_index"], start, int(row["length"]), row["tasks"][0], facts.get(row["episode_index"], {})))

    features: dict[str, dict[str, Any]] = info["features"]
    files, file_starts = _data_files(root, info, rows, episodes)
    names = [key for key, feature in features.items() if _is_vector(key, feature)]
    wanted, frames = [*names, "episode_index", "task_index"], episodes[-1].frames.stop
    columns = mapped(root, files, [wanted, total], frames, lambda: _read_columns(files, wanted, total, frames))
    if "action" not in names:
        raise UserError(f"{root} has no 'action' feature in meta/info.json; add one, or give a dataset of demonstrations")
    vectors = {key: columns[key] for key in names}
    tasks = read_tasks(root)
    sources: dict[str, ImageSource] = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            sources[camera_name(key)] = PngColumn(key, files, file_starts)
        elif feature["dtype"] == "video":
            clips = [_clip(root, info, row, key) for row in rows]
            sources[camera_name(key)] = VideoColumn(clips, np.array([episode.start for episode in episodes]), float(info["fps"]))
    contract = read_contract(root) or derive_contract(info)
    return Dataset(root, contract, float(info["fps"]), sources, episodes, vectors, tasks, columns["task_index"].astype(np.int64)[:, 0])


def inspect(path: str | Path) -> dict[str, Any]:
    """What a dataset holds, ready for JSON: sizes, cameras, features, tasks, ranges per dimension, doubts."""
    dataset = open_dataset(path)
    contract = dataset.contract
    named = {"observation.state": contract.state.names, "action": contract.action.names, "action.expert": contract.action.names}
    lengths = [episode.length for episode in dataset.episodes]
    ranges = {}
    for key, values in dataset.vectors.items():
        names = named.get(key, tuple(f"{key}_{i}" for i in range(values.shape[1])))
        ranges[key] = [
            {"name": name, "min": float(low), "max": float(high), "mean": float(mean), "constant": bool(low == high)}
            for name, low, high, mean in zip(names, values.min(0), values.max(0), values.mean(0), strict=True)
        ]
    fields: list[tuple[str, object]] = [("rate", contract.rate), ("render", contract.render)]
    fields += [(f"camera {camera.name} flip", camera.flip) for camera in contract.cameras]
    for part, vector in (("state", contract.state), ("action", contract.action)):
        fields += [(f"{part} {name}", value) for name, value in (("units", vector.units), ("frame", vector.frame), ("mode", vector.mode))]
    return {
        "path": str(dataset.path),
        "episodes": len(dataset.episodes),
        "frames": len(dataset),
        "fps": dataset.fps,
        "seconds": len(dataset) / dataset.fps,
        "episode_length": {"min": min(lengths), "mean": float(np.mean(lengths)), "max": max(lengths)},
        "cameras": [camera.model_dump(mode="json") for camera in contract.cameras],
        "tasks": {task: sum(episode.task == task for episode in dataset.episodes) for task in dataset.tasks},
        "worlds": sorted({str(episode.meta["world"]) for episode in dataset.episodes if "world" in episode.meta}),
        "features": {key: int(values.shape[1]) for key, values in dataset.vectors.items()},
        "ranges": ranges,
        "unknown": [name for name, value in fields if value is None],
    }


def _is_vector(key: str, feature: dict[str, Any]) -> bool:
    return key not in DEFAULT_COLUMNS and feature["dtype"].startswith("float") and len(feature["shape"]) == 1


def _data_files(root: Path, info: dict[str, Any], rows: list[dict[str, Any]], episodes: list[EpisodeInfo]) -> tuple[list[Path], np.ndarray]:
    """The data files in order, and the index of each one's first frame."""
    files: list[Path] = []
    starts: list[int] = []
    for row, episode in zip(rows, episodes, strict=True):
        file = root / info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        if not files or files[-1] != file:
            files.append(file)
            starts.append(episode.start)
    return files, np.array(starts)


def _read_columns(files: list[Path], names: list[str], episodes: int, frames: int) -> dict[str, np.ndarray]:
    """Columns as float32 (N, D), of the frames that belong to counted episodes."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for file in files:
        table = read_parquet(file, names)
        keep = table.column("episode_index").to_numpy() < episodes
        for name in names:
            column = table.column(name).combine_chunks()
            flat = column if pa.types.is_primitive(column.type) else column.flatten()
            parts[name].append(flat.to_numpy(zero_copy_only=False).reshape(len(keep), -1)[keep].astype(np.float32))
    found = sum(map(len, parts["episode_index"]))
    if found != frames:
        raise UserError(f"{files[0].parents[1]} holds {found} frames where meta/episodes counts {frames}; {MEND}")
    return {name: np.ascontiguousarray(np.concatenate(arrays)) for name, arrays in parts.items()}


def _clip(root: Path, info: dict[str, Any], row: dict[str, Any], key: str) -> Clip:
    place = {name: row[f"videos/{key}/{name}_index"] for name in ("chunk", "file")}
    file = root / info["video_path"].format(video_key=key, chunk_index=place["chunk"], file_index=place["file"])
    if not file.is_file():
        raise UserError(f"{file} is missing; copy the dataset again, with its videos")
    return Clip(file, float(row[f"videos/{key}/from_timestamp"]))

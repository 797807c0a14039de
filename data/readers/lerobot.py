"""LeRobotDataset folders, read with pyarrow: lerobot is not imported and the network is never touched.

Vectors (states, actions) are loaded once as contiguous float32 arrays; images are decoded when asked for. Episodes
that ``meta/info.json`` does not count yet are ignored: it is the last file that our writers replace.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import UserError
from .columns import mapped
from .dataset import Dataset, EpisodeInfo
from .images import ImageSource, PngColumn, VideoColumn
from .layouts import Place, layout_v2, layout_v3
from .metadata import DEFAULT_COLUMNS, MEND, camera_name, derive_contract, read_contract, read_facts, read_info, read_parquet

VERSIONS = ("v2.0", "v2.1", "v3.")


def open_lerobot(root: Path) -> Dataset:
    """Open a LeRobotDataset v2.0, v2.1 or v3.0 folder.

    Raises:
        UserError: the folder is missing, is not such a dataset, is of another version, is empty, or has broken files.
    """
    info = read_info(root, VERSIONS)
    if info["total_episodes"] == 0:
        raise UserError(f"{root} holds no episodes yet; record some with `vla data record`")
    places, tasks = (layout_v3 if info["codebase_version"].startswith("v3.") else layout_v2)(root, info)
    facts = read_facts(root)
    episodes: list[EpisodeInfo] = []
    for index, place in enumerate(places):
        start = episodes[-1].frames.stop if episodes else 0
        episodes.append(EpisodeInfo(index, start, place.length, place.task, facts.get(index, {})))

    features: dict[str, dict[str, Any]] = info["features"]
    files, file_starts = _data_files(places, episodes)
    widths = {key: feature["shape"][0] for key, feature in features.items() if _is_vector(key, feature)}
    if not widths:
        raise UserError(f"{root} has neither states nor actions in meta/info.json; give a dataset of demonstrations")
    scalars = [key for key in ("timestamp", "episode_index", "task_index") if key != "timestamp" or key in features]
    wanted, frames = widths | dict.fromkeys(scalars, 1), episodes[-1].frames.stop
    columns = mapped(root, files, [wanted, len(episodes)], frames, lambda: _read_columns(files, wanted, episodes))
    vectors = {key: columns[key] for key in widths}
    sources: dict[str, ImageSource] = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            sources[camera_name(key)] = PngColumn(key, files, file_starts)
        elif feature["dtype"] == "video":
            clips = [place.clips[key] for place in places]
            sources[camera_name(key)] = VideoColumn(clips, np.array([episode.start for episode in episodes]), float(info["fps"]))
    contract = read_contract(root) or derive_contract(info)
    task_index = _positions(columns["task_index"][:, 0], list(tasks), root)
    timestamps = columns["timestamp"][:, 0] if "timestamp" in columns else None
    return Dataset(root, contract, float(info["fps"]), sources, episodes, vectors, tuple(tasks.values()), task_index, timestamps)


def _is_vector(key: str, feature: dict[str, Any]) -> bool:
    return key not in DEFAULT_COLUMNS and feature["dtype"].startswith("float") and len(feature["shape"]) == 1


def _data_files(places: list[Place], episodes: list[EpisodeInfo]) -> tuple[list[Path], np.ndarray]:
    """The data files in order, and the index of each one's first frame."""
    files: list[Path] = []
    starts: list[int] = []
    for place, episode in zip(places, episodes, strict=True):
        if not files or files[-1] != place.data:
            files.append(place.data)
            starts.append(episode.start)
    return files, np.array(starts)


def _read_columns(files: list[Path], widths: dict[str, int], episodes: list[EpisodeInfo]) -> dict[str, np.ndarray]:
    """Columns as float32 (N, D), of the frames that belong to counted episodes."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    for file in files:
        table = read_parquet(file, list(widths))
        keep = _flat(table, "episode_index", 1, file)[:, 0] < len(episodes)
        for name, width in widths.items():
            with np.errstate(over="ignore"):  # such numbers become infinite, which ``inspect`` reports
                parts[name].append(_flat(table, name, width, file)[keep].astype(np.float32))
    columns = {name: np.ascontiguousarray(np.concatenate(arrays)) for name, arrays in parts.items()}
    found, frames = columns["episode_index"][:, 0], episodes[-1].frames.stop
    if len(found) != frames:
        raise UserError(f"{files[0].parents[1]} holds {len(found)} frames where the metadata counts {frames}; {MEND}")
    expected = np.repeat(np.arange(len(episodes), dtype=np.float32), [episode.length for episode in episodes])
    if not np.array_equal(found, expected):
        raise UserError(f"{files[0].parents[1]} holds the episodes in another order or of other lengths than the metadata; {MEND}")
    return columns


def _flat(table: pa.Table, name: str, width: int, file: Path) -> np.ndarray:
    """A column as an array of shape (rows, width)."""
    try:
        column = table.column(name).combine_chunks()
        flat = column if pa.types.is_primitive(column.type) else column.flatten()
        return flat.to_numpy(zero_copy_only=False).reshape(len(table), width)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException):
        raise UserError(f"{file} does not hold '{name}' with {width} numbers in each row as meta/info.json says; {MEND}") from None


def _positions(found: np.ndarray, known: list[int], root: Path) -> np.ndarray:
    """Positions in ``known`` (ascending) of the task indices ``found`` (N,): int64 (N,)."""
    indices = np.array(known, np.int64)
    places = np.minimum(np.searchsorted(indices, found), len(indices) - 1)
    if not np.array_equal(indices[places], found):
        raise UserError(f"{root} has frames of tasks that its list of tasks in meta/ does not name; {MEND}")
    return places.astype(np.int64)

"""Unfinalised and truncated LeRobotDataset v3.0 recordings made whole again: every episode that is complete is kept.

lerobot's recorder counts episodes in ``meta/info.json`` at once, but buffers their metadata and closes its parquet files only in
``finalize()``. Killed before, it leaves data files without a footer (``salvage`` reads them), episodes that ``meta/episodes`` does not
name (their lengths and tasks are in the rows, their places in the videos follow from the order), and numbers that do not agree.
The repaired dataset is a new folder that appears when it is complete; the old one is never changed.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..errors import UserError
from .encode import REPOSITORY, image_statistics
from .files import atomic_folder, write_json_lines
from .readers import Dataset, open_dataset
from .readers.dataset import DAMAGE
from .readers.images import Clip, VideoColumn
from .readers.metadata import CONTRACT_FILE, DEFAULT_COLUMNS, EPISODES_FILE, read_facts, read_info, read_parquet, read_tasks, rows_of
from .salvage import read_row_groups
from .tapes import Tapes, frames_in
from .writer import check_lerobot

FILE_BYTES = 100 * 2**20
"""A data file of this size is not written to again, as in lerobot."""
SAMPLES = 8
"""Frames of each camera of an episode that are decoded, for the statistics and as a proof."""


@dataclass(frozen=True)
class Lost:
    """An episode that cannot be kept, by its number in the broken dataset, and why."""

    episode: int
    why: str


def repair(path: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Make a dataset of all whole episodes of a broken one.

    Args:
        path: a LeRobotDataset v3.0 folder.
        out: the repaired dataset. Default: it takes the place of the broken one, which stays beside it as ``<path>.broken``.

    Returns:
        ``path`` of the repaired dataset, ``backup`` (or ``None``), ``changed`` (False: nothing was broken and nothing was written),
        ``kept`` (episodes) and ``lost`` (``episode`` and ``why`` of each).

    Raises:
        UserError: the folder is of another format, its ``meta/info.json`` is gone, it has no whole episode, or ``out`` exists.
    """
    check_lerobot()
    root = Path(path)
    info = read_info(root)
    if (whole := _whole(root)) is not None:
        return {"path": str(root), "backup": None, "changed": False, "kept": len(whole.episodes), "lost": []}
    backup = None if out is not None else _free(root)
    target = Path(out) if out is not None else root.with_name(f"{root.name}.repaired")
    if target.exists() and out is not None:
        raise UserError(f"{target} exists already; choose another folder, or remove it")
    with atomic_folder(target) as folder:
        kept, lost = _rebuild(root, info, folder)
        if not kept:
            reasons = "; ".join(sorted({entry.why for entry in lost})) or "it has no data files"
            raise UserError(f"{root} holds no whole episode ({reasons}); record it anew")
        if len(open_dataset(folder).episodes) != kept:
            raise UserError(f"{root}: what was saved does not read back; keep the folder and report this")
    if backup is not None:
        os.rename(root, backup)
        os.rename(target, root)
    place = {"path": str(target if backup is None else root), "backup": str(backup) if backup else None}
    return place | {"changed": True, "kept": kept, "lost": [asdict(entry) for entry in lost]}


def _whole(root: Path) -> Dataset | None:
    """The opened dataset, if nothing is wrong with it: it opens, all rows are counted, and every video has all frames."""
    try:
        dataset = open_dataset(root)
        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in root.glob("data/*/*.parquet"))
    except (UserError, pa.ArrowException, OSError, ValueError):
        return None
    if rows != len(dataset):
        return None
    lengths = [episode.length for episode in dataset.episodes]
    for source in dataset.sources.values():
        if isinstance(source, VideoColumn):
            counts = {clip.path: frames_in(clip.path) for clip in source.clips}
            ends = [round(clip.start * dataset.fps) + length for clip, length in zip(source.clips, lengths, strict=True)]
            if any(end > counts[clip.path] for clip, end in zip(source.clips, ends, strict=True)):
                return None
    return dataset


def _free(root: Path) -> Path:
    """A name for the broken folder beside ``root``."""
    names = (root.with_name(f"{root.name}.broken{'' if i == 0 else f'-{i}'}") for i in range(1000))
    return next(name for name in names if not name.exists())


def _rebuild(root: Path, info: dict[str, Any], folder: Path) -> tuple[int, list[Lost]]:
    """Write all whole episodes of ``root`` into ``folder``: how many, and what was lost."""
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.datasets.feature_utils import get_hf_features_from_features

    features = {key: {**feature, "shape": tuple(feature["shape"])} for key, feature in info["features"].items()}
    schema = get_hf_features_from_features(features).arrow_schema
    own = {key: feature for key, feature in features.items() if key not in DEFAULT_COLUMNS}
    videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
    rows, tasks = _known_rows(root), _known_tasks(root)
    tapes = {key: Tapes(root, info, key, rows) for key in videos}
    stage = folder / ".staging"
    meta = LeRobotDatasetMetadata.create(
        REPOSITORY, int(info["fps"]), own, robot_type=info.get("robot_type"), root=stage, use_videos=bool(videos)
    )  # fmt: skip
    data = _DataFiles(folder, schema)
    facts, kept_facts = read_facts(root), []
    lost: list[Lost] = []
    seen: set[int] = set()
    kept = frames = 0
    for table, sure in _episodes(root, schema, info):
        number, length = int(table["episode_index"][0].as_py()), len(table)
        seen.add(number)
        row = rows.get(number)
        clips = {key: tape.place(number, length) for key, tape in tapes.items()}
        why = _why_not(table, row, sure) or next((f"its video of {key} is cut off" for key, clip in clips.items() if clip is None), None)
        statistics = None if why else _statistics(table, features, {key: clip for key, clip in clips.items() if clip}, float(info["fps"]))
        if why or statistics is None:
            lost.append(Lost(number, why or "its frames do not decode"))
            continue
        task = tasks.get(int(table["task_index"][0].as_py())) or (
            row["tasks"][0] if row else f"unknown task {table['task_index'][0].as_py()}"
        )
        meta.save_episode_tasks([task])
        place: dict[str, Any] = {}
        for key, clip in clips.items():
            assert clip is not None
            chunk, file = tapes[key].numbers[clip.path]
            ends = {"from_timestamp": clip.start, "to_timestamp": clip.start + length / info["fps"]}
            place |= {f"videos/{key}/{name}": value for name, value in {"chunk_index": chunk, "file_index": file, **ends}.items()}
        index = {"episode_index": np.full(length, kept), "index": frames + np.arange(length)}
        index["task_index"] = np.full(length, meta.get_task_index(task))
        place |= data.add(table, index)
        meta.save_episode(kept, length, [task], statistics, place)
        kept_facts.append({"episode_index": kept, **facts.get(number, {})})
        kept, frames = kept + 1, frames + length
    data.close()
    meta.finalize()
    if kept:
        os.rename(stage / "meta", folder / "meta")
    shutil.rmtree(stage)
    lost += [Lost(number, "its frames are gone") for number in range(info["total_episodes"]) if number not in seen]
    if not kept:
        return 0, lost
    for tape in tapes.values():
        tape.copy(root, folder)
    if (root / CONTRACT_FILE).is_file():
        shutil.copyfile(root / CONTRACT_FILE, folder / CONTRACT_FILE)
    if facts:
        write_json_lines(folder / EPISODES_FILE, kept_facts)
    statistics_file = folder / "meta" / "stats.json"  # lerobot's order changes from process to process
    statistics_file.write_text(json.dumps(json.loads(statistics_file.read_text()), indent=4, sort_keys=True))
    return kept, sorted(lost, key=lambda entry: entry.episode)


def _known_rows(root: Path) -> dict[int, dict[str, Any]]:
    """Rows of the readable files of ``meta/episodes``, by episode; what is not readable is found out from the data."""
    found: dict[int, dict[str, Any]] = {}
    for file in sorted(root.glob("meta/episodes/*/*.parquet")):
        try:
            columns = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
            rows = rows_of(read_parquet(file, columns), file)
        except (UserError, pa.ArrowException, OSError, ValueError):
            continue
        found |= {row["episode_index"]: row for row in rows if isinstance(row.get("episode_index"), int) and row.get("tasks")}
    return found


def _known_tasks(root: Path) -> dict[int, str]:
    try:
        return read_tasks(root)
    except UserError:
        return {}


def _episodes(root: Path, schema: pa.Schema, info: dict[str, Any]) -> Iterator[tuple[pa.Table, bool]]:
    """The rows of each episode in the data files, and whether they are surely all that were recorded of it.

    A row group that is whole in a cut file holds one whole episode where lerobot's recorder wrote it; where a tool wrote several into
    one group, the last of a cut file may go on in the part that is lost.
    """
    shapes = {key: int(np.prod(feature["shape"])) for key, feature in info["features"].items()}
    entries = [per_row for field in schema for per_row in _leaves(field, shapes)]
    for file in sorted(root.glob("data/*/*.parquet")):
        groups, complete = read_row_groups(file, schema, entries)
        groups = [group.select(schema.names).cast(schema) for group in groups if set(schema.names) <= set(group.column_names)]
        if not groups or not sum(map(len, groups)):
            continue
        edges = set(np.cumsum([len(group) for group in groups]).tolist())
        table = pa.concat_tables(groups)
        numbers = table["episode_index"].to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            alone = end in edges and (start == 0 or start in edges)
            yield table.slice(start, end - start), complete or end < len(numbers) or alone


def _leaves(field: pa.Field, shapes: dict[str, int]) -> list[int | None]:
    """Numbers per row of each leaf column of a field."""
    if pa.types.is_struct(field.type):
        return [1] * field.type.num_fields
    if pa.types.is_primitive(field.type) or pa.types.is_string(field.type) or pa.types.is_binary(field.type):
        return [1]
    return [shapes.get(field.name)]


def _why_not(table: pa.Table, row: dict[str, Any] | None, sure: bool) -> str | None:
    """Why the rows of an episode are not a whole episode, or ``None``."""
    steps = table["frame_index"].to_numpy()
    if not np.array_equal(steps, np.arange(len(steps))):
        return "some of its frames are gone"
    if row is not None and row.get("length") != len(steps):
        return f"{len(steps)} of its {row.get('length')} frames are there"
    if row is None and not sure:
        return "its last frames may be gone"
    return "it has fewer than two frames" if len(steps) < 2 else None


def _statistics(table: pa.Table, features: dict[str, Any], clips: dict[str, Clip], fps: float) -> dict[str, Any] | None:
    """lerobot's statistics of an episode; ``None`` where its frames do not decode."""
    from lerobot.datasets.compute_stats import compute_episode_stats

    numbers = [key for key, feature in features.items() if feature["dtype"] not in ("image", "video", "string", "language")]
    columns = {key: np.array(table[key].to_pylist(), dtype=features[key]["dtype"]) for key in numbers}
    found: dict[str, Any] = compute_episode_stats(columns, features)
    sample = np.unique(np.linspace(0, len(table) - 1, SAMPLES).astype(np.int64))
    try:
        for key, feature in features.items():
            if feature["dtype"] == "image":
                found[key] = image_statistics(np.stack([_picture(table[key][int(i)]["bytes"].as_py()) for i in sample]))
            elif feature["dtype"] == "video":
                found[key] = image_statistics(VideoColumn([clips[key]], np.zeros(1, np.int64), fps).read(sample))
    except (UserError, *DAMAGE):
        return None
    return found


def _picture(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


class _DataFiles:
    """Data files of the repaired dataset, one row group per episode."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder, self._schema = folder, schema
        self._file, self._bytes = 0, 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table, index: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write an episode with new ``index`` columns; where it lies, in the words of ``meta/episodes``."""
        if self._bytes >= FILE_BYTES:
            self.close()
            self._file, self._bytes = self._file + 1, 0
        place = {"data/chunk_index": self._file // 1000, "data/file_index": self._file % 1000}
        if self._writer is None:
            file = self._folder / f"data/chunk-{self._file // 1000:03d}/file-{self._file % 1000:03d}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(file, self._schema, compression="snappy")
        for name, values in index.items():
            at = self._schema.get_field_index(name)
            table = table.set_column(at, self._schema.field(at), pa.array(values, self._schema.field(at).type))
        self._writer.write_table(table)
        self._bytes += table.nbytes
        return place

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

"""What lies in ``meta/`` of a LeRobotDataset folder, and beside it what our writers add."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from ...config import parse
from ...errors import UserError
from ..contract import Camera, Contract, Vector

CONTRACT_FILE = "meta/triune.json"
EPISODES_FILE = "meta/triune_episodes.jsonl"
DEFAULT_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
REPAIR = "save what is whole with `vla data repair`"
MEND = "copy the dataset again, or save what is whole with `vla data repair`"
"""How a folder with missing parts is mended."""


class _Feature(BaseModel):
    dtype: str
    shape: list[int]
    names: Any = None


class _Info(BaseModel):
    """What must be right in ``info.json``; it may say more."""

    codebase_version: str
    fps: float = Field(gt=0, allow_inf_nan=False)
    total_episodes: int = Field(ge=0, strict=True)
    chunks_size: int = Field(default=1000, gt=0, strict=True)
    features: dict[str, _Feature]


def read_info(root: Path, versions: tuple[str, ...] = ("v3.",)) -> dict[str, Any]:
    """``meta/info.json`` of a dataset of one of the ``versions`` (beginnings of version names).

    Raises:
        UserError: the folder is missing, is not a LeRobotDataset, or is of another version.
    """
    if not root.is_dir():
        raise UserError(f"there is no dataset folder {root}; record one with `vla data record`, or check the path")
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise UserError(f"{root} is not a LeRobotDataset: it has no meta/info.json; give the folder that holds meta/, data/ and videos/")
    info = read_json(file)
    version = str(info.get("codebase_version"))
    if not version.startswith(versions):
        old = version.startswith(("v2.0", "v2.1"))
        convert = f"convert it with `vla data convert {root} {root}-v30`" if old else "v2.0, v2.1 and v3.0 can be read"
        needed = " or ".join(versions).removesuffix(".")
        raise UserError(f"{root} is a LeRobotDataset {version}, {needed} is needed; {convert}")
    parse(_Info, info, file)
    info.setdefault("chunks_size", 1000)
    for key, feature in info["features"].items():
        if not feature["shape"] or min(feature["shape"]) < 1 or (feature["dtype"] in ("image", "video") and len(feature["shape"]) != 3):
            raise UserError(f"{file}: feature '{key}' has the shape {feature['shape']}; {MEND}")
    return info


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: the file is cut off, or holds something else than a JSON object.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is cut off or not JSON ({error}); restore it from a copy of the dataset") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no JSON object; restore it from a copy of the dataset")
    return tree


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """One JSON object per line; a last line that was being written when its writer died is left out.

    Raises:
        UserError: the file is missing, or another line is not a JSON object.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; {MEND}")
    rows = []
    try:
        *lines, last = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text ({error}); restore it from a copy of the dataset") from None
    for number, line in enumerate([*lines, last], 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                continue
            raise UserError(f"{file} is no JSON in line {number} ({error}); restore it from a copy of the dataset") from None
        if row is not None and not isinstance(row, dict):
            raise UserError(f"{file} holds no JSON object in line {number}; restore it from a copy of the dataset")
        rows += [row] if row is not None else []
    return rows


def read_contract(root: Path) -> Contract | None:
    """The contract that our writer left, or ``None``."""
    file = root / CONTRACT_FILE
    return parse(Contract, read_json(file).get("contract") or {}, file) if file.is_file() else None


def read_facts(root: Path) -> dict[int, dict[str, Any]]:
    """Per-episode facts by episode index; a last line that was being written when the recorder died is left out."""
    file = root / EPISODES_FILE
    if not file.is_file():
        return {}
    facts = read_json_lines(file)
    if not all(isinstance(fact.get("episode_index"), int) for fact in facts):
        raise UserError(f"{file} has a line without episode_index; restore it from a copy of the dataset, or remove it")
    return {fact.pop("episode_index"): fact for fact in facts}


def derive_contract(info: dict[str, Any]) -> Contract:
    """What ``info.json`` alone says; the rest is unknown."""
    features = info["features"]
    cameras = []
    for key, feature in features.items():
        if feature["dtype"] in ("image", "video"):
            shape, axes = feature["shape"], _flat_names(feature.get("names"))
            height, width = (shape[1], shape[2]) if axes and axes[0].startswith("channel") else (shape[0], shape[1])
            cameras.append(Camera(name=camera_name(key), height=height, width=width, flip=None))
    parts = {}
    for part, key in (("state", "observation.state"), ("action", "action")):
        size = features[key]["shape"][0] if key in features else 0
        names = _flat_names(features[key].get("names")) if size else ()
        parts[part] = Vector(names=names if len(names) == size else tuple(f"{part}_{i}" for i in range(size)))
    return Contract(cameras=tuple(cameras), state=parts["state"], action=parts["action"], rate=float(info["fps"]))


def _flat_names(names: Any) -> tuple[str, ...]:
    """LeRobot's ``names``: a list, a mapping of lists such as ``{"motors": [...]}``, or nothing."""
    if isinstance(names, dict):
        return tuple(name for group in names.values() for name in (_flat_names(group) if isinstance(group, list | dict) else ()))
    return tuple(str(name) for name in names or ())


def camera_name(key: str) -> str:
    return key.removeprefix("observation.images.").removeprefix("observation.")


def read_parquet(file: Path, columns: list[str] | None = None) -> pa.Table:
    """
    Raises:
        UserError: the file is missing, lacks a column, or has no footer because its writer was killed.
    """
    try:
        absent = set(columns or ()) - set(pq.read_schema(file).names)
        if absent:
            raise UserError(f"{file} does not hold '{min(absent)}', which meta/info.json names; {MEND}")
        return pq.read_table(file, columns=columns, partitioning=None)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {MEND}") from None
    except (pa.ArrowException, OSError, ValueError):
        raise UserError(f"{file} is cut off or damaged, perhaps its recorder was stopped before finalize(); {REPAIR}") from None


def read_episode_rows(root: Path) -> list[dict[str, Any]]:
    """All rows of ``meta/episodes`` without their statistics."""
    rows: list[dict[str, Any]] = []
    for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        try:
            columns = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
        except (pa.ArrowException, OSError, ValueError):
            columns = None
        rows += rows_of(read_parquet(file, columns), file)
    return rows


def read_tasks(root: Path) -> dict[int, str]:
    """Instructions by task index, ascending."""
    file = root / "meta" / "tasks.parquet"
    tasks = {}
    for row in rows_of(read_parquet(file), file):
        index, task = row.get("task_index"), row.get("task", row.get("__index_level_0__"))
        if not isinstance(index, int) or not isinstance(task, str):
            raise UserError(f"{file} has a row without task_index and task; {MEND}")
        tasks[index] = task
    if not tasks:
        raise UserError(f"{file} names no task; {MEND}")
    return dict(sorted(tasks.items()))


def rows_of(table: pa.Table, file: Path) -> list[dict[str, Any]]:
    """The rows of a table that was read from ``file``.

    Raises:
        UserError: a text in it is not UTF-8.
    """
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"{file} is damaged ({error}); {REPAIR}") from None
    return rows

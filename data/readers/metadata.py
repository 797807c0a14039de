"""What lies in ``meta/`` of a LeRobotDataset v3.0 folder, and beside it what our writer adds."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...config import parse
from ...errors import UserError
from ..contract import Camera, Contract, Vector

CONTRACT_FILE = "meta/triune.json"
EPISODES_FILE = "meta/triune_episodes.jsonl"
DEFAULT_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
MEND = "copy the dataset again, or record it anew"
"""How a folder with missing parts is mended."""


def read_info(root: Path) -> dict[str, Any]:
    """``meta/info.json`` of a v3.0 dataset.

    Raises:
        UserError: the folder is missing, is not a LeRobotDataset, or is of another version.
    """
    if not root.is_dir():
        raise UserError(f"there is no dataset folder {root}; record one with `vla data record`, or check the path")
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise UserError(f"{root} is not a LeRobotDataset: it has no meta/info.json; give the folder that holds meta/, data/ and videos/")
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is cut off or not JSON ({error}); restore it from a copy of the dataset") from None
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        convert = f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{root.name} --root={root}"
        raise UserError(f"{root} is a LeRobotDataset {version}, v3.0 is needed; convert it with `{convert}`")
    return info


def read_contract(root: Path) -> Contract | None:
    """The contract that our writer left, or ``None``."""
    file = root / CONTRACT_FILE
    return parse(Contract, json.loads(file.read_text(encoding="utf-8"))["contract"], file) if file.is_file() else None


def read_facts(root: Path) -> dict[int, dict[str, Any]]:
    """Per-episode facts by episode index; a last line that was being written when the recorder died is left out."""
    file = root / EPISODES_FILE
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    facts = [json.loads(line) for line in lines]
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
        UserError: the file is missing, or has no footer because its writer was killed.
    """
    try:
        return pq.read_table(file, columns=columns)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {MEND}") from None
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{file} is cut off: its recorder was stopped before finalize(), so its episodes are lost; {MEND}") from None


def read_episode_rows(root: Path) -> list[dict[str, Any]]:
    """All rows of ``meta/episodes`` without their statistics."""
    rows: list[dict[str, Any]] = []
    for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        try:
            columns = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
        except (pa.ArrowInvalid, OSError):
            columns = None
        rows += read_parquet(file, columns).to_pylist()
    return rows


def read_tasks(root: Path) -> tuple[str, ...]:
    rows = read_parquet(root / "meta" / "tasks.parquet").to_pylist()
    text = "task" if rows and "task" in rows[0] else "__index_level_0__"
    return tuple(row[text] for row in sorted(rows, key=lambda row: row["task_index"]))

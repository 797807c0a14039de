"""Which episodes a LeRobotDataset holds, and in which files they lie: v3.0 (many episodes in one file) and v2.x (one in each)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from .images import Clip
from .metadata import MEND, read_episode_rows, read_json_lines, read_tasks

TEMPLATE = re.compile(r"([^{}]|\{[a-z_]+(:0?[0-9]d)?\})*")
"""What ``data_path`` and ``video_path`` may look like: names in braces, nothing else of Python's format language."""


@dataclass(frozen=True)
class Place:
    """One episode: its frames are rows of ``data``, and for video features (by key) parts of ``clips``."""

    length: int
    task: str
    data: Path
    clips: dict[str, Clip]


def layout_v3(root: Path, info: dict[str, Any]) -> tuple[list[Place], dict[int, str]]:
    """Episodes in order, and tasks by index.

    Raises:
        UserError: metadata or videos are missing or damaged.
    """
    total, videos = info["total_episodes"], _video_keys(info)
    fields = ["data/chunk_index", "data/file_index", *(f"videos/{key}/{name}_index" for key in videos for name in ("chunk", "file"))]
    rows = [_checked(row, fields, root / "meta" / "episodes") for row in read_episode_rows(root)]
    rows = sorted((row for row in rows if row["episode_index"] < total), key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(total)):
        raise UserError(f"{root}/meta/episodes describes {len(rows)} of the {total} episodes that meta/info.json counts; {MEND}")
    places = []
    for row in rows:
        data = locate(root, info, "data_path", chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        clips = {key: _clip_v3(root, info, row, key) for key in videos}
        places.append(Place(row["length"], row["tasks"][0], data, clips))
    return places, read_tasks(root)


def layout_v2(root: Path, info: dict[str, Any]) -> tuple[list[Place], dict[int, str]]:
    """Episodes in order, and tasks by index.

    Raises:
        UserError: metadata or videos are missing or damaged.
    """
    total, file = info["total_episodes"], root / "meta" / "episodes.jsonl"
    rows = [_checked(row, [], file) for row in read_json_lines(file)]
    rows = sorted((row for row in rows if row["episode_index"] < total), key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(total)):
        raise UserError(f"{file} describes {len(rows)} of the {total} episodes that meta/info.json counts; {MEND}")
    places = []
    for row in rows:
        index = row["episode_index"]
        where = {"episode_index": index, "episode_chunk": index // info["chunks_size"]}
        clips = {key: Clip(_existing(locate(root, info, "video_path", video_key=key, **where)), 0.0) for key in _video_keys(info)}
        places.append(Place(row["length"], row["tasks"][0], locate(root, info, "data_path", **where), clips))
    tasks = {}
    for row in read_json_lines(root / "meta" / "tasks.jsonl"):
        if not isinstance(row.get("task_index"), int) or not isinstance(row.get("task"), str):
            raise UserError(f"{root}/meta/tasks.jsonl has a line without task_index and task; {MEND}")
        tasks[row["task_index"]] = row["task"]
    if not tasks:
        raise UserError(f"{root}/meta/tasks.jsonl names no task; {MEND}")
    return places, dict(sorted(tasks.items()))


def locate(root: Path, info: dict[str, Any], field: str, **values: object) -> Path:
    """The file that the template ``info[field]`` names; it lies inside ``root``.

    Raises:
        UserError: the template is none, or leads out of the folder.
    """
    template = info.get(field)
    known = isinstance(template, str) and TEMPLATE.fullmatch(template) and set(re.findall(r"\{([a-z_]+)", template)) <= set(values)
    if not known:
        raise UserError(f"{root}/meta/info.json: {field} {template!r} is not a path with {', '.join(values)} in braces; {MEND}")
    relative = Path(str(template).format(**values))
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{root}/meta/info.json: {field} {template!r} leads out of the dataset folder; {MEND}")
    return root / relative


def _video_keys(info: dict[str, Any]) -> list[str]:
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


def _checked(row: dict[str, Any], fields: list[str], where: Path) -> dict[str, Any]:
    """A row of episode metadata whose numbers are numbers."""
    integers = [row.get(field) for field in ("episode_index", "length", *fields)]
    tasks = row.get("tasks")
    if not all(isinstance(value, int) and value >= 0 for value in integers) or row["length"] < 1:
        raise UserError(f"{where} has an episode without valid {', '.join(('episode_index', 'length', *fields))}; {MEND}")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{where}: episode {row['episode_index']} has no task; {MEND}")
    return row


def _clip_v3(root: Path, info: dict[str, Any], row: dict[str, Any], key: str) -> Clip:
    place = {f"{name}_index": row[f"videos/{key}/{name}_index"] for name in ("chunk", "file")}
    start = row.get(f"videos/{key}/from_timestamp")
    if not isinstance(start, float | int) or not math.isfinite(start) or start < 0:
        raise UserError(f"{root}/meta/episodes: episode {row['episode_index']} has no valid start in the video of {key}; {MEND}")
    return Clip(_existing(locate(root, info, "video_path", video_key=key, **place)), float(start))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file} is missing; copy the dataset again, with its videos")
    return file

"""What a server's flight recorder writes: a folder per incident, with all that its answers depended on.

``incident.json``      why and when, the policy, its contract, what happened
``answered.parquet``   one row per request that was answered: observation (pictures as PNG), seed, step, prefix, delay, actions
``refused.parquet``    the same of requests that were not, with code and sentence instead of actions; absent where there are none

Rows of one run of a session stand together, in order. As a dataset (``open_incident``) a run is an episode, its action the first of
each chunk: the frames are those at which the policy was asked, not control steps, so that there is no rate.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import parse
from ..errors import UserError
from .contract import Contract
from .encode import png
from .files import atomic_folder
from .readers.dataset import DAMAGE, Dataset, EpisodeInfo
from .readers.images import ImageSource, PngColumn
from .types import Observation

HEAD, ANSWERED, REFUSED = "incident.json", "answered.parquet", "refused.parquet"
MEND = "copy the folder again from the server"
GROUP = 64
"""Rows of a group in the files: so many pictures are in memory at once when they are read."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One request and what became of it.

    Attributes:
        time: Unix time at which it was answered or refused.
        seed, step: of the session.
        prefix: float32 (P, A).
        actions: float32 (C, A) as they were sent, None where the request was refused, with ``code`` and ``message`` instead.
        planned: the policy's own, before the guard changed them; None where they are the same.
        seconds: until it was answered; timing: stage -> milliseconds; events: what the guard changed.
    """

    time: float
    session: str
    seed: int
    step: int
    observation: Observation
    prefix: np.ndarray | None = None
    delay: int = 0
    samples: int = 1
    actions: np.ndarray | None = None
    code: str | None = None
    message: str | None = None
    seconds: float = 0.0
    timing: dict[str, float] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    planned: np.ndarray | None = None


def write_incident(folder: Path, head: dict[str, Any], rows: Sequence[Recorded]) -> int:
    """Write an incident; when this returns all of it is on the disk, and before nothing has its name.

    Args:
        head: what ``incident.json`` says, with ``contract``; ready for JSON.

    Returns:
        bytes of its files.
    """
    with atomic_folder(folder) as temporary:
        for name, some in ((ANSWERED, [r for r in rows if r.actions is not None]), (REFUSED, [r for r in rows if r.actions is None])):
            if some:
                _write(temporary / name, [row for run in runs(some) for row in run])
        (temporary / HEAD).write_text(json.dumps(head, indent=1))
        return sum(file.stat().st_size for file in temporary.iterdir())


def read_incident(folder: Path) -> tuple[dict[str, Any], list[Recorded]]:
    """Head and rows of an incident, answered and refused ones in the order of their time.

    Raises:
        UserError: there is no incident, or it is damaged.
    """
    head = _head(folder)
    rows = [row for name in (ANSWERED, REFUSED) if (folder / name).is_file() for row in _read(folder / name)]
    return head, sorted(rows, key=lambda row: row.time)


def runs(rows: Iterable[Recorded]) -> list[list[Recorded]]:
    """Rows by session and beginning of it, each in the order of time: a run ends where the session's step does not go on."""
    found: list[list[Recorded]] = []
    latest: dict[str, list[Recorded]] = {}
    for row in sorted(rows, key=lambda row: row.time):
        run = latest.get(row.session)
        if run is None or row.seed != run[-1].seed or row.step < run[-1].step + (run[-1].actions is not None):
            run = latest[row.session] = []
            found.append(run)
        run.append(row)
    return found


def is_incident(root: Path) -> bool:
    """Whether a folder is one."""
    return (root / HEAD).is_file()


def open_incident(root: Path) -> Dataset:
    """The answered requests of an incident as a dataset.

    Raises:
        UserError: it is damaged, or nothing in it was answered.
    """
    file = root / ANSWERED
    contract = parse(Contract, _head(root).get("contract", {}), root / HEAD)
    if not file.is_file():
        raise UserError(f"no request in {root} was answered; `vla replay {root}` asks those that were refused again")
    rows = list(_read(file, pictures=False))
    episodes: list[EpisodeInfo] = []
    for run in runs(rows):
        start = episodes[-1].frames.stop if episodes else 0
        facts = {"session": run[0].session, "seed": run[0].seed, "first_step": run[0].step}
        episodes.append(EpisodeInfo(len(episodes), start, len(run), run[0].observation.instruction, facts))
    tasks = tuple(dict.fromkeys(row.observation.instruction for row in rows))
    columns = [name for name in pq.read_schema(file).names if name.startswith("image.")]
    sources: dict[str, ImageSource] = {c.removeprefix("image."): PngColumn(c, [file], np.array([0])) for c in columns}
    actions = [row.actions for row in rows if row.actions is not None]
    vectors = {"observation.state": np.stack([row.observation.state for row in rows]), "action": np.stack([a[0] for a in actions])}
    index = np.array([tasks.index(row.observation.instruction) for row in rows])
    stamps = np.array([row.observation.timestamp for row in rows], np.float32)
    return Dataset(root, contract, float("nan"), sources, episodes, vectors, tasks, index, stamps)


def _head(folder: Path) -> dict[str, Any]:
    try:
        head = json.loads((folder / HEAD).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no incident: it holds no {HEAD}; give a folder that `vla serve record.dir=...` has written") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEAD} cannot be read ({error}); {MEND}") from None
    if not isinstance(head, dict):
        raise UserError(f"{folder / HEAD} does not hold a map; {MEND}")
    return head


def _write(file: Path, rows: list[Recorded]) -> None:
    cameras = list(dict.fromkeys(camera for row in rows for camera in row.observation.images))
    with pq.ParquetWriter(file, _schema(cameras)) as writer, ThreadPoolExecutor(1) as pool:
        for start in range(0, len(rows), GROUP):
            part = rows[start : start + GROUP]
            columns: dict[str, Any] = {
                "time": [r.time for r in part],
                "session": [r.session for r in part],
                "seed": [r.seed for r in part],
                "step": [r.step for r in part],
                "instruction": [r.observation.instruction for r in part],
                "timestamp": [r.observation.timestamp for r in part],
                "embodiment": [r.observation.embodiment for r in part],
                "subtask": [r.observation.subtask for r in part],
                "observation.state": [r.observation.state for r in part],
                "prefix": [list(r.prefix) if r.prefix is not None and len(r.prefix) else None for r in part],
                "actions": [None if r.actions is None else list(r.actions) for r in part],
                "planned": [None if r.planned is None else list(r.planned) for r in part],
                "delay": [r.delay for r in part],
                "samples": [r.samples for r in part],
                "code": [r.code for r in part],
                "message": [r.message for r in part],
                "seconds": [r.seconds for r in part],
                "timing": [json.dumps(r.timing) for r in part],
                "events": [json.dumps(r.events) for r in part],
            }
            for camera in cameras:
                shown = [r.observation.images.get(camera) for r in part]
                columns[f"image.{camera}"] = list(pool.map(lambda image: None if image is None else {"bytes": png(image)}, shown))
            writer.write_table(pa.table(columns, _schema(cameras)), row_group_size=GROUP)


def _schema(cameras: Sequence[str]) -> pa.Schema:
    text, row, whole = pa.string(), pa.list_(pa.float32()), pa.int64()
    kinds = {
        "time": pa.float64(),
        "session": text,
        "seed": whole,
        "step": whole,
        "instruction": text,
        "timestamp": pa.float64(),
        "embodiment": text,
        "subtask": text,
        "observation.state": row,
        "prefix": pa.list_(row),
        "actions": pa.list_(row),
        "planned": pa.list_(row),
        "delay": whole,
        "samples": whole,
        "code": text,
        "message": text,
        "seconds": pa.float64(),
        "timing": text,
        "events": text,
    }
    return pa.schema([*kinds.items(), *((f"image.{camera}", pa.struct({"bytes": pa.binary()})) for camera in cameras)])


def _read(file: Path, pictures: bool = True) -> Iterable[Recorded]:
    """Rows of one file; without pictures they are empty of them."""
    try:
        handle = pq.ParquetFile(file)
        names = [n for n in handle.schema_arrow.names if n.startswith("image.")]
        kept = [n for n in handle.schema_arrow.names if pictures or n not in names]
        count = 0
        for group in range(handle.num_row_groups):
            table = handle.read_row_group(group, columns=kept)
            missing = set(_schema(()).names) - set(table.column_names)
            if missing:
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            for tree in table.to_pylist():
                yield _row(tree, _pictures(tree, names) if pictures else {})
                count += 1
    except DAMAGE as error:
        raise UserError(f"{file} cannot be read ({error}); {MEND}") from None


def _pictures(tree: dict[str, Any], names: list[str]) -> dict[str, np.ndarray]:
    import io

    from PIL import Image

    found = {}
    for name in names:
        if tree[name] is not None:
            with Image.open(io.BytesIO(tree[name]["bytes"])) as image:
                found[name.removeprefix("image.")] = np.array(image.convert("RGB"))
    return found


def _row(tree: dict[str, Any], images: dict[str, np.ndarray]) -> Recorded:
    prefix, actions, planned = (None if tree[k] is None else np.array(tree[k], np.float32) for k in ("prefix", "actions", "planned"))
    observation = Observation(
        images,
        np.array(tree["observation.state"], np.float32),
        tree["instruction"],
        tree["timestamp"],
        tree["embodiment"],
        tree["subtask"],
    )
    timing, events = json.loads(tree["timing"]), json.loads(tree["events"])
    plain = {k: tree[k] for k in ("time", "session", "seed", "step", "delay", "samples", "code", "message", "seconds")}
    return Recorded(**plain, observation=observation, prefix=prefix, actions=actions, timing=timing, events=events, planned=planned)

"""HDF5 demonstrations in robomimic's form, which robosuite, MimicGen, robocasa and LIBERO share: ``data/demo_<k>/{actions, obs/<key>}``.

Vectors of ``obs`` become ``observation.<key>``, ``actions`` becomes ``action``; images (uint8, height x width x 3) become cameras under
their key. Which of the vectors make up the state is said by a mapping (``data.robot``). Facts of the form: robomimic
``docs/datasets/overview.md``; of LIBERO: its ``scripts/create_dataset.py`` (``problem_info``, ``macros_image_convention``).
"""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..contract import Camera, Contract, Vector
from .dataset import DAMAGE, Dataset, EpisodeInfo
from .images import ImageSource

SUFFIXES = (".hdf5", ".h5")
MEND = "copy the file again, or leave it out"
PROBE_SECONDS = 60.0
"""A file whose attributes and names take longer to read is damaged."""
PROBE = """
import sys, h5py

def attempt(read, *what):
    try:
        return read(*what)
    except Exception:
        return None

def attributes(group):
    for key in ("env_args", "env", "problem_info", "macros_image_convention", "ep_meta"):
        attempt(group.attrs.get, key)

for name in sys.argv[1:]:
    file = attempt(lambda: h5py.File(name, "r", locking="best-effort"))
    data = attempt(file.get, "data") if file else None
    if data is not None:
        attempt(attributes, data)
        for demo in attempt(list, data) or ():
            group = attempt(data.get, demo)
            attempt(attributes, group)
            observations = attempt(lambda: group["obs"])
            for key in attempt(list, observations) or ():
                attempt(lambda: (observations[key].shape, observations[key].dtype))
        for key in attempt(lambda: list(file["mask"])) or ():
            attempt(lambda: file["mask"][key][()])
"""
"""Reads in a process of its own what libhdf5 may never return from, or die in, when it is damaged: one changed byte in the heap of an
attribute's text is enough. Other errors come again where the file is read, and are told there."""


@dataclass(frozen=True)
class _Demo:
    """One demonstration: where it lies, its instruction, facts, vectors float32 (T, D) and image shapes (T, H, W, 3) by key."""

    file: Path
    name: str
    task: str
    facts: dict[str, Any]
    vectors: dict[str, np.ndarray]
    images: dict[str, tuple[int, ...]]


def open_hdf5(root: Path) -> Dataset:
    """Open one HDF5 file, or all of a folder in the order of their names. Observations that some demonstration lacks, or has in
    another size, are left out.

    Raises:
        UserError: h5py is not installed; a file is damaged or of another form; there are no demonstrations, or of several kinds.
    """
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"{root} needs h5py, which is not installed; run `pip install 'triune-vla[hdf5]'`")
    if not root.exists():
        raise UserError(f"there is no HDF5 file {root}; check the path")
    files = sorted(file for file in root.iterdir() if file.suffix in SUFFIXES) if root.is_dir() else [root]
    _probe(root, files)
    demos: list[_Demo] = []
    headers = []
    for file in files:
        with _opened(file) as handle:
            headers.append(_header(handle))
            demos += _read_demos(handle, file, headers[-1])
    if not demos:
        raise UserError(f"{root} holds no demonstrations (data/demo_0, ...); give the files that a recorder has filled")
    widths = {demo.vectors["action"].shape[1] for demo in demos}
    if len(widths) > 1:
        raise UserError(f"{root} holds actions of {' and '.join(map(str, sorted(widths)))} dimensions; open files of one robot at a time")

    shapes = {key: value.shape[1:] for key, value in demos[0].vectors.items()}
    vectors = {
        key: np.ascontiguousarray(np.concatenate([demo.vectors[key] for demo in demos]))
        for key, shape in shapes.items()
        if all(key in demo.vectors and demo.vectors[key].shape[1:] == shape for demo in demos)
    }
    episodes: list[EpisodeInfo] = []
    for index, demo in enumerate(demos):
        start = episodes[-1].frames.stop if episodes else 0
        episodes.append(EpisodeInfo(index, start, len(demo.vectors["action"]), demo.task, demo.facts))
    starts = np.array([episode.start for episode in episodes])
    cameras = [k for k, s in demos[0].images.items() if all(k in demo.images and demo.images[k][1:] == s[1:] for demo in demos)]
    sources: dict[str, ImageSource] = {key: Hdf5Column(key, [(demo.file, demo.name) for demo in demos], starts) for key in cameras}
    rate = _same(root, "control_freq", [header.rate for header in headers])
    flip = _same(root, "macros_image_convention", [header.flip for header in headers])
    contract = Contract(
        cameras=tuple(Camera(name=k, height=demos[0].images[k][1], width=demos[0].images[k][2], flip=flip) for k in cameras),
        state=Vector(names=()),
        action=Vector(names=tuple(f"action_{i}" for i in range(vectors["action"].shape[1]))),
        rate=rate,
    )
    tasks = tuple(dict.fromkeys(demo.task for demo in demos))
    task_index = np.repeat([tasks.index(demo.task) for demo in demos], [episode.length for episode in episodes]).astype(np.int64)
    return Dataset(root, contract, rate if rate is not None else math.nan, sources, episodes, vectors, tasks, task_index)


class Hdf5Column(ImageSource):
    """One camera of all demonstrations.

    Args:
        key: its name under ``obs``.
        places: file and group of each demonstration.
        starts: index of each one's first frame in the dataset, int64 (episodes,).
    """

    kind = "HDF5, h5py"

    def __init__(self, key: str, places: list[tuple[Path, str]], starts: np.ndarray) -> None:
        self.key = key
        self.places = places
        self.starts = starts

    def size(self, index: int) -> tuple[int, int]:
        episode = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, name = self.places[episode]
        with _opened(file) as handle:
            height, width, _ = handle[f"data/{name}/obs/{self.key}"].shape[1:]
        return int(height), int(width)

    def fill(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """A file is opened for each call, so that forked workers share no handle."""
        episodes = np.searchsorted(self.starts, indices, side="right") - 1
        for episode in np.unique(episodes):
            file, name = self.places[episode]
            with _opened(file) as handle:
                images = handle[f"data/{name}/obs/{self.key}"]
                self.check(f"{file}, {self.key}", images.shape[1:3], out)
                for position in np.flatnonzero(episodes == episode):
                    out[rows[position]] = images[int(indices[position] - self.starts[episode])]


@dataclass(frozen=True)
class _Header:
    """What the attributes of ``data`` say of all demonstrations of a file."""

    rate: float | None
    flip: str | None
    task: str


def _probe(root: Path, files: list[Path]) -> None:
    """
    Raises:
        UserError: reading the files' attributes and names does not end, or ends the process.
    """
    command = [sys.executable, "-c", PROBE, *map(str, files)]
    try:
        code = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS + len(files)).returncode
    except subprocess.TimeoutExpired:
        raise UserError(f"{root} is damaged: reading its attributes does not end; {MEND}") from None
    if code < 0:
        raise UserError(f"{root} is damaged: libhdf5 dies in reading it (signal {-code}); {MEND}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """
    Raises:
        UserError: what is read in the block is damaged.
    """
    import h5py

    try:
        with h5py.File(file, "r", locking="best-effort") as handle:
            yield handle
    except (*DAMAGE, AttributeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is cut off, damaged, or no HDF5 file of demonstrations ({reason}); {MEND}") from error


def _header(handle: Any) -> _Header:
    attributes = handle["data"].attrs
    kwargs = _json(attributes, "env_args").get("env_kwargs")
    rate = kwargs.get("control_freq") if isinstance(kwargs, dict) else None
    flip = {"opengl": "vertical", "opencv": "none"}.get(_text(attributes.get("macros_image_convention", "")))
    words = _json(attributes, "problem_info").get("language_instruction")
    task = " ".join(words) if isinstance(words, list) else words
    name = _json(attributes, "env_args").get("env_name") or _text(attributes.get("env", ""))
    known = float(rate) if isinstance(rate, int | float) and math.isfinite(rate) and rate > 0 else None
    return _Header(known, flip, task if isinstance(task, str) and task else str(name or "unknown task"))


def _read_demos(handle: Any, file: Path, header: _Header) -> list[_Demo]:
    filters = {}
    if "mask" in handle:
        filters = {key: {_text(name) for name in np.asarray(handle["mask"][key]).ravel()} for key in handle["mask"]}
    demos = []
    for name in sorted(handle["data"], key=lambda name: (int((re.findall(r"\d+", name) or ["0"])[-1]), name)):
        group = handle["data"][name]
        vectors = {"action": _vector(group["actions"])}
        count, images = len(vectors["action"]), {}
        for key, entry in group["obs"].items() if "obs" in group else ():
            if not hasattr(entry, "shape") or not entry.shape or len(entry) != count:
                raise UserError(f"{file}: data/{name}/obs/{key} does not hold one entry for each of its {count} actions; {MEND}")
            if entry.dtype == np.uint8 and len(entry.shape) == 4 and entry.shape[3] == 3 and min(entry.shape) > 0:
                images[key] = tuple(entry.shape)
            elif entry.dtype.kind == "f" and len(entry.shape) in (1, 2):
                vectors[f"observation.{key}"] = _vector(entry)
        if not count:
            raise UserError(f"{file}: data/{name} has no actions; {MEND}")
        task = _json(group.attrs, "ep_meta").get("lang")
        facts: dict[str, Any] = {"file": file.name, "demo": name}
        facts |= {"filters": found} if (found := sorted(key for key, members in filters.items() if name in members)) else {}
        demos.append(_Demo(file, name, task if isinstance(task, str) and task else header.task, facts, vectors, images))
    return demos


def _vector(entry: Any) -> np.ndarray:
    """A dataset of shape (T,) or (T, D) as float32 (T, D); beyond its range numbers become infinite, which ``inspect`` reports."""
    values = np.asarray(entry)
    if values.dtype.kind not in "fiu" or values.ndim not in (1, 2):
        raise ValueError(f"{entry.name} has the type {values.dtype} and the shape {values.shape}")
    with np.errstate(over="ignore"):
        return values.astype(np.float32).reshape(len(values), -1)


def _json(attributes: Any, key: str) -> dict[str, Any]:
    """An attribute that holds a JSON object; an absent one is an empty object."""
    tree = json.loads(_text(attributes[key])) if key in attributes else {}
    if not isinstance(tree, dict):
        raise ValueError(f"the attribute {key} holds no JSON object")
    return tree


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _same(root: Path, name: str, values: list[Any]) -> Any:
    if len(set(values)) > 1:
        raise UserError(f"{root}: the files differ in {name} ({', '.join(map(str, values))}); open them one at a time")
    return values[0]

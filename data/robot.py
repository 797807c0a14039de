"""A robot's mapping: which of a dataset's cameras and numbers are which, as a YAML file in ``configs/robot/``.

A field that nobody knows is written ``unknown``: it is ``None`` in the model, is never guessed, and never conflicts.
"""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from ..config import Strict, find, load
from ..errors import UserError
from .contract import Camera, Contract, Vector
from .readers import Dataset
from .readers.images import ImageSource
from .readers.metadata import camera_name

SOURCE = re.compile(r"(?P<feature>[^\[\]]+)\[(?P<index>\d+)\]")
UNKNOWN = "unknown"


class _Known(Strict):
    @model_validator(mode="before")
    @classmethod
    def _unknown(cls, tree: Any) -> Any:
        return {key: None if value == UNKNOWN else value for key, value in tree.items()} if isinstance(tree, dict) else tree


class RobotCamera(_Known):
    """How a camera's frames lie in the dataset. A view undoes ``flip`` and ``colour`` where they are known: its frames are upright RGB."""

    source: str
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    colour: Literal["rgb", "bgr"] | None = None
    flip: Literal["none", "horizontal", "vertical", "rotate180"] | None = None


class Slot(_Known):
    """One dimension: ``source`` is ``<feature>[<index>]`` of the dataset."""

    name: str
    source: str
    unit: str | None = None

    @field_validator("source")
    @classmethod
    def _form(cls, source: str) -> str:
        if not SOURCE.fullmatch(source):
            raise ValueError(f"'{source}' must name a feature of the dataset and a dimension, such as observation.state[3]")
        return source

    @property
    def place(self) -> tuple[str, int]:
        """Feature and dimension."""
        feature, _, index = self.source.removesuffix("]").partition("[")
        return feature, int(index)


class Part(_Known):
    """State or action: its slots in order, and what holds of all of them (see ``contract.Vector``)."""

    frame: str | None = None
    rotation: str | None = None
    gripper: str | None = None
    mode: Literal["absolute", "relative"] | None = None
    slots: tuple[Slot, ...]

    @property
    def vector(self) -> Vector:
        units = tuple(slot.unit for slot in self.slots if slot.unit is not None)
        names = tuple(slot.name for slot in self.slots)
        known = units if len(units) == len(names) else None
        return Vector(names=names, units=known, frame=self.frame, rotation=self.rotation, gripper=self.gripper, mode=self.mode)


class Robot(_Known):
    """What a mapping file says."""

    name: str
    rate: float | None = Field(default=None, gt=0)
    cameras: dict[str, RobotCamera]
    state: Part
    action: Part

    @model_validator(mode="after")
    def _distinct(self) -> "Robot":
        for part, slots in (("state", self.state.slots), ("action", self.action.slots)):
            twice = sorted({slot.name for slot in slots if sum(other.name == slot.name for other in slots) > 1})
            if twice:
                raise ValueError(f"{part} has several slots named {', '.join(twice)}")
            if not slots:
                raise ValueError(f"{part} needs at least one slot")
        return self

    @property
    def contract(self) -> Contract:
        """The contract of a view: cameras upright and RGB where it is known how they lie in the dataset."""
        cameras = tuple(
            Camera(name=name, height=c.height, width=c.width, colour=c.colour and "rgb", flip=c.flip and "none")
            for name, c in self.cameras.items()
        )
        return Contract(cameras=cameras, state=self.state.vector, action=self.action.vector, rate=self.rate)

    def view(self, dataset: Dataset) -> Dataset:
        """``dataset`` under this robot's names, order and contract; no image is decoded.

        The view has ``observation.state`` and ``action`` of the slots in order, ``action.expert`` mapped as ``action`` where the dataset
        has it, and ``disturbed``; other vectors are left out.

        Raises:
            UserError: the dataset lacks a camera or slot, has another rate or image size, or nobody says its rate.
        """
        where = f"the mapping '{self.name}' does not fit {dataset.path}"
        problems = _missing(self, dataset)
        rate = self.rate if self.rate is not None else dataset.contract.rate
        if rate is None:
            problems.append("neither says the control rate; write `rate:` (Hz) into the mapping")
        elif dataset.contract.rate is not None and rate != dataset.contract.rate:
            problems.append(f"rate is {rate:g} Hz in the mapping and {dataset.contract.rate:g} Hz in the dataset")
        stored = {camera.name: camera for camera in dataset.contract.cameras}
        for name, camera in self.cameras.items():
            there = stored.get(camera_name(camera.source), Camera(name=name))
            for field in ("height", "width"):
                mine, yours = getattr(camera, field), getattr(there, field)
                if mine is not None and yours is not None and mine != yours:
                    problems.append(f"camera {name}: {field} is {mine} in the mapping and {yours} in the dataset")
        if problems or rate is None:
            raise UserError(
                f"{where}: {'; '.join(problems)}. Mend the mapping, or propose one with `vla data inspect {dataset.path} --write`"
            )
        vectors = {"observation.state": _columns(dataset, self.state.slots), "action": _columns(dataset, self.action.slots)}
        if "action.expert" in dataset.vectors and all(slot.place[0] == "action" for slot in self.action.slots):
            expert = [slot.model_copy(update={"source": f"action.expert[{slot.place[1]}]"}) for slot in self.action.slots]
            vectors["action.expert"] = _columns(dataset, tuple(expert))
        if "disturbed" in dataset.vectors:
            vectors["disturbed"] = dataset.vectors["disturbed"]
        sources = {name: _upright(dataset.sources[camera_name(c.source)], c) for name, c in self.cameras.items()}
        contract = self.contract.model_copy(update={"rate": rate, "render": dataset.contract.render})
        facts = (dataset.episodes, vectors, dataset.tasks, dataset.task_index, dataset.timestamps)
        return Dataset(dataset.path, contract, rate, sources, *facts)


class Upright(ImageSource):
    """Frames of another source, turned upright and to RGB."""

    def __init__(self, source: ImageSource, flip: str | None, bgr: bool) -> None:
        rows, columns = flip in ("vertical", "rotate180"), flip in ("horizontal", "rotate180")
        self._source, self.kind, self.forward = source, source.kind, source.forward
        self._order = (slice(None), slice(None, None, -1 if rows else 1), slice(None, None, -1 if columns else 1))
        self._bgr = bgr

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(index)

    def fill(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        frames = self._source.read(indices)[self._order]
        self.check("a camera", frames.shape[1:3], out)
        out[rows] = frames[..., ::-1] if self._bgr else frames


def load_robot(name: str | Path, overrides: list[str] | None = None) -> Robot:
    """The mapping in ``configs/robot/<name>.yaml``, or in a YAML file.

    Raises:
        UserError: there is no such file, or it is not valid.
    """
    return load(Robot, find(str(name), "robot"), overrides)


def _upright(source: ImageSource, camera: RobotCamera) -> ImageSource:
    turned = camera.flip not in (None, "none") or camera.colour == "bgr"
    return Upright(source, camera.flip, camera.colour == "bgr") if turned else source


def _missing(robot: Robot, dataset: Dataset) -> list[str]:
    """Sentences about what the dataset lacks."""
    cameras = [c.source for c in robot.cameras.values() if camera_name(c.source) not in dataset.sources]
    found = [f"it has no camera {', '.join(cameras)} (it has {', '.join(dataset.cameras) or 'none'})"] if cameras else []
    widths = {key: value.shape[1] for key, value in dataset.vectors.items()}
    slots = [slot for slot in (*robot.state.slots, *robot.action.slots) if slot.place[1] >= widths.get(slot.place[0], 0)]
    if slots:
        known = ", ".join(f"{key}[0..{width - 1}]" for key, width in widths.items())
        found.append(f"it has no {', '.join(slot.source for slot in slots)} (it has {known})")
    return found


def _columns(dataset: Dataset, slots: tuple[Slot, ...]) -> np.ndarray:
    """float32 (N, D) of the slots in order; a whole feature in its order is not copied."""
    places = [slot.place for slot in slots]
    whole = dataset.vectors[places[0][0]]
    if places == [(places[0][0], i) for i in range(whole.shape[1])]:
        return whole
    return np.ascontiguousarray(np.stack([dataset.vectors[feature][:, index] for feature, index in places], axis=1))

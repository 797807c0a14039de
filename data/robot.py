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
UNIT = re.compile(r"(?P<size>\d+(\.\d*)?)? ?(?P<of>.*)")
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


class SlotLimits(_Known):
    """What may be sent in one slot of the action, in its unit, per second and per second squared. What is left out or unknown is free.

    Attributes:
        mode: how the number counts, where it is not ``action.mode``, as of a gripper among steps.
        min, max: of the number itself: where to go (absolute), or one step (relative).
        velocity, acceleration: of what is commanded; a step counts for one period of the control rate.
        state: the slot of the state that reports where this one is; by default, of places, the one of the same name and unit.
    """

    mode: Literal["absolute", "relative"] | None = None
    min: float | None = None
    max: float | None = None
    velocity: float | None = Field(default=None, gt=0)
    acceleration: float | None = Field(default=None, gt=0)
    state: str | None = None


class Limits(_Known):
    """What may be sent to a robot.

    Attributes:
        action: slot of the action -> its limits.
        workspace: slot of the state -> lowest and highest place, in that slot's unit; kept by the action slot whose ``state`` it is.
    """

    action: dict[str, SlotLimits] = Field(default_factory=dict)
    workspace: dict[str, tuple[float, float]] = Field(default_factory=dict)


class Robot(_Known):
    """What a mapping file says."""

    name: str
    rate: float | None = Field(default=None, gt=0)
    cameras: dict[str, RobotCamera]
    state: Part
    action: Part
    limits: Limits | None = None

    @model_validator(mode="after")
    def _distinct(self) -> "Robot":
        for part, slots in (("state", self.state.slots), ("action", self.action.slots)):
            twice = sorted({slot.name for slot in slots if sum(other.name == slot.name for other in slots) > 1})
            if twice:
                raise ValueError(f"{part} has several slots named {', '.join(twice)}")
            if not slots:
                raise ValueError(f"{part} needs at least one slot")
        _ = self.action_limits
        return self

    @property
    def action_limits(self) -> dict[str, Any] | None:
        """What ``triune_client.ActionLimits.from_dict`` reads: one row for each slot of the action, in order; ``None`` without ``limits``.

        Raises:
            ValueError: a limit names no slot, has no meaning, or its unit cannot be compared with the state's.
        """
        if self.limits is None:
            return None
        unknown = sorted(set(self.limits.action) - {slot.name for slot in self.action.slots})
        if unknown:
            raise ValueError(f"limits.action names {', '.join(unknown)}; slots of the action are {_names(self.action)}")
        rows = [self._limited(slot, self.limits.action.get(slot.name, SlotLimits())) for slot in self.action.slots]
        reported = {row["state"] for row in rows if "state" in row}
        idle = [name for name in self.limits.workspace if _index(self.state, name, "limits.workspace") not in reported]
        if idle:
            raise ValueError(f"limits.workspace: no slot of the action has `state: {idle[0]}`, so nothing would keep it")
        return {"dimensions": rows, "source": f"robot {self.name}"}

    def _limited(self, slot: Slot, limits: SlotLimits) -> dict[str, Any]:
        """One row of ``action_limits``."""
        where, mode = f"limits.action.{slot.name}", limits.mode or self.action.mode
        numbers = limits.model_dump(include={"min", "max", "velocity", "acceleration"}, exclude_none=True)
        if mode is None and set(numbers) - {"min", "max"}:
            raise ValueError(f"{where}: say `mode`; whether it is absolute or relative is unknown, and a velocity means other things")
        if limits.min is not None and limits.max is not None and limits.min > limits.max:
            raise ValueError(f"{where}: min {limits.min:g} is above max {limits.max:g}")
        if mode == "relative" and not (limits.min or 0) <= 0 <= (limits.max or 0):
            raise ValueError(f"{where}: a step of 0 is outside min and max, so the robot could never stand still")
        row: dict[str, Any] = {"name": slot.name, "unit": slot.unit, "mode": mode, **numbers}
        same = [other.name for other in self.state.slots if mode == "absolute" and (other.name, other.unit) == (slot.name, slot.unit)]
        state = limits.state or next((name for name in same if slot.unit is not None), None)
        if state is not None:
            if mode is None:
                raise ValueError(f"{where}: say `mode`; whether the number is a place or a step from `state` is unknown")
            row["state"] = _index(self.state, state, where)
            row["scale"] = _scale(slot, self.state.slots[row["state"]], where)
            if self.limits is not None and state in self.limits.workspace:
                row["low"], row["high"] = self.limits.workspace[state]
                if row["low"] > row["high"]:
                    raise ValueError(f"limits.workspace.{state}: {row['low']:g} is above {row['high']:g}")
        return {key: value for key, value in row.items() if value is not None}

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


def _names(part: Part) -> str:
    return ", ".join(slot.name for slot in part.slots)


def _index(state: Part, name: str, where: str) -> int:
    names = [slot.name for slot in state.slots]
    if name not in names:
        raise ValueError(f"{where}: the state has no slot '{name}'; it has {_names(state)}")
    return names.index(name)


def _scale(slot: Slot, state: Slot, where: str) -> float:
    """One unit of ``slot`` in the unit of ``state``: of ``0.05 m`` in ``m`` 0.05."""
    sizes = [UNIT.fullmatch(unit) for unit in (slot.unit or "", state.unit or "")]
    if sizes[0] is None or sizes[1] is None or sizes[0]["of"] != sizes[1]["of"] or not float(sizes[0]["size"] or 1) > 0:
        units = " and ".join("unknown" if unit is None else f"'{unit}'" for unit in (slot.unit, state.unit))
        raise ValueError(f"{where}: its unit and that of state {state.name} are {units}; write the same one twice, such as 0.05 m and m")
    return float(sizes[0]["size"] or 1) / float(sizes[1]["size"] or 1)


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

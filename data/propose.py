"""A proposed mapping for a dataset, as YAML in which every doubt is the word ``unknown`` and a comment says why."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..errors import UserError
from .contract import Vector
from .files import write_file
from .inspect import dimension_names, roles
from .readers import Dataset
from .robot import UNKNOWN, Part, Robot, RobotCamera, Slot

WRIST = ("wrist", "hand", "gripper", "arm_cam")
UNSAID = "nothing in the dataset says it"


def propose(dataset: Dataset, report: dict[str, Any], name: str) -> tuple[Robot, dict[str, str]]:
    """A mapping named ``name``, and why fields of it are doubtful, by dotted key (``cameras.wrist.flip``).

    Args:
        dataset: an opened dataset.
        report: what ``inspect`` found in it.
        name: of the robot.

    Raises:
        UserError: it has no actions or no state to map.
    """
    features, action = roles(dataset)
    if action is None or not features:
        held = ", ".join(dataset.vectors)
        raise UserError(f"{dataset.path}: which feature is the {'action' if action is None else 'state'} cannot be told from {held}")
    contract, doubts = dataset.contract, {}
    if contract.rate is None:
        doubts["rate"] = f"{UNSAID}; in Hz"
    cameras: dict[str, RobotCamera] = {}
    for camera, row in zip(contract.cameras, report["cameras"], strict=True):
        role = _role(camera.name, set(cameras), contract.camera_names)
        if role != camera.name:
            doubts[f"cameras.{role}"] = f"its role is guessed from the name {camera.name}"
        height, width = row["decoded"] or (camera.height, camera.width)
        cameras[role] = RobotCamera(source=camera.name, height=height, width=width, colour=camera.colour, flip=camera.flip)
        if camera.flip is None:
            doubts[f"cameras.{role}.flip"] = "none, vertical, horizontal or rotate180: look at a frame"
        if not row["decodes"]:
            doubts[f"cameras.{role}.source"] = "its frames do not decode"
    findings = {finding["check"]: finding["sentence"] for finding in report["findings"]}
    state = _part(dataset, "state", features, contract.state, doubts, {})
    acted = _part(
        dataset, "action", [action], contract.action, doubts, {key: findings[key] for key in ("gripper", "mode") if key in findings}
    )
    return Robot(name=name, rate=contract.rate, cameras=cameras, state=state, action=acted), doubts


def render(robot: Robot, doubts: dict[str, str], source: str) -> str:
    """The mapping as YAML; ``None`` is written ``unknown``."""
    lines = [f"# Proposed by `vla data inspect {source} --write`. Mend what is unknown or commented; keep the rest."]

    def put(key: str, value: object, indent: int, path: str) -> None:
        comment = f"  # {' '.join(doubts[path].split())}" if path in doubts else ""
        lines.append(f"{' ' * indent}{key}: {_scalar(value)}{comment}")

    put("name", robot.name, 0, "name")
    put("rate", robot.rate, 0, "rate")
    lines.append("cameras:" if robot.cameras else "cameras: {}")
    for name, camera in robot.cameras.items():
        lines.append(f"  {_scalar(name)}:" + (f"  # {doubts[f'cameras.{name}']}" if f"cameras.{name}" in doubts else ""))
        for field, value in camera:
            put(field, value, 4, f"cameras.{name}.{field}")
    for part in ("state", "action"):
        lines.append(f"{part}:")
        for field, value in getattr(robot, part):
            if field != "slots":
                put(field, value, 2, f"{part}.{field}")
        units = f"  # {doubts[f'{part}.units']}" if f"{part}.units" in doubts else ""
        lines.append(f"  slots:{units}")
        for slot in getattr(robot, part).slots:
            lines.append(f"    - {{name: {_scalar(slot.name)}, source: {_scalar(slot.source)}, unit: {_scalar(slot.unit)}}}")
    return "\n".join(lines) + "\n"


def write_proposal(dataset: Dataset, report: dict[str, Any], path: Path) -> Robot:
    """Write the proposal to ``path``; its stem is the robot's name.

    Raises:
        UserError: there is a file already, which a person may have mended; or nothing to map.
    """
    if path.exists():
        raise UserError(f"{path} is there already, perhaps mended by hand; remove it or choose another name")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: a mapping is a YAML file; let its name end in .yaml")
    robot, doubts = propose(dataset, report, path.stem)
    write_file(path, render(robot, doubts, str(report["path"])))
    return robot


def write_images(dataset: Dataset, folder: Path) -> list[Path]:
    """The first frame of each camera as ``<folder>/<camera>.png``, to see how it lies.

    Raises:
        UserError: a frame does not decode.
    """
    paths = []
    for camera in dataset.cameras:
        buffer = io.BytesIO()
        Image.fromarray(dataset.frames(camera, [0])[0]).save(buffer, "PNG")
        paths.append(folder / f"{camera.replace('/', '_')}.png")
        write_file(paths[-1], buffer.getvalue())
    return paths


def stand_ins(wanted: Sequence[str], offered: Sequence[str]) -> tuple[str, ...] | None:
    """For each camera that is ``wanted`` one that is ``offered``, by name, then a wrist for a wrist, then in order: a guess. ``None``:
    there are too few."""
    found = {name: name for name in wanted if name in offered}
    for name in wanted:
        left = [other for other in offered if other not in found.values()]
        if name not in found and left:
            alike = [other for other in left if _at_hand(other) == _at_hand(name)]
            found[name] = (alike or left)[0]
    return tuple(found[name] for name in wanted) if len(found) == len(wanted) else None


def _at_hand(camera: str) -> bool:
    return any(word in camera.lower() for word in WRIST)


def _role(name: str, taken: set[str], names: tuple[str, ...]) -> str:
    """``wrist`` for a camera on the hand, ``agentview`` for the first other; the name itself where these are taken or used."""
    base = "wrist" if _at_hand(name) else "agentview"
    return name if base in taken or (base in names and base != name) else base


def _part(dataset: Dataset, part: str, features: list[str], vector: Vector, doubts: dict[str, str], guesses: dict[str, str]) -> Part:
    """Slots of whole features in their order; what the contract says only holds where it is about these very features."""
    names = [name for key in features for name in dimension_names(dataset, key)]
    sources = [f"{key}[{i}]" for key in features for i in range(dataset.vectors[key].shape[1])]
    if len(set(names)) < len(names) or UNKNOWN in names:
        names = [source.replace("[", "_").removesuffix("]") for source in sources]
    known = vector if vector.names == tuple(names) else Vector(names=())
    units = known.units or (None,) * len(names)
    if known.units is None:
        doubts[f"{part}.units"] = f"units: {UNSAID}"
    for field in ("frame", "rotation", "gripper", "mode"):
        if getattr(known, field) is None:
            doubts[f"{part}.{field}"] = guesses.get(field, UNSAID)
    slots = tuple(Slot(name=name, source=source, unit=unit) for name, source, unit in zip(names, sources, units, strict=True))
    return Part(frame=known.frame, rotation=known.rotation, gripper=known.gripper, mode=known.mode, slots=slots)


def _scalar(value: object) -> str:
    """A value as YAML on one line; a text that could be read as something else is quoted."""
    if value is None:
        return UNKNOWN
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)

"""A robot of a GR00T N1.6 or N1.7 folder, which tells all of it: cameras, state and action groups, their statistics, what happens to its
pictures and words.

``processor_config.json``                    of all robots
``statistics.json``, ``embodiment_id.json``  of every robot; which of the network's encoders is its own

What happens is that of ``processing_gr00t_n1d7.py``, ``image_augmentations.py`` (evaluation) and
``data/state_action/state_action_processor.py`` (NVIDIA-Medtech/GR00T-H, commit 23ace64f, "GR00T N1.7 Release", and for N1.6 commit
4e62473d, "GR00T N1.6 Release").
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, PositiveInt

from ...config import parse
from ...data import Camera, Contract, Vector
from ...data.transforms import Affine, Angles, Relative, RelativePose
from ...errors import UserError
from ..inputs import Resize
from .base import read_json
from .groot_robot import Asked, Robot, choose, names, plain

WAY_OUT = "give a folder that Isaac-GR00T N1.6 or N1.7 saved"


class Group(BaseModel):
    """How a group of actions is meant."""

    rep: Literal["RELATIVE", "ABSOLUTE", "DELTA"]
    type: Literal["EEF", "NON_EEF"]
    format: Literal["DEFAULT", "XYZ_ROT6D", "XYZ_ROTVEC"] = "DEFAULT"
    state_key: str | None = None


ABSOLUTE = Group(rep="ABSOLUTE", type="NON_EEF")


class Part(BaseModel):
    """Cameras, state, actions or words of a robot."""

    delta_indices: list[int]
    modality_keys: list[str]
    sin_cos_embedding_keys: list[str] | None = None
    mean_std_embedding_keys: list[str] | None = None
    exclude_state: bool = False
    action_configs: list[Group] | None = None


class Processor(BaseModel):
    """``processor_kwargs`` of ``processor_config.json``."""

    modality_configs: dict[str, dict[str, Part]]
    image_crop_size: tuple[PositiveInt, PositiveInt] | None = None
    image_target_size: tuple[PositiveInt, PositiveInt] | None = None
    shortest_image_edge: PositiveInt | None = 256
    crop_fraction: float | None = 0.95
    letter_box_transform: bool = False
    formalize_language: bool = True
    use_percentiles: bool = False
    apply_sincos_state_encoding: bool = False
    use_relative_action: bool = False


def read_robot(source: Path, asked: Asked, horizon: int, multiple: int | None = None) -> Robot:
    """A robot of the folder ``source``, whose network plans ``horizon`` steps.

    Args:
        multiple: the multiple of pixels that pictures are made as high and as wide as.

    Raises:
        UserError: no such robot; a file is missing or damaged; it does what a checkpoint has no words for.
    """
    if asked.config is not None or asked.changes:
        raise UserError(f"{source} tells what its robots do, so --config and KEY=VALUE have nothing to add; leave them out")
    file = source / "processor_config.json"
    processor = parse(Processor, plain(read_json(file, WAY_OUT).get("processor_kwargs", {}), file), file)
    statistics, ids = (read_json(source / f"{name}.json", WAY_OUT) for name in ("statistics", "embodiment_id"))
    tag = choose(source, asked.embodiment, [tag for tag in processor.modality_configs if tag in statistics and tag in ids])
    parts, known = processor.modality_configs[tag], statistics[tag]
    check_robot(tag, parts, processor, horizon)
    state, felt, places, angles = read_state(parts["state"], known, processor)
    action, done, relative, poses = read_action(parts["action"], known, processor, places)
    chunk = len(parts["action"].delta_indices)
    return Robot(
        tag=tag,
        number=ids[tag],
        contract=Contract(
            cameras=tuple(Camera(name=name, flip=None) for name in parts["video"].modality_keys),
            state=state,
            action=action,
            chunk=chunk,
            executed=chunk,
        ),
        state=felt,
        action=done,
        horizon=horizon,
        resize=read_resize(source, processor, multiple),
        lower=processor.formalize_language,
        edits=((r"[^\w\s]", ""),) if processor.formalize_language else (),
        relative=relative,
        poses=poses,
        angles=angles,
    )


def check_robot(tag: str, robot: Mapping[str, Part], processor: Processor, horizon: int) -> None:
    """Refuse what a robot does and a checkpoint has no words for."""
    for name in ("video", "state"):
        if robot[name].delta_indices != [0]:
            raise UserError(f"{tag} looks at {name} of steps {robot[name].delta_indices}; only the present one can be converted")
    if robot["action"].mean_std_embedding_keys:
        keys = ", ".join(robot["action"].mean_std_embedding_keys)
        raise UserError(f"{tag} normalises the actions' {keys} by mean and deviation, which clips one way; only ranges can be converted")
    if robot["state"].exclude_state:
        raise UserError(f"{tag} does not look at its state, for which a checkpoint has no words; choose another robot")
    for key, group in zip(robot["action"].modality_keys, robot["action"].action_configs or (), strict=False):
        if processor.use_relative_action and group.rep == "RELATIVE" and group.type == "EEF" and group.format != "XYZ_ROT6D":
            way_out = "only XYZ_ROT6D can be converted; choose another robot"
            raise UserError(f"{tag} counts the poses of '{key}' from the hand's own frame as {group.format}; {way_out}")
    if len(robot["action"].delta_indices) > horizon:
        raise UserError(f"{tag} has {len(robot['action'].delta_indices)} steps a chunk, the network {horizon}; correct the one")


def _ends(known: Mapping[str, Any], part: str, key: str, ends: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a group's range, (D,) or for every step (C, D)."""
    rows = known.get(part, {}).get(key, {})
    if not set(ends) <= set(rows):
        way_out = "copy it again, or choose another robot"
        raise UserError(f"statistics.json has no {' and '.join(ends)} of {part} '{key}'; {way_out}")
    return np.array(rows[ends[0]]), np.array(rows[ends[1]])


def read_state(part: Part, known: Mapping[str, Any], processor: Processor) -> tuple[Vector, Affine, dict[str, int], Angles | None]:
    """Names, normalisation, where each group begins, and which are angles. A number that never varies becomes 0 by its range, whatever it
    is, and stays what it is by its deviation."""
    ends = ("q01", "q99") if processor.use_percentiles else ("min", "max")
    turned = (part.sin_cos_embedding_keys or ()) if processor.apply_sincos_state_encoding else ()
    called: list[str] = []
    places: dict[str, int] = {}
    rows: list[np.ndarray] = []
    clip: list[bool] = []
    for key in part.modality_keys:
        by_range = key not in turned and key not in (part.mean_std_embedding_keys or ())
        low, high = _ends(known, "state", key, ends)
        if by_range:
            rows.append(np.stack([low, np.where(np.isclose(high, low), 0.0, high - low) / 2]))
        else:
            mean, std = (np.zeros_like(low), np.ones_like(low)) if key in turned else _ends(known, "state", key, ("mean", "std"))
            rows.append(np.where(std == 0, [[-1.0], [1.0]], np.stack([mean - std, std])))
        places[key] = len(called)
        called += names(key, len(low))
        clip += [by_range] * len(low)
    shift, scale = np.concatenate(rows, axis=1)
    kind: Literal["quantile", "min_max"] = "quantile" if processor.use_percentiles else "min_max"
    affine = Affine(shift=tuple(shift.tolist()), scale=tuple(scale.tolist()), bias=-1.0, clip=all(clip) or tuple(clip))
    sizes = dict(zip(places, np.diff([*places.values(), len(called)]).tolist(), strict=True))
    groups = tuple((places[key], places[key] + sizes[key]) for key in places if key in turned)
    vector = Vector(names=tuple(called), normalisation=kind if all(clip) else None)
    return vector, affine, places, Angles(groups=groups) if groups else None


def read_action(
    part: Part, known: Mapping[str, Any], processor: Processor, places: Mapping[str, int]
) -> tuple[Vector, Affine, Relative | None, tuple[RelativePose, ...]]:
    """Names, normalisation (with a row for each step where relative groups have one), and what is counted from the state."""
    ends, chunk = ("q01", "q99") if processor.use_percentiles else ("min", "max"), len(part.delta_indices)
    called: list[str] = []
    origin: list[int | None] = []
    poses: list[RelativePose] = []
    lows, highs = [], []
    for key, group in zip(part.modality_keys, part.action_configs or [ABSOLUTE] * len(part.modality_keys), strict=True):
        relative = processor.use_relative_action and group.rep == "RELATIVE"
        low, high = _ends(known, "relative_action", key, ("min", "max")) if relative else _ends(known, "action", key, ends)
        size, first = low.shape[-1], places.get(group.state_key or key)
        if relative and first is None:
            raise UserError(f"the actions '{key}' are relative to a state that the robot does not have; choose another robot")
        if relative and first is not None and group.type == "EEF":
            poses.append(RelativePose(action=len(called), state=first))
        added = relative and group.type == "NON_EEF" and first is not None
        origin += [(first or 0) + i if added else None for i in range(size)]
        called += names(key, size)
        lows.append(np.broadcast_to(low, (chunk, size)))
        highs.append(np.broadcast_to(high, (chunk, size)))
    low, half = np.concatenate(lows, axis=1), (np.concatenate(highs, axis=1) - np.concatenate(lows, axis=1)) / 2
    moved = any(i is not None for i in origin)
    affine = Affine(shift=_rows(low), scale=_rows(half), bias=-1.0, clip=True)
    kind: Literal["quantile", "min_max"] = "quantile" if processor.use_percentiles else "min_max"
    mixed = moved or bool(poses)
    vector = Vector(names=tuple(called), mode="absolute" if mixed else None, normalisation=None if mixed else kind)
    return vector, affine, Relative(state_of=tuple(origin)) if moved else None, tuple(poses)


def _rows(values: np.ndarray) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
    """One row where all steps have the same."""
    return tuple(values[0].tolist()) if (values == values[0]).all() else tuple(tuple(row) for row in values.tolist())


def read_resize(source: Path, processor: Processor, multiple: int | None = None) -> Resize:
    """Pictures are scaled by area, cut and scaled again, and where a ``multiple`` of pixels is wanted once more. Those that are not square
    N1.7's release padded to squares whatever the folder says, later versions only where it says so; N1.6 leaves them as wide as they
    are. So without that word they are refused."""
    target, cut = processor.image_target_size, processor.image_crop_size
    side = processor.shortest_image_edge or (target[0] if target and target[0] == target[1] else None)
    crop = processor.crop_fraction or (cut[0] / target[0] if cut and target else None)
    if side is None or crop is None:
        raise UserError(f"{source / 'processor_config.json'} does not tell the one size of its pictures and what is cut off; {WAY_OUT}")
    shape: Literal["padded", "square"] = "padded" if processor.letter_box_transform else "square"
    last = side if multiple is None else multiple * max(2, min(64, round(side / multiple)))
    return Resize(height=last, width=last, shape=shape, filter="area", crop=crop, first=None if last == side else (side, side))

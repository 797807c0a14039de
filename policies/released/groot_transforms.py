"""A robot of a GR00T N1.5 folder, which holds its statistics (``experiment_cfg/metadata.json``) and not what it does with them: that is
Python, ``gr00t/experiment/data_config.py`` or one's own, and comes from ``configs/groot`` or a YAML file like those.

What happens is that of ``data/transform/{video,state_action,concat}.py`` and ``model/transforms.py`` in evaluation (NVIDIA/Isaac-GR00T,
commit 4af2b622, the last of N1.5; its history is also in NVIDIA-Medtech/GR00T-H).
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator

from ...config import CONFIGS, Strict, find, load_tree, parse
from ...data import Camera, Contract, Vector
from ...data.transforms import Affine, Angles, Kind
from ...errors import UserError
from ..inputs import Resize
from .base import read_json
from .groot_robot import Asked, Robot, choose, names

WAY_OUT = "give a folder that Isaac-GR00T N1.5 saved"
NUMBERS = {"new_embodiment": 31, "agibot_genie1": 26, "gr1": 24, "oxe_droid": 17}
"""Tag of a robot -> the number of its encoders and decoder (``data/embodiment_tags.py``)."""
Way = Literal["min_max", "q99", "mean_std", "none"]
KINDS: dict[str, Kind] = {"min_max": "min_max", "q99": "quantile", "mean_std": "mean_std", "none": "none", "sin_cos": "none"}


class Transforms(Strict):
    """What the transforms of a robot do, in the words of Isaac-GR00T.

    Attributes:
        cameras: ``video_keys``.
        state, action: key -> ``normalization_modes``, in the order of ``ConcatTransform``; ``none`` where it names none, ``sin_cos`` where
            ``StateActionSinCosTransform`` does it.
        chunk: how many ``action_indices``; executed: steps of them, by default all.
        crop: ``scale`` of ``VideoCrop``; side: of ``VideoResize``.
        lower: ``formalize_language`` of ``GR00TTransform``: small letters without punctuation.
        repository, revision, licence: of the folder, where they are known and it does not tell them.
    """

    cameras: tuple[str, ...] = Field(min_length=1)
    state: dict[str, Way | Literal["sin_cos"]] = Field(min_length=1)
    action: dict[str, Way] = Field(min_length=1)
    chunk: PositiveInt = 16
    executed: PositiveInt | None = None
    crop: PositiveFloat = Field(default=0.95, le=1)
    side: PositiveInt = 224
    lower: bool = False
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None


class _Row(BaseModel):
    min: list[float]
    max: list[float]
    mean: list[float]
    std: list[float]
    q01: list[float]
    q99: list[float]

    @model_validator(mode="after")
    def _even(self) -> "_Row":
        if len({len(row) for row in (self.min, self.max, self.mean, self.std, self.q01, self.q99)}) > 1:
            raise ValueError("min, max, mean, std, q01 and q99 are not of one length")
        return self


class _Statistics(BaseModel):
    state: dict[str, _Row]
    action: dict[str, _Row]


class _Video(BaseModel):
    fps: PositiveFloat


class _Modalities(BaseModel):
    video: dict[str, _Video]


class _Known(BaseModel):
    """A robot in ``metadata.json``."""

    statistics: _Statistics
    modalities: _Modalities


def read_robot(source: Path, asked: Asked, horizon: int) -> Robot:
    """A robot of the folder ``source``. How many steps it plans, its transforms say, whatever ``horizon`` the network was saved with.

    Raises:
        UserError: no such robot, or nothing says what its transforms do, or they name what it does not have.
    """
    file = source / "experiment_cfg" / "metadata.json"
    metadata = read_json(file, WAY_OUT)
    tag = choose(source, asked.embodiment, [tag for tag in metadata if tag in NUMBERS])
    if asked.config is None:
        there = ", ".join(sorted(path.stem for path in (CONFIGS / "groot").glob("*.yaml")))
        raise UserError(
            f"{source} does not hold the data config it was trained with; name it by --config NAME ({there}), or write such a YAML file"
        )
    path = find(asked.config, "groot")
    does, known = parse(Transforms, load_tree(path, list(asked.changes)), path), parse(_Known, metadata[tag], f"{file}, {tag}")
    state, felt = _vector("state", does.state, known.statistics.state, file)
    action, done = _vector("action", does.action, known.statistics.action, file)
    rates = {known.modalities.video[_there("video", camera, known.modalities.video, file)].fps for camera in does.cameras}
    return Robot(
        tag=tag,
        number=NUMBERS[tag],
        contract=Contract(
            cameras=tuple(Camera(name=camera, flip=None) for camera in does.cameras),
            state=state,
            action=action,
            rate=rates.pop() if len(rates) == 1 else None,
            chunk=does.chunk,
            executed=does.executed or does.chunk,
        ),
        state=felt,
        action=done,
        horizon=does.chunk,
        resize=Resize(height=does.side, width=does.side, shape="stretched", filter="smooth", crop=does.crop),
        lower=does.lower,
        edits=((r"[^\w\s]", ""),) if does.lower else (),
        angles=_angles(does, known.statistics.state),
        facts={"config": asked.config, "repository": does.repository, "revision": does.revision, "licence": does.licence},
    )


def _there(part: str, key: str, known: dict[str, _Row] | dict[str, _Video], file: Path) -> str:
    if key not in known:
        raise UserError(f"{file} has no {part} '{key}', it has {', '.join(known)}; correct the data config, or give another: --config NAME")
    return key


def _vector(part: Literal["state", "action"], ways: Mapping[str, str], known: dict[str, _Row], file: Path) -> tuple[Vector, Affine]:
    """Names and normalisation. What never varies is 0 by its range, and stays what it is by the other ways; an action is then constant.

    Raises:
        UserError: there is no such key.
    """
    rows = [(way, known[_there(part, key, known, file)]) for key, way in ways.items()]
    shift, scale = np.concatenate([_ends(part, way, row) for way, row in rows], axis=1)
    kinds = {KINDS[way] for way in ways.values()}
    called = [name for key, (_, row) in zip(ways, rows, strict=True) for name in names(key, len(row.mean))]
    clip = tuple(part == "state" and way == "q99" for way, row in rows for _ in row.mean)
    vector = Vector(names=tuple(called), normalisation=kinds.pop() if len(kinds) == 1 else None)
    return vector, Affine(shift=tuple(shift.tolist()), scale=tuple(scale.tolist()), clip=clip if any(clip) else False)


def _ends(part: str, way: str, row: _Row) -> np.ndarray:
    """Shift and scale (2, D) of a group."""
    low, high = np.array([row.q01, row.q99] if way == "q99" else [row.min, row.max])
    if way == "mean_std":
        shift, scale = np.array([row.mean, row.std])
    elif KINDS[way] == "none":
        shift, scale = np.zeros_like(low), np.ones_like(low)
    else:
        shift, scale = (low + high) / 2, (high - low) / 2
    as_it_is = (scale == 0) & (part == "state") & (way != "min_max")
    return np.stack([np.where(as_it_is, 0, shift), np.where(as_it_is, 1, scale)])


def _angles(does: Transforms, known: dict[str, _Row]) -> Angles | None:
    ends = np.cumsum([0, *(len(known[key].mean) for key in does.state)]).tolist()
    turned = [way == "sin_cos" for way in does.state.values()]
    groups = tuple(group for group, turns in zip(pairwise(ends), turned, strict=True) if turns)
    return Angles(groups=groups) if groups else None

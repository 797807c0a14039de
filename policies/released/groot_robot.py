"""A robot of a GR00T folder in our words, wherever the folder's line keeps what it has and does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data import Contract
from ...data.transforms import Affine, Angles, Relative, RelativePose
from ...errors import UserError
from ..inputs import Resize

PLAIN: Mapping[str, Any] = {
    "state_history_length": 1,
    "add_pos_embed": True,
    "use_vlln": True,
    "num_timestep_buckets": 1000,
    "exclude_state": False,
    "use_tactile": False,
    "reproject_vision": False,
    "project_to_dim": None,
    "use_mean_std": False,
    "clip_outliers": True,
    "use_albumentations": True,
}
"""Keys of ``config.json`` and of the processor that can be converted with one value alone."""


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the folder.

    Attributes:
        embodiment: the robot's tag; config, changes: its transforms, which a folder of N1.5 does not tell.
    """

    embodiment: str | None
    config: str | None = None
    changes: Sequence[str] = ()


@dataclass(frozen=True)
class Robot:
    """What a robot has and does.

    Attributes:
        tag: its name; number: of its encoders and decoder in the network.
        contract: without the prompt, which is the VLM's.
        state, action: as states are normalised and actions are not.
        horizon: steps that the network plans, of which the contract's chunk is the beginning.
        lower, edits: what happens to an instruction.
        relative, poses: which actions are counted from the state; angles: which of its numbers are seen as sine and cosine.
        facts: what is known of the folder's origin.
    """

    tag: str
    number: int
    contract: Contract
    state: Affine
    action: Affine
    horizon: int
    resize: Resize
    lower: bool = False
    edits: tuple[tuple[str, str], ...] = ()
    relative: Relative | None = None
    poses: tuple[RelativePose, ...] = ()
    angles: Angles | None = None
    facts: Mapping[str, str | None] = field(default_factory=dict)


def plain(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """``tree``, unless it does what cannot be converted.

    Raises:
        UserError: it does.
    """
    for key, value in PLAIN.items():
        if tree.get(key, value) != value:
            raise UserError(f"{file} sets {key} to {tree[key]!r}; only {value!r} can be converted")
    return tree


def choose(source: Path, asked: str | None, tags: Sequence[str]) -> str:
    """The robot that was asked for, of those that the folder ``source`` tells all of.

    Raises:
        UserError: it is none of ``tags``.
    """
    if asked is None or asked not in tags:
        raise UserError(f"{source} is of several robots; choose one by --embodiment TAG: {', '.join(tags) or 'none has statistics'}")
    return asked


def names(key: str, size: int) -> list[str]:
    """Of a group's numbers."""
    return [key] if size == 1 else [f"{key}_{i}" for i in range(size)]

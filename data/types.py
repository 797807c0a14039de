"""The words that every folder shares: what a policy sees and what it answers."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ..errors import UserError


@dataclass(frozen=True, eq=False)
class Observation:
    """One moment as a policy sees it; never privileged state.

    Attributes:
        images: camera name -> uint8 array of shape (H, W, 3), RGB. An absent camera is absent from the mapping.
        state: proprioception, float32 of shape (S,), in the units that the contract names.
        instruction: the task in words.
        timestamp: seconds since the episode began.
        embodiment: name of the robot, where a policy serves several.
        subtask: what to do now, where a planner says it.

    Raises:
        UserError: an image is not uint8 (H, W, 3), or the state is not a finite vector.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    timestamp: float = 0.0
    embodiment: str | None = None
    subtask: str | None = None

    def __post_init__(self) -> None:
        for camera, image in self.images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                raise UserError(f"image '{camera}' must be a uint8 array of shape (height, width, 3), got {got}")
        state = np.asarray(self.state, dtype=np.float32)
        if state.ndim != 1 or not np.isfinite(state).all():
            raise UserError(f"state must be a finite vector of shape (S,), got shape {state.shape}")
        object.__setattr__(self, "state", state)

    @classmethod
    def trusted(cls, **fields: Any) -> Self:
        """One whose fields, all of them, were in an observation before: they are not checked again."""
        observation = object.__new__(cls)
        observation.__dict__.update(fields)
        return observation


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """Consecutive actions in physical units.

    Attributes:
        actions: float32 of shape (C, A): C control steps, A action dimensions.
        rate: control rate in Hz.
        time: timestamp (seconds) of the observation that the chunk was computed for.
    """

    actions: np.ndarray
    rate: float
    time: float = 0.0

    def __post_init__(self) -> None:
        actions = np.asarray(self.actions, dtype=np.float32)
        if actions.ndim != 2:
            raise UserError(f"an action chunk must have shape (steps, dimensions), got {actions.shape}")
        object.__setattr__(self, "actions", actions)

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True, eq=False)
class Episode:
    """One recorded episode in memory, as recorders hand it to a writer.

    Attributes:
        images: camera name -> uint8 (T, H, W, 3); frame t is what the policy saw before action t.
        state: float32 (T, S).
        action: float32 (T, A), as executed: the world's seed and these actions replay the frames bit for bit.
        task: instruction.
        meta: per-episode facts written beside it: world, seed, success, render profile, cameras, ...
        extra: further per-frame float32 columns by dataset name, e.g. ``action.expert`` (T, A).
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    task: str
    meta: dict[str, object] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)

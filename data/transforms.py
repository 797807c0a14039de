"""What happens to values between a dataset and a network, each with its inverse: actions relative to the state, normalisation."""

from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ..config import Strict
from ..errors import UserError
from .statistics import Row, Statistics

if TYPE_CHECKING:
    import torch

Kind = Literal["mean_std", "quantile", "min_max", "none"]
KINDS: tuple[Kind, ...] = ("mean_std", "quantile", "min_max", "none")

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


class Relative(Strict):
    """Actions as offsets from the state that the chunk begins in: every step of a chunk less the state at its first step.

    Attributes:
        state_of: per action dimension the state dimension to take away, in the same unit; ``None`` leaves the action as it is.
    """

    state_of: tuple[int | None, ...]

    def apply(self, action: Array, state: Array) -> Array:
        """``action`` (..., C, A) relative to ``state`` (..., S), numpy or torch.

        Raises:
            UserError: the dimensions are not those of ``state_of``.
        """
        return action - self._base(action, state)

    def undo(self, action: Array, state: Array) -> Array:
        """The inverse of ``apply``, up to rounding."""
        return action + self._base(action, state)

    def _base(self, action: Array, state: Array) -> Array:
        """What is added or taken away, (..., 1, A)."""
        largest = max((i for i in self.state_of if i is not None), default=-1)
        if action.shape[-1] != len(self.state_of) or largest >= state.shape[-1] or min((i or 0) for i in self.state_of) < 0:
            raise UserError(
                f"actions of {action.shape[-1]} and states of {state.shape[-1]} dimensions meet {len(self.state_of)} entries up to state "
                f"{largest}; give one entry per action dimension, each a state dimension from 0 on, or none"
            )
        base = state[..., [i or 0 for i in self.state_of]]
        kept = [float(i is not None) for i in self.state_of]
        mask = np.array(kept, base.dtype) if isinstance(base, np.ndarray) else base.new_tensor(kept)
        return (base * mask)[..., None, :]


class Normaliser:
    """An affine map per dimension, ``(x - offset) / scale``, on numpy arrays and torch tensors of shape (..., D).

    ========== ================================== =======================
    kind       offset                             scale
    ========== ================================== =======================
    mean_std   mean                               std
    quantile   (q01 + q99) / 2                    (q99 - q01) / 2
    min_max    (min + max) / 2                    (max - min) / 2
    none       0                                  1
    ========== ================================== =======================

    ``quantile`` and ``min_max`` map to [-1, 1]; nothing is clipped, so that the inverse is exact. A dimension whose
    scale is next to nothing although it varies (a gripper that moves in less than 2 % of the frames) falls back to
    ``min_max``; one that does not vary keeps scale 1. ``guarded`` says so: ``range``, ``constant``, or nothing, per dimension.

    Raises:
        UserError: an unknown kind.
    """

    def __init__(self, statistics: Statistics, kind: Kind = "quantile") -> None:
        s = statistics
        if kind not in KINDS:
            raise UserError(f"normalisation '{kind}' is unknown; choose one of {', '.join(KINDS)}")
        self.kind = kind
        mean, std, low, high, q01, q99 = (np.array(row) for row in (s.mean, s.std, s.min, s.max, s.q01, s.q99))
        ends = ((low + high) / 2, (high - low) / 2)
        offset, scale = {
            "mean_std": (mean, std),
            "quantile": ((q01 + q99) / 2, (q99 - q01) / 2),
            "min_max": ends,
            "none": (np.zeros_like(mean), np.ones_like(mean)),
        }[kind]
        narrow = scale < SMALLEST_SCALE
        offset, scale = np.where(narrow, ends[0], offset), np.where(narrow, ends[1], scale)
        still = scale < SMALLEST_SCALE
        self.guarded = tuple(np.where(still, "constant", np.where(narrow, "range", "")).tolist())
        self.offset = offset.astype(np.float32)
        self.scale = np.where(still, 1.0, scale).astype(np.float32)

    def normalise(self, values: Array) -> Array:
        """Physical units to network units."""
        offset, scale = self._constants(values)
        return (values - offset) / scale

    def unnormalise(self, values: Array) -> Array:
        """Network units to physical units."""
        offset, scale = self._constants(values)
        return values * scale + offset

    def _constants(self, values: Array) -> tuple[Array, Array]:
        if values.shape[-1] != len(self.offset):
            sizes = f"{values.shape[-1]} dimensions meet statistics of {len(self.offset)}"
            raise UserError(f"values of {sizes}; use the statistics of the data that the checkpoint was trained on")
        if isinstance(values, np.ndarray):
            return self.offset, self.scale
        return values.new_tensor(self.offset), values.new_tensor(self.scale)


class Affine(Strict):
    """``(x - shift) / scale + bias`` per dimension, in fp32 and in this order: normalisation that is given rather than derived from
    statistics. Its numbers round as those of the network's origin did, so a value at the end of a range stays there.

    Attributes:
        shift, scale: one number per dimension, or such a row for every step of a chunk. Where the scale is 0 nothing varies: any value
            becomes 0, and what is undone the shift.
        clip: whether values in network units are brought into [-1, 1], on both ways; for all dimensions, or for each.
    """

    shift: Row | tuple[Row, ...]
    scale: Row | tuple[Row, ...]
    bias: float = 0.0
    clip: bool | tuple[bool, ...] = False

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Physical units to network units, float32 (..., D)."""
        shift, scale = np.array(self.shift, np.float32), np.array(self.scale, np.float32)
        still = scale == 0
        normal = np.where(still, np.float32(0), (values.astype(np.float32) - shift) / np.where(still, 1, scale) + np.float32(self.bias))
        return self._clipped(normal)

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """Network units to physical units, float32 (..., D)."""
        shift, scale = np.array(self.shift, np.float32), np.array(self.scale, np.float32)
        return (self._clipped(values.astype(np.float32)) - np.float32(self.bias)) * scale + shift

    def _clipped(self, normal: np.ndarray) -> np.ndarray:
        return np.where(self.clip, normal.clip(-1, 1), normal)


class Angles(Strict):
    """Numbers of the state that a network takes as sine and cosine: of each of the ``groups`` first all sines, then all cosines.

    Attributes:
        groups: where each begins and ends (exclusive), in order.
    """

    groups: tuple[tuple[int, int], ...]

    @property
    def added(self) -> int:
        """How many numbers more the network takes."""
        return sum(end - begin for begin, end in self.groups)

    def apply(self, state: np.ndarray) -> np.ndarray:
        """States (..., S) as the network takes them, (..., S + added)."""
        parts, done = [], 0
        for begin, end in self.groups:
            parts += [state[..., done:begin], np.sin(state[..., begin:end]), np.cos(state[..., begin:end])]
            done = end
        return np.concatenate([*parts, state[..., done:]], axis=-1)


class RelativePose(Strict):
    """Poses of a hand counted from where it is when their chunk begins, in its own frame: three numbers of place and the first two rows
    of its rotation matrix (GR00T's XYZ_ROT6D). What is no rotation quite becomes the nearest by Gram and Schmidt.

    Attributes:
        action, state: where the nine numbers begin.
    """

    action: int
    state: int

    def apply(self, action: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Actions (..., C, A) with their pose seen from that of the state (..., S) of their chunk."""
        place, turn, origin, frame = self._poses(action, state)
        back = frame.swapaxes(-1, -2)
        return self._with(action, (back @ (place - origin)[..., None])[..., 0], back @ turn)

    def undo(self, action: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The inverse of ``apply``."""
        place, turn, origin, frame = self._poses(action, state)
        return self._with(action, (frame @ place[..., None])[..., 0] + origin, frame @ turn)

    def _poses(self, action: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Place and rotation of the actions (..., C, 3) and (..., C, 3, 3), and of the state (..., 1, 3) and (..., 1, 3, 3)."""
        own = action[..., self.action : self.action + 9].astype(np.float64)
        there = state[..., None, self.state : self.state + 9].astype(np.float64)
        return own[..., :3], _rotation(own[..., 3:]), there[..., :3], _rotation(there[..., 3:])

    def _with(self, action: np.ndarray, place: np.ndarray, turn: np.ndarray) -> np.ndarray:
        out = action.copy()
        out[..., self.action : self.action + 9] = np.concatenate([place, turn[..., 0, :], turn[..., 1, :]], axis=-1)
        return out


def _rotation(rows: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of their first two rows (..., 6)."""
    first = rows[..., :3] / np.linalg.norm(rows[..., :3], axis=-1, keepdims=True)
    second = rows[..., 3:] - (first * rows[..., 3:]).sum(-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


SMALLEST_SCALE = 1e-4
"""Half the range, or the standard deviation, that still counts as varying."""

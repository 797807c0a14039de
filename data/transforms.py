"""What happens to values between a dataset and a network: normalisation, with its exact inverse, and image augmentation."""

from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ..errors import UserError
from .statistics import Statistics

if TYPE_CHECKING:
    import torch

Kind = Literal["mean_std", "quantile", "min_max", "none"]
KINDS: tuple[Kind, ...] = ("mean_std", "quantile", "min_max", "none")

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


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
    ``min_max``; one that does not vary keeps scale 1.

    Raises:
        UserError: an unknown kind.
    """

    def __init__(self, statistics: Statistics, kind: Kind = "quantile") -> None:
        if kind not in KINDS:
            raise UserError(f"normalisation '{kind}' is unknown; choose one of {', '.join(KINDS)}")
        self.kind = kind
        s = statistics
        ends = ((s.min + s.max) / 2, (s.max - s.min) / 2)
        offset, scale = {
            "mean_std": (s.mean, s.std),
            "quantile": ((s.q01 + s.q99) / 2, (s.q99 - s.q01) / 2),
            "min_max": ends,
            "none": (np.zeros_like(s.mean), np.ones_like(s.mean)),
        }[kind]
        narrow = scale < SMALLEST_SCALE
        offset, scale = np.where(narrow, ends[0], offset), np.where(narrow, ends[1], scale)
        self.offset = offset.astype(np.float32)
        self.scale = np.where(scale < SMALLEST_SCALE, 1.0, scale).astype(np.float32)

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
            raise UserError(f"values of {values.shape[-1]} dimensions meet statistics of {len(self.offset)}; the data does not fit the checkpoint")
        if isinstance(values, np.ndarray):
            return self.offset, self.scale
        return values.new_tensor(self.offset), values.new_tensor(self.scale)


SMALLEST_SCALE = 1e-4
"""Half the range, or the standard deviation, that still counts as varying."""


def augment(images: "torch.Tensor", generator: "torch.Generator", shift: int = 4, jitter: float = 0.1) -> "torch.Tensor":
    """Shift each image by up to ``shift`` pixels (edges repeated) and change its brightness and contrast.

    Args:
        images: uint8 or float (B, C, H, W); floats in [0, 1].
        generator: seeded by (seed, step), on the CPU.
        shift: pixels, in each direction.
        jitter: largest relative change of brightness and of contrast.

    Returns:
        float32 (B, C, H, W) in [0, 1].
    """
    import torch

    count, _, height, width = images.shape
    moved = images.float() / 255 if images.dtype == torch.uint8 else images
    down, right = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = (torch.arange(height, device=images.device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + right).clamp(0, width - 1)
    moved = moved[torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    brightness, contrast = (1 + jitter * (2 * torch.rand(2, count, 1, 1, 1, generator=generator) - 1)).to(images.device)
    mean = moved.mean((1, 2, 3), keepdim=True)
    return (((moved - mean) * contrast + mean) * brightness).clamp(0, 1)

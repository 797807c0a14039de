"""Augmentation of images where they are: uint8 goes to the device, is varied there and stays uint8.

The numbers are drawn on the host, for a whole global batch, so that they depend neither on the device nor on the number of
processes: draw for all rows, give each process its own.
"""

from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import Field, NonNegativeFloat

from ..config import Strict

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("brightness", "contrast", "saturation", "crop", "across", "down")


class Augment(Strict):
    """Each image's brightness, contrast and colour are scaled by 1 +- the given strength, and it is cropped.

    Attributes:
        crop: largest share of height and width that is cut away; what is left, anywhere in the image, is stretched to full size.
    """

    brightness: NonNegativeFloat = 0.2
    contrast: NonNegativeFloat = 0.2
    saturation: NonNegativeFloat = 0.2
    crop: float = Field(default=0.0, ge=0, lt=1)

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> "Factors":
        """One set of numbers per image of a batch of ``shape``, such as (B, V)."""
        strengths = (self.brightness, self.contrast, self.saturation)
        colour = [rng.uniform(1 - s, 1 + s, shape) for s in strengths]
        place = [rng.uniform(1 - self.crop, 1, shape), *rng.uniform(-1, 1, (2, *shape))] if self.crop else [np.ones(shape)] * 3
        return Factors(np.stack([*colour, *place], -1).astype(np.float32))


class Factors:
    """What was drawn for some images.

    Attributes:
        values: float32 (..., 6) by ``FIELDS``: three factors, the share that is kept, and where it lies, from -1 to 1.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __getitem__(self, rows: slice) -> Self:
        """Those of some rows of the batch."""
        return type(self)(self.values[rows])

    def apply(self, images: "Tensor") -> "Tensor":
        """Vary images, uint8 (..., H, W, 3), on their device; the leading axes are those that were drawn for, and others after them,
        such as the frames of a history, which all vary alike."""
        import torch

        values = torch.from_numpy(self.values).to(images.device)
        values = values.view(*values.shape[:-1], *[1] * (images.ndim - values.ndim - 2), 1, 1, 1, len(FIELDS))
        brightness, contrast, saturation, crop, across, down = values.unbind(-1)
        x = images.float()
        if bool((self.values[..., FIELDS.index("crop")] != 1).any()):
            x = _crop(x, *(v.expand(*x.shape[:-3], 1, 1, 1).reshape(-1) for v in (crop, across, down)))
        x = x * brightness
        mean = x.mean((-3, -2, -1), keepdim=True)
        x = (x - mean) * contrast + mean
        grey = x.mean(-1, keepdim=True)
        return ((x - grey) * saturation + grey).round().clamp(0, 255).to(torch.uint8)


def _crop(images: "Tensor", share: "Tensor", across: "Tensor", down: "Tensor") -> "Tensor":
    """Parts of images (..., H, W, 3), one ``share`` (n,) of both sides each, at full size; bilinear."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    flat = images.flatten(0, -4).permute(0, 3, 1, 2)
    zero = torch.zeros_like(share)
    rows = [torch.stack([share, zero, across * (1 - share)], -1), torch.stack([zero, share, down * (1 - share)], -1)]
    grid = affine_grid(torch.stack(rows, 1), list(flat.shape), align_corners=False)
    moved = grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.permute(0, 2, 3, 1).reshape(images.shape)

"""What happens to pictures and words before a network that has no processor of its own: settings of a checkpoint, as data."""

import re
from collections.abc import Callable, Mapping
from math import floor
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..config import Strict
from ..data.transforms import Angles, Relative, RelativePose
from ..errors import UserError
from ..vla.experts.pretrained import PretrainedVLM
from ..vla.realtime import Realtime


class Resize(Strict):
    """Pictures of any size, scaled to ``height`` x ``width``.

    Attributes:
        shape: ``fit`` scales them until they fit and leaves the rest black, ``padded`` makes them squares with black before they are
            scaled, ``square`` takes squares alone, and ``stretched`` scales each side for itself.
        at: where a picture that fits lies: in the ``centre`` (of an odd rest the larger half comes after it), or at the ``bottom_right``.
        filter: ``bilinear`` takes four pixels and does not round; ``pillow`` is Pillow's, which takes all that shrink into one and rounds;
            ``area`` is OpenCV's INTER_AREA; ``smooth`` is torchvision's with antialiasing, in numbers from 0 to 1 and then cut off.
        crop: the share of each side that is kept from the middle and scaled once more; what is ``stretched`` is scaled after it alone.
        first: height and width for all of this, where Pillow's bicubic filter makes ``height`` x ``width`` of it last.
    """

    height: PositiveInt
    width: PositiveInt
    shape: Literal["fit", "padded", "square", "stretched"] = "fit"
    at: Literal["centre", "bottom_right"] = "centre"
    filter: Literal["bilinear", "pillow", "area", "smooth"] = "bilinear"
    crop: PositiveFloat | None = None
    first: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _squared(self) -> "Resize":
        if self.shape == "fit" and (self.crop is not None or self.first is not None):
            raise ValueError("crop and first are for pictures that are squares; set shape: padded or square")
        if self.shape == "stretched" and self.first is not None:
            raise ValueError("first is for pictures that are squares; set shape: padded or square")
        return self

    def __call__(self, images: UInt8[Tensor, "*S 3 Y X"]) -> Float[Tensor, "*S 3 H W"]:
        """Pixels from 0 to 255.

        Raises:
            UserError: pictures that should be square are not.
        """
        before, (rows, columns) = images.shape[:-3], images.shape[-2:]
        if self.shape == "square" and rows != columns:
            raise UserError(f"a picture is {rows}x{columns}, the policy takes squares; crop or pad it before")
        flat, scale = images.reshape(-1, 3, rows, columns), SCALES[self.filter]
        if self.shape == "stretched":
            last = scale(flat if self.crop is None else _middle(flat, self.crop, round), (self.height, self.width))
            return last.reshape(*before, *last.shape[1:])
        if self.shape != "fit":
            size = self.first or (self.height, self.width)
            whole = scale(_square(flat), size)
            cut = whole if self.crop is None else scale(_middle(whole, self.crop), size)
            last = cut if self.first is None else _pillow(cut, (self.height, self.width), bicubic=True)
            return last.reshape(*before, *last.shape[1:])
        ratio = max(columns / self.width, rows / self.height)
        size = (int(rows / ratio), int(columns / ratio))
        scaled = scale(flat, size).reshape(*before, 3, *size)
        below, right = self.height - size[0], self.width - size[1]
        above, left = (below // 2, right // 2) if self.at == "centre" else (below, right)
        return F.pad(scaled, (left, right - left, above, below - above))


def _bilinear(images: Tensor, size: tuple[int, int]) -> Float[Tensor, "N 3 H W"]:
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)


def _pillow(images: Tensor, size: tuple[int, int], bicubic: bool = False) -> Float[Tensor, "N 3 H W"]:
    from PIL import Image

    kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return _each(images, lambda image: Image.fromarray(image).resize(size[::-1], kind))


def _area(images: Tensor, size: tuple[int, int]) -> Float[Tensor, "N 3 H W"]:
    try:
        import cv2
    except ImportError:
        raise UserError("this policy scales its pictures by OpenCV; pip install opencv-python-headless") from None
    if tuple(images.shape[2:]) == size:
        return images.float()
    return _each(images, lambda image: cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA))


def _smooth(images: Tensor, size: tuple[int, int]) -> Float[Tensor, "N 3 H W"]:
    scaled = F.interpolate(images.float() / 255, size, mode="bilinear", align_corners=False, antialias=True)
    return (scaled * 255).floor()


def _each(images: Tensor, scale: Callable[[np.ndarray], Any]) -> Float[Tensor, "N 3 H W"]:
    """Each picture scaled on the host, as an array (Y, X, 3)."""
    arrays = images.byte().permute(0, 2, 3, 1).cpu().numpy()
    scaled = np.stack([np.asarray(scale(np.ascontiguousarray(array))) for array in arrays])
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).float().to(images.device)


SCALES: Mapping[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "bilinear": _bilinear,
    "pillow": _pillow,
    "area": _area,
    "smooth": _smooth,
}
"""Filter -> (pixels (N, 3, Y, X) from 0 to 255, (H, W)) -> scaled pixels (N, 3, H, W)."""


def _square(images: Tensor) -> Tensor:
    """Pictures (N, 3, Y, X) in the middle of a black square; of an odd rest the larger half comes after it."""
    rows, columns = images.shape[2:]
    side = max(rows, columns)
    above, left = (side - rows) // 2, (side - columns) // 2
    return F.pad(images, (left, side - columns - left, above, side - rows - above))


def _middle(images: Tensor, share: float, whole: Callable[[float], int] = floor) -> Tensor:
    """The middle of pictures (N, 3, Y, X), so much of each side; ``whole``: where it begins if that is a half."""
    height, width = (max(1, int(side * share)) for side in images.shape[2:])
    above, left = whole((images.shape[2] - height) / 2), whole((images.shape[3] - width) / 2)
    return images[:, :, above : above + height, left : left + width]


class Words(Strict):
    """How an instruction becomes the text after the images, and the text tokens.

    Attributes:
        lower: whether capitals become small letters first.
        edits: regular expressions and what replaces them in the instruction, in order.
        state_bins: ``{state}`` in the prompt becomes the number of each normalised dimension's bin, of this many in [-1, 1]; -1 below.
        truncate: whether a text that is too long is cut off, or refused.
        image: what stands in the prompt for one image, as a chat has it; without, the images come before the text.
    """

    lower: bool = False
    edits: tuple[tuple[str, str], ...] = ()
    state_bins: PositiveInt | None = None
    truncate: bool = False
    image: str | None = None

    def fill(self, template: str, instruction: str, state: np.ndarray) -> str:
        """The text of an instruction and a normalised state (S,)."""
        instruction = instruction.lower() if self.lower else instruction
        for pattern, replacement in self.edits:
            instruction = re.sub(pattern, replacement, instruction)
        if self.state_bins:
            bins = np.digitize(state, np.linspace(-1, 1, self.state_bins + 1)[:-1]) - 1
            template = template.replace("{state}", " ".join(map(str, bins)))
        return template.replace("{instruction}", instruction)


class Settings(Strict):
    """What ``settings`` in ``policy.json`` says. Without ``resize`` images must have the contract's size; without ``words`` the model
    folder's own processor makes the prompt; ``relative``, ``poses``: which actions are counted from the state; ``realtime``: how a chunk
    goes on from the one before; ``angles``: which of its numbers are seen as sine and cosine."""

    resize: Resize | None = None
    words: Words | None = None
    relative: Relative | None = None
    poses: tuple[RelativePose, ...] = ()
    realtime: Realtime = Realtime()
    angles: Angles | None = None

    @model_validator(mode="after")
    def _sized(self) -> "Settings":
        if self.words is not None and self.resize is None:
            raise ValueError("words need resize, which says how many tokens an image takes")
        return self

    @property
    def counts(self) -> bool:
        """Whether some actions are counted from the state."""
        return self.relative is not None or bool(self.poses)

    def felt(self, state: np.ndarray) -> np.ndarray:
        """Normalised states (B, S) as the network takes them."""
        return state if self.angles is None else self.angles.apply(state)

    def counted(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Actions (B, C, A) as the network counts them from the state (B, S) in which their chunk begins."""
        for pose in self.poses:
            actions = pose.apply(actions, state)
        return actions if self.relative is None else self.relative.apply(actions, state)

    def absolute(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Actions (B, C, A) that no longer depend on the state (B, S) from which the network counts them."""
        actions = actions if self.relative is None else self.relative.undo(actions, state)
        for pose in self.poses:
            actions = pose.undo(actions, state)
        return actions


class PlainPrompts:
    """Texts -> token ids: the image tokens of all views, then those that the model folder's tokenizer makes of the text. Where the text
    says where images stand (``Words.image``) they are there.

    Args:
        length: of the prompt stream.
        size: (Y, X) of the images.
    """

    def __init__(self, vlm: PretrainedVLM, length: int, words: Words, size: tuple[int, int]) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(vlm.folder)
        self.words, self.length, self.image_token = words, length, vlm.image_token
        rows, columns = vlm.grid(size)
        self.per_view = rows * columns

    def __call__(self, texts: list[str], views: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Right-padded ids and their presence.

        Raises:
            UserError: a text needs more than the stream's length and must not be cut off.
        """
        shown = 0 if self.words.image else views * self.per_view
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        ids[:, :shown] = self.image_token
        present = torch.arange(self.length).expand(len(texts), -1) < shown
        for i, text in enumerate(texts):
            text = text.replace(self.words.image, self.words.image * self.per_view) if self.words.image else text
            row = self.tokenizer(text, truncation=self.words.truncate, max_length=self.length - shown)["input_ids"]
            end = shown + len(row)
            if end > self.length:
                said = texts[i]
                raise UserError(f"the text '{said}' takes {len(row)} tokens, the policy has room for {self.length - shown}; shorten it")
            ids[i, shown:end], present[i, shown:end] = torch.tensor(row), True
        return ids, present

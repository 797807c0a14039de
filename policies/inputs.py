"""What happens to pictures and words before a network that has no processor of its own: settings of a checkpoint, as data."""

import re
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..config import Strict
from ..data.transforms import Relative
from ..errors import UserError
from ..vla.experts.pretrained import PretrainedVLM


class Resize(Strict):
    """Pictures of any size, scaled bilinearly until they fit into ``height`` x ``width``, the rest black.

    Attributes:
        at: where the picture then lies: in the ``centre`` (of an odd rest the larger half comes after it), or at the ``bottom_right``.
        filter: ``bilinear`` takes four pixels and does not round; ``pillow`` is Pillow's, which takes all that shrink into one and rounds.
    """

    height: PositiveInt
    width: PositiveInt
    at: Literal["centre", "bottom_right"] = "centre"
    filter: Literal["bilinear", "pillow"] = "bilinear"

    def __call__(self, image: UInt8[Tensor, "3 Y X"]) -> Float[Tensor, "3 H W"]:
        """Pixels from 0 to 255."""
        ratio = max(image.shape[2] / self.width, image.shape[1] / self.height)
        size = (int(image.shape[1] / ratio), int(image.shape[2] / ratio))
        scaled = _pillow(image, size) if self.filter == "pillow" else F.interpolate(image[None].float(), size, mode="bilinear")[0]
        below, right = self.height - size[0], self.width - size[1]
        above, left = (below // 2, right // 2) if self.at == "centre" else (below, right)
        return F.pad(scaled, (left, right - left, above, below - above))


def _pillow(image: UInt8[Tensor, "3 Y X"], size: tuple[int, int]) -> Float[Tensor, "3 H W"]:
    from PIL import Image

    scaled = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float()


class Words(Strict):
    """How an instruction becomes the text after the images, and the text tokens.

    Attributes:
        edits: regular expressions and what replaces them in the instruction, in order.
        state_bins: ``{state}`` in the prompt becomes the number of each normalised dimension's bin, of this many in [-1, 1]; -1 below.
        truncate: whether a text that is too long is cut off, or refused.
    """

    edits: tuple[tuple[str, str], ...] = ()
    state_bins: PositiveInt | None = None
    truncate: bool = False

    def fill(self, template: str, instruction: str, state: np.ndarray) -> str:
        """The text of an instruction and a normalised state (S,)."""
        for pattern, replacement in self.edits:
            instruction = re.sub(pattern, replacement, instruction)
        if self.state_bins:
            bins = np.digitize(state, np.linspace(-1, 1, self.state_bins + 1)[:-1]) - 1
            template = template.replace("{state}", " ".join(map(str, bins)))
        return template.replace("{instruction}", instruction)


class Settings(Strict):
    """What ``settings`` in ``policy.json`` says. Without ``resize`` images must have the contract's size; without ``words`` the model
    folder's own processor makes the prompt; ``relative``: which actions the state is added to."""

    resize: Resize | None = None
    words: Words | None = None
    relative: Relative | None = None

    @model_validator(mode="after")
    def _sized(self) -> "Settings":
        if self.words is not None and self.resize is None:
            raise ValueError("words need resize, which says how many tokens an image takes")
        return self


class PlainPrompts:
    """Texts -> token ids: the image tokens of all views, then those that the model folder's tokenizer makes of the text.

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
        shown = views * self.per_view
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        ids[:, :shown] = self.image_token
        present = torch.arange(self.length).expand(len(texts), -1) < shown
        for i, text in enumerate(texts):
            row = self.tokenizer(text, truncation=self.words.truncate, max_length=self.length - shown)["input_ids"]
            end = shown + len(row)
            if end > self.length:
                raise UserError(f"the text '{text}' takes {len(row)} tokens, the policy has room for {self.length - shown}; shorten it")
            ids[i, shown:end], present[i, shown:end] = torch.tensor(row), True
        return ids, present

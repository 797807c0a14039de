"""A transformers VLM as an expert: its own modules do every step but the joint attention.

One small adapter per *architecture family* names where a family keeps its parts; nothing of transformers is copied or
patched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ...errors import UserError
from ..attention import rotate
from ..spec import PretrainedExpert, Space
from ..weights.references import resolve_weights
from .base import QKV, Expert


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts.

    Attributes:
        text: the model -> its text transformer (``embed_tokens``, ``layers``, ``norm``).
        images: (model, pixels (B*V, 3, H, W) as its processor normalises them) -> image tokens (B*V, T, D).
    """

    text: Callable[[Any], Any]
    images: Callable[[Any, Tensor], Tensor]


def _smolvlm_images(model: Any, pixels: Tensor) -> Tensor:
    vision = model.model.vision_model
    side = vision.config.patch_size
    patches = torch.ones(pixels.shape[0], pixels.shape[2] // side, pixels.shape[3] // side, dtype=torch.bool, device=pixels.device)
    return model.model.connector(vision(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state)


_LLAMA_TEXT = Family(text=lambda model: model.model.text_model, images=_smolvlm_images)
FAMILIES: dict[str, Family] = {"smolvlm": _LLAMA_TEXT, "idefics3": _LLAMA_TEXT}
"""transformers ``model_type`` -> its family."""


class PretrainedVLM(Expert):
    """See ``Expert``. Weights stay in fp32: a bf16 SmolVLM buckets its patch positions wrongly (12 a side become 9).

    Raises:
        UserError: the folder holds no model of a known family.
    """

    def __init__(self, config: PretrainedExpert) -> None:
        super().__init__()
        self.folder: Path = resolve_weights(config.reference, "vlm")
        self.model, self.family = _load(self.folder, config.fresh)
        text_config = self.model.config.text_config
        self.width: int = text_config.hidden_size
        self.depth: int = text_config.num_hidden_layers
        self.head_dim: int = text_config.head_dim
        vision = self.model.config.vision_config
        self.image_tokens: int = (vision.image_size // vision.patch_size // self.model.config.scale_factor) ** 2
        self.frozen = config.frozen
        if config.frozen:
            self.requires_grad_(False)
            self.eval()

    @property
    def space(self) -> Space:
        """The attention space that these weights were trained in."""
        config = self.model.config.text_config
        theta = config.rope_parameters["rope_theta"]
        return Space(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=self.head_dim, rope_theta=theta)

    def train(self, mode: bool = True) -> "PretrainedVLM":
        """A frozen expert stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def embed(self, images: UInt8[Tensor, "B V 3 Y X"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Prompt embeddings: text tokens, with the image tokens of the V views put in their places in order."""
        pixels = images.flatten(0, 1).float() / 127.5 - 1.0  # the processor's mean and std are 0.5 (checked at load)
        features = self.family.images(self.model, pixels)
        text = self.family.text(self.model).embed_tokens(ids)
        slots = (ids == self.model.config.image_token_id)[..., None]
        return text.masked_scatter(slots, features.to(text.dtype))

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T Z"]:
        """Vocabulary scores of final hidden states."""
        return self.model.lm_head(hidden)

    def condition(self, time: Tensor | None) -> None:
        """A pretrained VLM knows no flow time."""
        return None

    def project(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        part = self.family.text(self.model).layers[layer]
        normed = part.input_layernorm(x)
        linears = (part.self_attn.q_proj, part.self_attn.k_proj, part.self_attn.v_proj)
        q, k, v = (linear(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in linears)
        return rotate(q, phase), rotate(k, phase), v

    def finish(
        self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], condition: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        part = self.family.text(self.model).layers[layer]
        x = x + part.self_attn.o_proj(attended)
        return x + part.mlp(part.post_attention_layernorm(x))

    def final(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return self.family.text(self.model).norm(x)


class PromptEncoder:
    """Text and a number of views -> token ids, through the model folder's own processor.

    The ids depend on the text alone, so each text is encoded once and kept.
    """

    def __init__(self, folder: Path, length: int) -> None:
        from transformers import AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(folder)
        images = self.processor.image_processor
        if list(images.image_mean) != [0.5] * 3 or list(images.image_std) != [0.5] * 3:
            raise UserError(
                f"{folder}: images are normalised with mean {images.image_mean} and std {images.image_std}; only 0.5 is supported"
            )
        self.side = int(images.size["longest_edge"])
        self.length = length
        self._known: dict[tuple[str, int], Tensor] = {}

    def __call__(self, texts: list[str], views: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Right-padded ids and their presence.

        Raises:
            UserError: a text needs more than the stream's length.
        """
        rows = [self._encode(text, views) for text in texts]
        ids = torch.full((len(rows), self.length), self.processor.tokenizer.pad_token_id, dtype=torch.long)
        present = torch.zeros(len(rows), self.length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            present[i, : len(row)] = True
        return ids, present

    def _encode(self, text: str, views: int) -> Tensor:
        if (text, views) not in self._known:
            from PIL import Image

            blank = [Image.new("RGB", (self.side, self.side))] * views
            prompt = self.processor.image_token * views + text
            row = self.processor(text=prompt, images=blank, return_tensors="pt")["input_ids"][0]
            if len(row) > self.length:
                raise UserError(
                    f"the instruction '{text}' with {views} views takes {len(row)} tokens, the spec's prompt stream holds {self.length}; "
                    "shorten it or raise the stream's length"
                )
            self._known[text, views] = row
        return self._known[text, views]


def _load(folder: Path, fresh: bool) -> tuple[Any, Family]:
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no transformers model (no config.json); give a folder written by save_pretrained")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise UserError(f"{folder} is a '{config.model_type}' model; known families: {', '.join(FAMILIES)}")
    if fresh:  # always the same weights, so that a frozen random expert need not be stored
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model, FAMILIES[config.model_type]

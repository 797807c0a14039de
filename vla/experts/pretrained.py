"""A transformers VLM as an expert: its own modules do every step but the joint attention.

One small adapter per *architecture family* (``families.py``) names where a family keeps its parts; nothing of transformers is
copied or patched.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ...errors import UserError
from ..attention import rotary, rotate
from ..graph import Own
from ..spec import PretrainedExpert, Space
from ..weights.references import resolve_architecture, resolve_weights
from .base import QKV, Context, Expert, Prompt
from .families import FAMILIES, Family, positions


class PretrainedVLM(Expert):
    """See ``Expert``. Weights stay in fp32: a bf16 SmolVLM buckets its patch positions wrongly (12 a side become 9).

    Raises:
        UserError: the folder holds no model of a known family, or one with layers that do not attend (LFM2's own).
    """

    def __init__(self, config: PretrainedExpert, rope_theta: float | None = None) -> None:
        super().__init__()
        self.rope_theta = rope_theta if config.rotary == "space" else None
        sketched = torch.get_default_device().type == "meta"  # names and shapes alone
        self.folder: Path = resolve_architecture(config.reference) if sketched else resolve_weights(config.reference, "vlm")
        self.model, self.family = _load(self.folder, config.fresh or sketched)
        text_config = self.model.config.get_text_config()
        text = self.family.text(self.model)
        if not all(hasattr(layer, "self_attn") for layer in text.layers):
            way_out = "give a VLM whose layers all attend"
            raise UserError(
                f"{self.folder}: some layers of its '{text_config.model_type}' have no attention, and it cannot run here; {way_out}"
            )
        text.layers = text.layers[: config.layers]
        self.width: int = text_config.hidden_size
        self.depth: int = len(text.layers)
        self.head_dim: int = getattr(text_config, "head_dim", None) or self.width // text_config.num_attention_heads
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.family.mean, self.family.std))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)
        heads, groups = text_config.num_attention_heads, text_config.num_key_value_heads
        theta = self.rope_theta or text_config.rope_parameters["rope_theta"]
        self.space = Space(heads=heads, kv_heads=groups, head_dim=self.head_dim, rope_theta=theta)
        self.normed = config.final_norm
        if config.frozen:
            self.requires_grad_(False)
            self.eval()

    @property
    def image_token(self) -> int:
        """The id that stands for an image token in a prompt."""
        return int(self.model.config.image_token_id)

    @property
    def side(self) -> int | None:
        """The side of the square images that it was made for; None where any will do."""
        size = getattr(self.model.config.vision_config, "image_size", None)
        return size[0] if isinstance(size, list | tuple) else size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image of ``size`` (Y, X)."""
        return self.family.grid(self.model, size)

    def units(self) -> list[nn.Module]:
        return list(self.family.text(self.model).layers)

    def normalise(self, images: UInt8[Tensor, "*S 3 Y X"] | Float[Tensor, "*S 3 Y X"]) -> Float[Tensor, "*S 3 Y X"]:
        """Pixels from 0 to 255 as the family's processor makes them."""
        return (images.float() / 255 - self.mean) / self.std

    def look(self, images: UInt8[Tensor, "B V 3 Y X"] | Float[Tensor, "B V 3 Y X"]) -> tuple[Tensor, ...]:
        """Image tokens (B * V, T, D), and what is added to them after each of the first layers."""
        seen = self.family.images(self.model, self.normalise(images.flatten(0, 1)))
        return (seen.tokens, *seen.inject)

    def embed(
        self,
        images: UInt8[Tensor, "B V 3 Y X"] | Float[Tensor, "B V 3 Y X"],
        ids: Int[Tensor, "B T"],
        present: Bool[Tensor, "B T"] | None,
        seen: tuple[Tensor, ...] | None = None,
    ) -> Prompt:
        """Prompt embeddings: text tokens, with the image tokens of the V views (``look``, unless ``seen`` before) put in their places
        in order."""
        tokens, *added = self.look(images) if seen is None else seen
        slots = ids == self.image_token
        text = self.family.text(self.model).embed_tokens(torch.where(slots, 0, ids))  # an image's id may lie outside the vocabulary
        x = text.masked_scatter(slots[..., None], tokens.to(text.dtype))
        inject = tuple(torch.zeros_like(text).masked_scatter(slots[..., None], part.to(text.dtype)) for part in added)
        return Prompt(x, inject, self.own(ids, present, (images.shape[-2], images.shape[-1])))

    def own(self, ids: Int[Tensor, "B T"], present: Bool[Tensor, "B T"] | None, size: tuple[int, int]) -> Own | None:
        """Positions of a prompt with images of ``size`` (Y, X), where the family counts them in its own way."""
        if self.family.axes == 1:
            return None
        is_image = ids == self.image_token
        return positions(is_image, torch.ones_like(is_image) if present is None else present, self.grid(size))

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T Z"]:
        """Vocabulary scores of final hidden states."""
        return self.model.lm_head(hidden if self.normed else self.family.text(self.model).norm(hidden))

    def condition(self, time: Tensor | None) -> None:
        """A pretrained VLM knows no flow time."""
        return None

    def phase(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope_theta is not None:
            return rotary(ids, self.head_dim, self.rope_theta)
        if self.family.axes > 1 and ids.ndim == 2:
            ids = ids.expand(self.family.axes, -1, -1)
        return self.family.phase(self.family.text(self.model), x, ids)

    def project(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        part = self.family.text(self.model).layers[layer]
        own = part.self_attn
        normed = part.input_layernorm(x)
        q, k, v = (linear(normed).unflatten(-1, (-1, self.head_dim)) for linear in (own.q_proj, own.k_proj, own.v_proj))
        if hasattr(own, "q_norm"):  # per head, where the architecture has it
            q, k = own.q_norm(q), own.k_norm(k)
        return rotate(q.transpose(1, 2), phase), rotate(k.transpose(1, 2), phase), v.transpose(1, 2)

    def finish(
        self,
        layer: int,
        x: Float[Tensor, "B T D"],
        attended: Float[Tensor, "B T NH"],
        condition: Tensor | None,
        context: Context | None = None,
    ) -> Float[Tensor, "B T D"]:
        part = self.family.text(self.model).layers[layer]
        x = x + part.self_attn.o_proj(attended)
        return x + part.mlp(part.post_attention_layernorm(x))

    def final(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return self.family.text(self.model).norm(x) if self.normed else x


class PromptEncoder:
    """Text and a number of views -> token ids, through the model folder's own processor.

    The ids depend on the text alone, so each text is encoded once and kept.
    """

    def __init__(self, vlm: PretrainedVLM, length: int) -> None:
        from transformers import AutoProcessor

        folder, family = vlm.folder, vlm.family
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        images = self.processor.image_processor
        if tuple(images.image_mean) != family.mean or tuple(images.image_std) != family.std:
            raise UserError(
                f"{folder}: images are normalised with mean {images.image_mean} and std {images.image_std}, its family uses "
                f"{family.mean} and {family.std}; correct the processor's configuration"
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

"""Sizes of released lerobot policies, out of their tensors' shapes: in the words of a transformers config and of a spec.

What a shape does not tell stands in ``HEAD_DIM`` and ``VISION_HEADS``; the rest is that of the published architecture.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import merge
from ...errors import UserError
from .lerobot import pi_weights, smolvla_weights
from .references import resolve_weights

HEAD_DIM = {("paligemma", 2048): 256, ("paligemma", 1024): 256, ("smolvlm", 960): 64, ("smolvlm", 576): 64}
"""(model type, width of the language model) -> width of a head: Gemma 2B and 300M, SmolLM2 360M and 135M."""
VISION_HEADS = {("paligemma", 1152): 16, ("smolvlm", 768): 12}
"""(model type, width of the vision tower) -> heads: SigLIP So400m and base."""


@dataclass(frozen=True)
class Layout:
    """Where a kind of lerobot policy keeps its parts.

    Attributes:
        spec: name of our spec; architecture: of its VLM, in ``assets/architectures``.
        vlm, expert: what its tensors' names begin with; text, vision: the same within ``vlm``.
        rename: its state dict in our names.
    """

    spec: str
    architecture: str
    vlm: str
    expert: str
    text: str
    vision: str
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _pi(spec: str) -> Layout:
    body = "paligemma_with_expert."
    towers = ("model.language_model.", "model.vision_tower.vision_model.")
    return Layout(spec, "paligemma_3b_224", f"{body}paligemma.", f"{body}gemma_expert.model.", *towers, pi_weights)


LAYOUTS: Mapping[str, Layout] = {
    "pi0": _pi("pi0"),
    "pi05": _pi("pi05"),
    "smolvla": Layout(
        "smolvla",
        "smolvlm2_500m",
        "vlm_with_expert.vlm.",
        "vlm_with_expert.lm_expert.",
        "model.text_model.",
        "model.vision_model.",
        smolvla_weights,
    ),
}
"""``type`` in lerobot's ``config.json`` -> its layout."""


class Shapes(dict[str, tuple[int, ...]]):
    """Names and shapes of the tensors in ``file``; to ask for one that is not there is an error that names it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
        super().__init__(shapes)
        self.file = file

    def __missing__(self, name: str) -> tuple[int, ...]:
        way_out = "save the policy anew with lerobot 0.6.1, or give the folder of another"
        raise UserError(f"{self.file} has no tensor '{name}', which a policy of the type in its config.json has; {way_out}")

    def layers(self, prefix: str) -> int:
        """How many layers there are under ``prefix``."""
        return len({name.removeprefix(prefix).split(".")[0] for name in self if name.startswith(prefix)})


def vlm_config(layout: Layout, shapes: Shapes) -> dict[str, Any]:
    """The transformers config of the policy's VLM.

    Raises:
        UserError: a tensor is missing, or a width is one whose heads are not known.
    """
    base = json.loads((resolve_weights(f"config:{layout.architecture}", "vlm") / "config.json").read_text())
    text, vision, kind = layout.vlm + layout.text, layout.vlm + layout.vision, base["model_type"]
    words, head = f"{text}embed_tokens.weight", f"{layout.vlm}lm_head.weight"
    vocabulary, width = shapes[words if words in shapes else head]
    tower, _, patch, _ = shapes[f"{vision}embeddings.patch_embedding.weight"]
    for table, wide in ((HEAD_DIM, width), (VISION_HEADS, tower)):
        if (kind, wide) not in table:
            known = " or ".join(str(size) for family, size in table if family == kind)
            raise UserError(f"{shapes.file}: nothing says how many heads a {kind} of width {wide} has; known widths are {known}")
    head_dim = HEAD_DIM[kind, width]
    first = f"{text}layers.0."
    top: dict[str, Any] = {"image_token_id": vocabulary}  # outside it, so that no text means an image
    if kind == "paligemma":
        top = {"image_token_index": vocabulary, "hidden_size": width, "projection_dim": width, "vocab_size": vocabulary}
    else:
        top["scale_factor"] = isqrt(shapes[f"{layout.vlm}model.connector.modality_projection.proj.weight"][1] // tower)
    tied = {"tie_word_embeddings": kind == "paligemma" or not {words, head} <= shapes.keys()}
    sizes = {
        "text_config": tied
        | {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes[f"{first}mlp.gate_proj.weight"][0],
            "num_hidden_layers": shapes.layers(f"{text}layers."),
            "head_dim": head_dim,
            "num_attention_heads": shapes[f"{first}self_attn.q_proj.weight"][0] // head_dim,
            "num_key_value_heads": shapes[f"{first}self_attn.k_proj.weight"][0] // head_dim,
        },
        "vision_config": {
            "hidden_size": tower,
            "intermediate_size": shapes[f"{vision}encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": shapes.layers(f"{vision}encoder.layers."),
            "num_attention_heads": VISION_HEADS[kind, tower],
            "patch_size": patch,
            "image_size": isqrt(shapes[f"{vision}embeddings.position_embedding.weight"][0]) * patch,
        },
    }
    if kind == "paligemma":
        sizes["vision_config"]["projection_dim"] = width
    return merge(base, top | tied | sizes)


def spec_changes(layout: Layout, shapes: Shapes, vlm: Mapping[str, Any], size: tuple[int, int], words: int, views: int) -> dict[str, Any]:
    """What makes the spec of the layout that of the policy, to be merged into it.

    Args:
        vlm: its ``vlm_config``.
        size: (Y, X) of the images; words: text tokens; views: cameras.

    Raises:
        UserError: a tensor is missing, or the images are not of a size that the vision tower takes.
    """
    text, vision, expert = vlm["text_config"], vlm["vision_config"], layout.expert
    cell = vision["patch_size"] * vlm.get("scale_factor", 1)
    fixed = "scale_factor" not in vlm and size[0] != vision["image_size"]
    if size[0] != size[1] or size[0] % cell or fixed:
        raise UserError(
            f"{shapes.file}: its config.json scales images to {size[0]}x{size[1]}, its vision tower takes squares of "
            + (f"{vision['image_size']}" if fixed else f"a multiple of {cell}")
            + "; correct the size there"
        )
    heads = {"heads": text["num_attention_heads"], "kv_heads": text["num_key_value_heads"], "head_dim": text["head_dim"]}
    act = {
        "width": shapes[f"{expert}layers.0.self_attn.q_proj.weight"][1],
        "depth": shapes.layers(f"{expert}layers."),
        "ffn": shapes[f"{expert}layers.0.mlp.gate_proj.weight"][0],
    }
    return {
        "space": heads,
        "experts": {"und": {"layers": None}, "act": act},
        "streams": {"obs": {"length": views * (size[0] // cell) ** 2 + words}},
        "heads": {"action": {"action_dim": shapes["action_in_proj.weight"][1]}},
    }

"""What differs between the architectures of transformers' VLMs: one ``Family`` each, nothing else knows their names.

All of them share the layer that ``pretrained.py`` runs: norm, q/k/v (normed per head where the module has such norms),
attention, output projection, norm, MLP. A family names where its parts are, how pixels become image tokens, and how
positions become rotary phases.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import Own

Triple = tuple[float, float, float]
HALF: Triple = (0.5, 0.5, 0.5)
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Seen:
    """Image tokens (N, T, D), and what is added to them after each of the first layers (DeepStack), tensors (N, T, D)."""

    tokens: Tensor
    inject: tuple[Tensor, ...] = ()


Images = Callable[[Any, Tensor], Seen]
Phase = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        text: the model -> its text transformer (``embed_tokens``, ``layers``, ``norm``, ``rotary_emb``).
        images: (model, normalised pixels (N, 3, Y, X)) -> ``Seen``.
        grid: (model, (Y, X)) -> rows and columns of an image's tokens.
        alone: (model, ids, pixels (B, V, 3, Y, X)) -> further arguments of the model's own forward for the same prompt.
        phase: (text transformer, x, positions) -> cosine and sine (B, T, H).
        axes: rotary axes; with 3 an image's tokens have a time, a row and a column, and the next token follows the larger side.
        bidirectional: whether a prompt's tokens read each other both ways (a prefix LM).
        narrows: whether its modules were tried with weights in bf16 and are right. SmolVLM's are not: see ``PretrainedVLM``.
        waits: whether its vision tower reads numbers back to the host (transformers 5.5), so that no CUDA graph can hold it.
        mean, std: of the published processors' image normalisation.
    """

    text: Callable[[Any], Any]
    images: Images
    grid: Callable[[Any, tuple[int, int]], tuple[int, int]]
    alone: Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
    phase: Phase
    axes: int = 1
    bidirectional: bool = False
    narrows: bool = False
    waits: bool = False
    mean: Triple = HALF
    std: Triple = HALF


def positions(is_image: Tensor, present: Tensor, grid: tuple[int, int]) -> Own:
    """Positions of a prompt whose image tokens have a time, a row and a column (Qwen2-VL's multimodal rotary positions).

    A text token's three numbers are the same and count on; an image's tokens start from there with their row and column in
    the ``grid`` added, and what follows goes on after the larger side. Absent tokens do not count, so a missing view moves
    nothing that is there.

    Args:
        is_image: (B, T) image tokens, whole images in order.
        present: (B, T).

    Returns:
        positions (3, B, T) and their reach.
    """
    rows, columns = grid
    shown, words = present & is_image, present & ~is_image
    seen, said = (mask.long().cumsum(1) - mask.long() for mask in (shown, words))  # before each token
    start = said + seen // (rows * columns) * max(grid)
    within = torch.where(shown, seen % (rows * columns), 0)
    out = torch.stack([start, start + within // columns, start + within % columns])
    reach = words.sum(1, keepdim=True) + shown.sum(1, keepdim=True) // (rows * columns) * max(grid)
    return Own(torch.where(present, out, 0), reach)


def flat_patches(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Pixels (N, 3, Y, X) -> patches (N * y * x, 3 * frames * patch * patch) as Qwen's vision towers take them: patches of one merged
    token lie together, and an image is a film of ``frames`` equal pictures."""
    cells = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (N, 3, y, x, p, p)
    cells = cells.unflatten(3, (-1, merge)).unflatten(2, (-1, merge))  # (N, 3, y/m, m, x/m, m, p, p)
    cells = cells.permute(0, 2, 4, 3, 5, 1, 6, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    return cells.flatten(5).flatten(0, 4)


# the parts of each architecture -------------------------------------------------------------------------------------


def _plain_phase(text: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = text.rotary_emb(x, ids)
    return cos, sin


def _sectioned_phase(text: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen2.5-VL: consecutive sections of the channels turn by time, row and column (newer transformers join them themselves)."""
    cos, sin = text.rotary_emb(x, ids)
    if cos.ndim == 3:
        return cos, sin
    sections = text.config.rope_parameters["mrope_section"] * 2
    joined = [torch.cat([part[i % 3] for i, part in enumerate(phase.split(sections, dim=-1))], dim=-1) for phase in (cos, sin)]
    return joined[0], joined[1]


def _smolvlm_images(model: Any, pixels: Tensor) -> Seen:
    vision = model.model.vision_model
    side = vision.config.patch_size
    patches = torch.ones(pixels.shape[0], pixels.shape[2] // side, pixels.shape[3] // side, dtype=torch.bool, device=pixels.device)
    return Seen(model.model.connector(vision(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state))


def _tower_images(model: Any, pixels: Tensor) -> Seen:
    return Seen(model.model.get_image_features(pixels, return_dict=True).pooler_output)


def _shuffled_images(model: Any, pixels: Tensor) -> Seen:
    """Cohere's vision model: whatever tower and text model its configuration names, four neighbouring patches a token."""
    return Seen(model.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(1, 2))


def _internvl_images(model: Any, pixels: Tensor) -> Seen:
    config = model.config
    layer, select = config.vision_feature_layer, config.vision_feature_select_strategy
    features = model.model.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=select, return_dict=True)
    return Seen(features.pooler_output)


def _naflex_inputs(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """SigLIP 2's arguments: patches (N, T, p * p * 3) row by row, the rows and columns of each picture, and that all of them are there."""
    side = model.config.vision_config.patch_size
    cells = pixels.unfold(2, side, side).unfold(3, side, side)  # (N, 3, y, x, p, p)
    shape = torch.tensor([cells.shape[2:4]], device=pixels.device).expand(len(pixels), -1)
    patches = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    there = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    return {"pixel_values": patches, "spatial_shapes": shape, "pixel_attention_mask": there}


def _naflex_images(model: Any, pixels: Tensor) -> Seen:
    return Seen(torch.stack(model.model.get_image_features(**_naflex_inputs(model, pixels), return_dict=True).pooler_output))


def _qwen_inputs(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    vision = model.config.vision_config
    side = vision.patch_size
    grid = torch.tensor([[1, pixels.shape[-2] // side, pixels.shape[-1] // side]], device=pixels.device)
    return flat_patches(pixels, side, vision.spatial_merge_size, vision.temporal_patch_size), grid.expand(len(pixels), -1)


def _qwen_images(model: Any, pixels: Tensor) -> Seen:
    patches, grids = _qwen_inputs(model, pixels)
    out = model.model.visual(patches, grid_thw=grids, return_dict=True)
    tokens, *inject = (f.unflatten(0, (len(pixels), -1)) for f in (out.pooler_output, *(getattr(out, "deepstack_features", None) or ())))
    return Seen(tokens, tuple(inject))


def _views(model: Any, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


def _flat_views(model: Any, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels.flatten(0, 1)}


def _naflex_views(model: Any, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    return _naflex_inputs(model, pixels.flatten(0, 1))


def _prefix_views(model: Any, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    return _flat_views(model, ids, pixels) | {"token_type_ids": torch.zeros_like(ids)}


def _qwen_views(model: Any, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    patches, grids = _qwen_inputs(model, pixels.flatten(0, 1))
    return {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}


def _grid(cell: Callable[[Any], float]) -> Callable[[Any, tuple[int, int]], tuple[int, int]]:
    """Tokens of an image, from the side in pixels of one token."""
    return lambda model, size: (int(size[0] / cell(model.config)), int(size[1] / cell(model.config)))


_SMOLVLM = Family(
    text=lambda model: model.model.text_model,
    images=_smolvlm_images,
    grid=_grid(lambda c: c.vision_config.patch_size * c.scale_factor),
    alone=_views,
    phase=_plain_phase,
    waits=True,
)
_PALIGEMMA = Family(
    text=lambda model: model.model.language_model,
    images=_tower_images,
    grid=_grid(lambda c: c.vision_config.patch_size),
    alone=_prefix_views,
    phase=_plain_phase,
    bidirectional=True,
    narrows=True,
)
_COHERE = Family(
    text=lambda model: model.model.language_model,
    images=_shuffled_images,
    grid=_grid(lambda c: c.vision_config.patch_size * c.downsample_factor),
    alone=_flat_views,
    phase=_plain_phase,
    narrows=True,
)
_LFM2_VL = Family(  # whatever text model its configuration names, of attention layers alone
    text=lambda model: model.model.language_model,
    images=_naflex_images,
    grid=_grid(lambda c: c.vision_config.patch_size * c.downsample_factor),
    alone=_naflex_views,
    phase=_plain_phase,
    narrows=True,
    waits=True,
)
_INTERNVL = Family(
    text=lambda model: model.model.language_model,
    images=_internvl_images,
    grid=_grid(lambda c: c.vision_config.patch_size[0] / c.downsample_ratio),
    alone=_flat_views,
    phase=_plain_phase,
    narrows=True,
    mean=IMAGENET[0],
    std=IMAGENET[1],
)
_QWEN3_VL = Family(
    text=lambda model: model.model.language_model,
    images=_qwen_images,
    grid=_grid(lambda c: c.vision_config.patch_size * c.vision_config.spatial_merge_size),
    alone=_qwen_views,
    phase=_plain_phase,
    axes=3,
    narrows=True,
    waits=True,
)
_QWEN2_5_VL = Family(
    text=_QWEN3_VL.text,
    images=_qwen_images,
    grid=_QWEN3_VL.grid,
    alone=_qwen_views,
    phase=_sectioned_phase,
    axes=3,
    narrows=True,
    waits=True,
    mean=CLIP[0],
    std=CLIP[1],
)

FAMILIES: Mapping[str, Family] = {
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "paligemma": _PALIGEMMA,
    "cohere2_vision": _COHERE,
    "lfm2_vl": _LFM2_VL,
    "internvl": _INTERNVL,
    "qwen3_vl": _QWEN3_VL,
    "qwen2_5_vl": _QWEN2_5_VL,
}
"""transformers ``model_type`` -> its family."""

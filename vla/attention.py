"""The one attention function, and rotary positions."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

LONG = 1024
"""Rows from which on a masked forward on a GPU skips blocks of the mask that are empty."""


def attend(
    q: Float[Tensor, "B N Tq H"],
    k: Float[Tensor, "B G Tk H"],
    v: Float[Tensor, "B G Tk H"],
    mask: Bool[Tensor, "#B 1 Tq Tk"] | Float[Tensor, "#B 1 Tq Tk"] | BlockMask | None,
) -> Float[Tensor, "B Tq NH"]:
    """Grouped-query attention over the shared space, scaled by 1/sqrt(H).

    ``mask`` is True where a row may read, or what is added to the scores (``bias``), or the blocks of it that are not empty (``blocks``).
    """
    if isinstance(mask, BlockMask):
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).flatten(2)
    batch, heads, rows, size = q.shape
    groups = heads // k.shape[1]
    if q.device.type == "cpu" and rows < 256:  # few rows: the products beat the fused kernel, most of all its backward
        asked = (q * size**-0.5).reshape(batch, k.shape[1], groups * rows, size)  # heads that share a key head are rows of one product
        scores = torch.matmul(asked, k.transpose(2, 3))
        if mask is not None:
            each = scores.unflatten(2, (groups, rows))
            mask = mask[:, :, None]
            each = each.masked_fill(~mask, torch.finfo(q.dtype).min) if mask.dtype == torch.bool else each + mask
            scores = each.flatten(2, 3)
        out = torch.matmul(torch.softmax(scores, dim=-1), v).reshape(q.shape)
    else:
        if groups > 1:  # expanding keys keeps the fast SDPA paths, which enable_gqa with a mask leaves
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def blocks(mask: Bool[Tensor, "#B 1 Tq Tk"]) -> BlockMask:
    """A boolean mask for FlexAttention, which computes the blocks of 128 x 128 tokens in which anything may be read.

    Made once for all layers of a forward. For CUDA: on a CPU FlexAttention has no backward (torch 2.11).
    """
    batch, _, rows, columns = mask.shape
    return create_block_mask(lambda b, h, i, j: mask[b, 0, i, j], batch, None, rows, columns, device=str(mask.device))


def sparse(mask: Bool[Tensor, "#B 1 Tq Tk"]) -> bool:
    """Whether a forward is faster by ``blocks``."""
    return mask.is_cuda and mask.shape[2] >= LONG


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


def bias(mask: Bool[Tensor, "*S"], dtype: torch.dtype) -> Float[Tensor, "*S"]:
    """A boolean mask as what is added to scores: 0 where a row may read, the least number of ``dtype`` elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def rotary(positions: Int[Tensor, "B T"], head_dim: int, theta: float) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
    """Cosine and sine of 1-D rotary phases, half-split layout (RoFormer; the layout of Llama in transformers), in fp32."""
    half = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float()
    angles = positions[..., None].float() * (1.0 / theta ** (half / head_dim))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B X T H"], phase: tuple[Tensor, Tensor]) -> Float[Tensor, "B X T H"]:
    """``x`` turned by its rotary ``phase``."""
    cos, sin = (p[:, None].to(x.dtype) for p in phase)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin

"""The one attention function, and rotary positions."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Float[Tensor, "B N Tq H"],
    k: Float[Tensor, "B G Tk H"],
    v: Float[Tensor, "B G Tk H"],
    mask: Bool[Tensor, "#B 1 Tq Tk"] | Float[Tensor, "#B 1 Tq Tk"] | None,
) -> Float[Tensor, "B Tq NH"]:
    """Grouped-query attention over the shared space, scaled by 1/sqrt(H).

    ``mask`` is True where a row may read, or what is added to the scores (``bias``).
    """
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

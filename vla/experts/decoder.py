"""Our own trainable expert: a pre-norm decoder with SwiGLU and optional adaptive RMS norms."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import rotate
from ..flow import TimeEmbedding
from ..spec import DecoderExpert, Space
from .base import QKV, Expert


class Norm(nn.Module):
    """RMS norm; ``adaptive`` ones take scale, shift and residual gate from the time condition (pi0.5's adaRMS)."""

    def __init__(self, width: int, adaptive: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.modulation = nn.Linear(width, 3 * width) if adaptive else None
        if self.modulation is not None:
            nn.init.normal_(self.modulation.weight, std=0.02)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Float[Tensor, "B T D"], condition: Float[Tensor, "B T D"] | None) -> tuple[Tensor, Tensor | None]:
        """The normed tokens, and the gate of the residual that follows (None: ungated)."""
        normed = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)
        if self.modulation is None:
            return normed, None
        assert condition is not None, "an adaptive norm needs a time condition"
        scale, shift, gate = self.modulation(condition).chunk(3, dim=-1)
        return normed * (1 + scale) + shift, 1 + gate


class DecoderLayer(nn.Module):
    """Parameters of one layer; ``Decoder`` runs them."""

    def __init__(self, config: DecoderExpert, space: Space) -> None:
        super().__init__()
        width, adaptive = config.width, config.time == "adaptive_norm"
        self.attention_norm = Norm(width, adaptive)
        self.q = nn.Linear(width, space.heads * space.head_dim, bias=False)
        self.k = nn.Linear(width, space.kv_heads * space.head_dim, bias=False)
        self.v = nn.Linear(width, space.kv_heads * space.head_dim, bias=False)
        self.o = nn.Linear(space.heads * space.head_dim, width, bias=False)
        self.q_norm = nn.RMSNorm(space.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.ffn_norm = Norm(width, adaptive)
        self.gate_up = nn.Linear(width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, width, bias=False)
        self.k_norm = nn.RMSNorm(space.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()


class Decoder(Expert):
    """A stack of decoder layers whose attention happens in the shared space (see ``Expert``)."""

    def __init__(self, config: DecoderExpert, space: Space) -> None:
        super().__init__()
        self.width, self.depth, self.space = config.width, config.depth, space
        self.layers = nn.ModuleList(DecoderLayer(config, space) for _ in range(config.depth))
        self.final_norm = Norm(config.width, config.time == "adaptive_norm")
        self.time = TimeEmbedding(config.width) if config.time == "adaptive_norm" else None
        residual_std = 0.02 / (2 * config.depth) ** 0.5
        for name, weight in self.layers.named_parameters():
            if weight.ndim == 2 and "modulation" not in name:
                nn.init.normal_(weight, std=residual_std if name.endswith(("o.weight", "down.weight")) else config.width**-0.5)

    def condition(self, time: Float[Tensor, "B T"] | None) -> Float[Tensor, "B T D"] | None:
        if self.time is None:
            return None
        assert time is not None, "an expert with adaptive norms needs the flow time of its tokens"
        return self.time(time)

    def project(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        part = self._layer(layer)
        normed, _ = part.attention_norm(x, condition)
        q, k, v = (self._heads(linear(normed)) for linear in (part.q, part.k, part.v))
        return rotate(part.q_norm(q), phase), rotate(part.k_norm(k), phase), v

    def finish(self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], condition: Tensor | None) -> Tensor:
        part = self._layer(layer)
        _, gate = part.attention_norm(x, condition) if condition is not None else (x, None)
        x = x + _gated(part.o(attended), gate)
        normed, gate = part.ffn_norm(x, condition)
        left, right = part.gate_up(normed).chunk(2, dim=-1)
        return x + _gated(part.down(F.silu(left) * right), gate)

    def final(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        normed, _ = self.final_norm(x, condition)
        return normed

    def _layer(self, index: int) -> DecoderLayer:
        return cast(DecoderLayer, self.layers[index])

    def _heads(self, x: Float[Tensor, "B T XH"]) -> Float[Tensor, "B X T H"]:
        return x.unflatten(-1, (-1, self.space.head_dim)).transpose(1, 2)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate

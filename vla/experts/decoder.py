"""Our own trainable expert: a pre-norm decoder with a gated FFN and optional adaptive RMS norms."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import rotary, rotate
from ..flow import TimeEmbedding
from ..spec import DecoderExpert, Space
from .base import QKV, Expert


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, in the type of its input."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Norm(RMSNorm):
    """A layer's norm; ``adaptive`` ones take scale, shift and residual gate from the time condition (pi0.5's adaRMS)."""

    def __init__(self, width: int, adaptive: bool, residual: bool = True, eps: float = 1e-6) -> None:
        super().__init__(width, eps)
        self.modulation = nn.Linear(width, 2 * width) if adaptive else None
        self.gating = nn.Linear(width, width) if adaptive and residual else None
        for linear in (self.modulation, self.gating):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def modulated(self, x: Float[Tensor, "B T D"], condition: Float[Tensor, "B T D"] | None) -> Float[Tensor, "B T D"]:
        """The normed tokens."""
        normed = self(x)
        if self.modulation is None or condition is None:
            return normed
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return normed * (1 + scale) + shift

    def gated(self, x: Float[Tensor, "B T D"], condition: Float[Tensor, "B T D"] | None) -> Float[Tensor, "B T D"]:
        """What the layer adds to its residual."""
        return x if self.gating is None or condition is None else x * (1 + self.gating(condition))


class DecoderLayer(nn.Module):
    """Parameters of one layer; ``Decoder`` runs them."""

    def __init__(self, config: DecoderExpert, space: Space, crosses: bool) -> None:
        super().__init__()
        width, adaptive, eps = config.width, config.time == "adaptive_norm", config.norm_eps
        shared = space.kv_heads * space.head_dim
        self.attention_norm = Norm(width, adaptive, eps=eps)
        self.q = nn.Linear(width, space.heads * space.head_dim, bias=False)
        self.k = nn.Linear(shared if crosses else width, shared, bias=False)
        self.v = nn.Linear(shared if crosses else width, shared, bias=False)
        self.o = nn.Linear(space.heads * space.head_dim, width, bias=False)
        self.q_norm = RMSNorm(space.head_dim) if config.qk_norm else nn.Identity()
        self.ffn_norm = Norm(width, adaptive, eps=eps)
        self.gate_up = nn.Linear(width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, width, bias=False)
        self.k_norm = RMSNorm(space.head_dim) if config.qk_norm else nn.Identity()


class Decoder(Expert):
    """A stack of decoder layers whose attention happens in the shared space (see ``Expert``)."""

    def __init__(self, config: DecoderExpert, space: Space) -> None:
        super().__init__()
        self.width, self.depth, self.space, self.config = config.width, config.depth, space, config
        self.layers = nn.ModuleList(DecoderLayer(config, space, config.crosses(layer)) for layer in range(config.depth))
        self.final_norm = Norm(config.width, config.time == "adaptive_norm", residual=False, eps=config.norm_eps)
        self.time = TimeEmbedding(config.width) if config.time == "adaptive_norm" else None
        residual_std = 0.02 / (2 * config.depth) ** 0.5
        for name, weight in self.layers.named_parameters():
            if weight.ndim == 2 and "norm" not in name:
                nn.init.normal_(weight, std=residual_std if name.endswith(("o.weight", "down.weight")) else config.width**-0.5)

    def condition(self, time: Float[Tensor, "B T"] | None) -> Float[Tensor, "B T D"] | None:
        if self.time is None:
            return None
        assert time is not None, "an expert with adaptive norms needs the flow time of its tokens"
        return self.time(time if self.config.time_of == "t" else 1 - time)

    def phase(self, x: Float[Tensor, "B T D"], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of several axes the first counts: our own tokens stand at one place of all of them."""
        return rotary(ids if ids.ndim == 2 else ids[0], self.space.head_dim, self.space.rope_theta)

    def project(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        part = self._layer(layer)
        normed = part.attention_norm.modulated(x, condition)
        q, k, v = (self._heads(linear(normed)) for linear in (part.q, part.k, part.v))
        return rotate(part.q_norm(q), phase), rotate(part.k_norm(k), phase), v

    def ask(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> Tensor:
        part = self._layer(layer)
        return rotate(part.q_norm(self._heads(part.q(part.attention_norm.modulated(x, condition)))), phase)

    def adapt(self, layer: int, keys: Float[Tensor, "B G T H"], values: Float[Tensor, "B G T H"]) -> tuple[Tensor, Tensor]:
        part = self._layer(layer)
        k, v = (self._heads(linear(t.transpose(1, 2).flatten(2))) for linear, t in ((part.k, keys), (part.v, values)))
        return part.k_norm(k), v

    def finish(self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], condition: Tensor | None) -> Tensor:
        part = self._layer(layer)
        x = x + part.attention_norm.gated(part.o(attended), condition)
        left, right = part.gate_up(part.ffn_norm.modulated(x, condition)).chunk(2, dim=-1)
        return x + part.ffn_norm.gated(part.down(self._activate(left) * right), condition)

    def final(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return self.final_norm.modulated(x, condition)

    def _activate(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.config.activation == "silu" else F.gelu(x, approximate="tanh")

    def _layer(self, index: int) -> DecoderLayer:
        return cast(DecoderLayer, self.layers[index])

    def _heads(self, x: Float[Tensor, "B T XH"]) -> Float[Tensor, "B X T H"]:
        return x.unflatten(-1, (-1, self.space.head_dim)).transpose(1, 2)

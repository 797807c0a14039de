"""Our own trainable expert: a pre-norm transformer with gated or plain FFN, adaptive norms or tables, and cross layers."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attend, rotary, rotate
from ..flow import TimeEmbedding
from ..spec import DecoderExpert, Space
from .base import QKV, Context, Expert, Reading


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, in the type of its input."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Norm(nn.Module):
    """A layer's norm, and the gate of what the layer adds to its residual; what they know of the flow time is in the subclasses."""

    def __init__(self, config: DecoderExpert) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width)) if config.norm != "layer_plain" else None
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.norm == "layer" else None
        self.shape, self.eps = (config.width,), config.norm_eps
        self.rms = config.norm == "rms"

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.rms_norm(x, self.shape, weight, self.eps) if self.rms else F.layer_norm(x, self.shape, weight, bias, self.eps)

    def modulated(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        """The normed tokens."""
        return self(x)

    def gated(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        """What the layer adds to its residual."""
        return x


class AdaptiveNorm(Norm):
    """Scale, shift and residual gate are a projection of the time features (B, T, D) (pi0.5's adaRMS)."""

    def __init__(self, config: DecoderExpert, residual: bool = True) -> None:
        super().__init__(config)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.gating = nn.Linear(config.width, config.width) if residual else None
        for linear in (self.modulation, self.gating):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def modulated(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return self(x) * (1 + scale) + shift

    def gated(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return x if self.gating is None else x * (1 + self.gating(condition))


class TableNorm(Norm):
    """Shift, scale and residual gate are rows of the condition (B, T, 7, D) plus a table of the layer's own (DiT's AdaLN).

    Rows 0 to 2 are of the attention, 3 to 5 of the FFN; the final norm takes shift and scale from row 6.
    """

    def __init__(self, config: DecoderExpert, rows: slice) -> None:
        super().__init__(config)
        self.rows = rows
        self.table = nn.Parameter(torch.zeros(3 if rows.stop < 7 else 2, config.width))

    def modulated(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        shift, scale = self._told(condition)[..., :2, :].unbind(-2)
        return self(x) * (1 + scale) + shift

    def gated(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return x * (1 + self._told(condition)[..., 2, :])

    def _told(self, condition: Tensor | None) -> Tensor:
        assert condition is not None, "an expert with time in its norms needs the flow time of its tokens"
        return condition[..., self.rows, :] + self.table.to(condition.dtype)


class CrossAttention(nn.Module):
    """Attention of an expert's tokens to hidden states of others, with an output of its own where it comes after self-attention."""

    def __init__(self, config: DecoderExpert, space: Space, source: int) -> None:
        super().__init__()
        shared, after = space.kv_heads * space.head_dim, config.cross is not None and config.cross.place == "after"
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if after else None
        bias = config.bias is True
        self.q = nn.Linear(config.width, space.heads * space.head_dim, bias=bias)
        self.k = nn.Linear(source, shared, bias=bias)
        self.v = nn.Linear(source, shared, bias=bias)
        self.o = nn.Linear(space.heads * space.head_dim, config.width, bias=bias) if after else None
        self.q_norm, self.k_norm = _qk_norm(config, space, space.heads), _qk_norm(config, space, space.kv_heads)


class DecoderLayer(nn.Module):
    """Parameters of one layer; ``Decoder`` runs them. ``source``: channels of the hidden states that it reads, if it does."""

    def __init__(self, config: DecoderExpert, space: Space, layer: int, source: int | None) -> None:
        super().__init__()
        width, shared, bias = config.width, space.kv_heads * space.head_dim, config.bias is True
        cross = config.cross if config.crosses(layer) else None
        hidden = cross is not None and cross.reads == "hidden"
        crosses = shared if cross is not None and not hidden else width
        self.attention_norm = _norm(config, slice(0, 3))
        if cross is None or cross.place == "after" or not hidden:
            self.q = nn.Linear(width, space.heads * space.head_dim, bias=bias)
            self.k = nn.Linear(crosses, shared, bias=bias)
            self.v = nn.Linear(crosses, shared, bias=bias)
        self.o = nn.Linear(space.heads * space.head_dim, width, bias=bias)
        self.q_norm = _qk_norm(config, space, space.heads)
        self.ffn_norm = _norm(config, slice(3, 6))
        self.gate_up = nn.Linear(width, (2 if config.gated else 1) * config.ffn, bias=bool(config.bias))
        self.down = nn.Linear(config.ffn, width, bias=bool(config.bias))
        self.k_norm = _qk_norm(config, space, space.kv_heads)
        self.cross = CrossAttention(config, space, source) if hidden and source is not None else None


class Decoder(Expert):
    """A stack of decoder layers whose attention happens in the shared space (see ``Expert``).

    Args:
        source: channels of the hidden states that its cross layers read.
    """

    def __init__(self, config: DecoderExpert, space: Space, source: int | None = None) -> None:
        super().__init__()
        self.width, self.depth, self.space, self.config = config.width, config.depth, space, config
        self.adapter: nn.Module = nn.Identity()
        if source is not None and config.cross is not None and config.cross.adapter == "mlp":
            self.adapter = nn.Sequential(
                nn.Linear(source, config.width), nn.GELU(approximate="tanh"), nn.Linear(config.width, config.width)
            )
            source = config.width
        elif source is not None and config.cross is not None and config.cross.adapter == "norm":
            self.adapter = nn.LayerNorm(source, eps=config.norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(config, space, layer, source) for layer in range(config.depth))
        last = config.model_copy(update={"norm_eps": config.final_eps or config.norm_eps})
        self.final_norm = _norm(last, slice(6, 7)) if config.final_norm else None
        self.time = TimeEmbedding(config.width, config.time_features) if config.time != "none" else None
        self.modulation = nn.Linear(config.width, 6 * config.width) if config.time == "adaln" else None
        residual_std = 0.02 / (2 * config.depth) ** 0.5
        for name, weight in self.layers.named_parameters():
            if weight.ndim == 2 and "norm" not in name:
                nn.init.normal_(weight, std=residual_std if name.endswith(("o.weight", "down.weight")) else config.width**-0.5)

    def condition(self, time: Float[Tensor, "B T"] | None) -> Tensor | None:
        """Time features (B, T, D); for tables the six rows of every layer and the features themselves, (B, T, 7, D)."""
        if self.time is None:
            return None
        assert time is not None, "an expert with adaptive norms needs the flow time of its tokens"
        features, activated = self.time(time if self.config.time_of == "t" else 1 - time)
        if self.modulation is None:
            return activated
        return torch.cat([self.modulation(activated).unflatten(-1, (6, -1)), features[..., None, :]], dim=-2)

    def phase(self, x: Float[Tensor, "B T D"], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Without axes of our own the first of several counts: our tokens stand at one place of all of them."""
        axes = self.config.axes
        if axes is None:
            return rotary(ids if ids.ndim == 2 else ids[0], self.space.head_dim, self.space.rope_theta)
        if not axes:  # nothing turns
            return torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])
        each = [rotary(ids if ids.ndim == 2 else ids[i], size, self.space.rope_theta) for i, size in enumerate(axes)]
        cos, sin = (
            torch.cat([part[..., : part.shape[-1] // 2] for part in parts], dim=-1).repeat(1, 1, 2) for parts in zip(*each, strict=True)
        )
        return cos, sin

    def project(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        part = self._layer(layer)
        normed = part.attention_norm.modulated(x, condition)
        q, k = (self._heads(linear(normed), norm) for linear, norm in ((part.q, part.q_norm), (part.k, part.k_norm)))
        return rotate(q, phase), rotate(k, phase), self._heads(part.v(normed))

    def ask(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> Tensor:
        part = self._layer(layer)
        return rotate(self._heads(part.q(part.attention_norm.modulated(x, condition)), part.q_norm), phase)

    def adapt(self, layer: int, keys: Float[Tensor, "B G T H"], values: Float[Tensor, "B G T H"]) -> tuple[Tensor, Tensor]:
        part = self._layer(layer)
        k, v = (linear(t.transpose(1, 2).flatten(2)) for linear, t in ((part.k, keys), (part.v, values)))
        return self._heads(k, part.k_norm), self._heads(v)

    def inform(self, hidden: Float[Tensor, "B S W"]) -> Context:
        told = self.adapter(hidden)
        keys, values = [], []
        for layer in range(self.depth):
            part = self._layer(layer).cross
            keys.append(None if part is None else self._heads(part.k(told), part.k_norm))
            values.append(None if part is None else self._heads(part.v(told)))
        return Context(tuple(keys), tuple(values))

    def hear(self, layer: int, x: Float[Tensor, "B T D"], context: Context, condition: Tensor | None) -> Float[Tensor, "B T NH"]:
        part, keys, values = self._cross(layer), context.keys[layer], context.values[layer]
        assert keys is not None and values is not None
        normed = self._layer(layer).attention_norm.modulated(x, condition) if part.norm is None else part.norm(x)
        reading = self._reading(layer, context)
        return reading.silenced(attend(self._heads(part.q(normed), part.q_norm), keys, values, reading.mask))

    def finish(
        self,
        layer: int,
        x: Float[Tensor, "B T D"],
        attended: Float[Tensor, "B T NH"],
        condition: Tensor | None,
        context: Context | None = None,
    ) -> Tensor:
        part = self._layer(layer)
        x = x + part.attention_norm.gated(part.o(attended), condition)
        if context is not None and part.cross is not None and part.cross.o is not None:
            x = x + self._reading(layer, context).silenced(part.cross.o(self.hear(layer, x, context, condition)))
        up = part.gate_up(part.ffn_norm.modulated(x, condition))
        left, right = up.chunk(2, dim=-1) if self.config.gated else (up, None)
        inner = self._activate(left) if right is None else self._activate(left) * right
        return x + part.ffn_norm.gated(part.down(inner), condition)

    def final(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return x if self.final_norm is None else self.final_norm.modulated(x, condition)

    def _activate(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.config.activation == "silu" else F.gelu(x, approximate="tanh")

    def _layer(self, index: int) -> DecoderLayer:
        return cast(DecoderLayer, self.layers[index])

    def _reading(self, index: int, context: Context) -> Reading:
        cross = self.config.cross
        assert cross is not None, f"layer {index} reads no hidden states"
        return context.turns[(index - cross.first) // cross.every % len(context.turns)]

    def _cross(self, index: int) -> CrossAttention:
        part = self._layer(index).cross
        assert part is not None, f"layer {index} reads no hidden states"
        return part

    def _heads(self, x: Float[Tensor, "B T XH"], norm: nn.Module | None = None) -> Float[Tensor, "B X T H"]:
        """Heads of a projection, normed each or as a whole."""
        if norm is not None and self.config.qk_norm == "whole":
            x = norm(x)
        heads = x.unflatten(-1, (-1, self.space.head_dim)).transpose(1, 2)
        return heads if norm is None or self.config.qk_norm == "whole" else norm(heads)


def _norm(config: DecoderExpert, rows: slice) -> Norm:
    match config.time:
        case "none":
            return Norm(config)
        case "adaptive_norm":
            return AdaptiveNorm(config, residual=rows.stop < 7)
        case "attention_norm":
            return Norm(config) if rows.start == 3 else AdaptiveNorm(config, residual=False)
        case "adaln":
            return TableNorm(config, rows)


def _qk_norm(config: DecoderExpert, space: Space, heads: int) -> nn.Module:
    if config.qk_norm is False:
        return nn.Identity()
    return RMSNorm(heads * space.head_dim if config.qk_norm == "whole" else space.head_dim)

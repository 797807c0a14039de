"""An expert made ready to run often over one stream whose positions and flow times are known beforehand: denoising."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .base import QKV, Expert
from .decoder import Decoder, DecoderLayer, Norm

Phase = tuple[Tensor, Tensor]


class Ready:
    """Any expert: its own methods, with what they need of positions and times computed before.

    Args:
        phase: rotary phases of the stream's tokens; ``alone``: the same counted from the stream's own start, for layers without keys.
        times: flow time (S,) of every step.
        tokens: (B, T) of the stream.
    """

    def __init__(self, expert: Expert, phase: Phase, alone: Phase, times: Float[Tensor, "S"], tokens: tuple[int, int]) -> None:
        self.expert, self.phase, self.alone = expert, phase, alone
        self.conditions = [expert.condition(time.expand(tokens)) for time in times]

    def project(self, layer: int, x: Float[Tensor, "B T D"], step: int) -> QKV:
        """As ``Expert.project`` at the time of ``step``."""
        return self.expert.project(layer, x, self.phase, self.conditions[step])

    def ask(self, layer: int, x: Float[Tensor, "B T D"], step: int) -> Float[Tensor, "B N T H"]:
        """As ``Expert.ask``."""
        return self.expert.ask(layer, x, self.alone, self.conditions[step])

    def finish(self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], step: int) -> Float[Tensor, "B T D"]:
        """As ``Expert.finish``."""
        return self.expert.finish(layer, x, attended, self.conditions[step])

    def final(self, x: Float[Tensor, "B T D"], step: int) -> Float[Tensor, "B T D"]:
        """As ``Expert.final``."""
        return self.expert.final(x, self.conditions[step])


class ReadyDecoder(Ready):
    """Our own decoder with fewer and larger operations: one product for q, k and v, the norms of q and k folded into the rotary
    phases, and the adaptive norms of all steps computed at once (one flow time holds for all tokens)."""

    def __init__(self, decoder: Decoder, phase: Phase, alone: Phase, times: Float[Tensor, "S"]) -> None:
        self.decoder, self.heads = decoder, (decoder.space.heads, decoder.space.kv_heads)
        condition = decoder.condition(times[:, None])
        self.layers = [_layer(decoder, i, phase, alone, condition, len(times)) for i in range(decoder.depth)]
        self.last = _Steps.of(decoder.final_norm, condition, len(times))

    def project(self, layer: int, x: Float[Tensor, "B T D"], step: int) -> QKV:
        made, turned = self._turned(layer, x, step)
        (heads, shared), values = self.heads, made[:, :, sum(self.heads) :]
        return turned[:, :, :heads].transpose(1, 2), turned[:, :, heads : heads + shared].transpose(1, 2), values.transpose(1, 2)

    def ask(self, layer: int, x: Float[Tensor, "B T D"], step: int) -> Float[Tensor, "B N T H"]:
        return self._turned(layer, x, step)[1].transpose(1, 2)

    def finish(self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], step: int) -> Float[Tensor, "B T D"]:
        own = self.layers[layer]
        x = own.before.add(x, own.part.o(attended), step)
        left, right = own.part.gate_up(own.after.norm(x, step)).chunk(2, dim=-1)
        return own.after.add(x, own.part.down(self.decoder._activate(left) * right), step)

    def final(self, x: Float[Tensor, "B T D"], step: int) -> Float[Tensor, "B T D"]:
        return self.last.norm(x, step)

    def _turned(self, layer: int, x: Float[Tensor, "B T D"], step: int) -> tuple[Float[Tensor, "B T X H"], Float[Tensor, "B T Y H"]]:
        """All that the layer makes of its tokens, and the part of it that has positions (q and k, or q alone), normed and turned."""
        own = self.layers[layer]
        made = own.product(own.before.norm(x, step)).unflatten(-1, (-1, self.decoder.space.head_dim))
        turned = made[:, :, : own.turning]
        if own.eps is not None:
            turned = F.rms_norm(turned, turned.shape[-1:], None, own.eps)
        along, across = own.turn
        return made, torch.addcmul(turned * along, turned.roll(turned.shape[-1] // 2, -1), across)


def ready(expert: Expert, phase: Phase, alone: Phase, times: Float[Tensor, "S"], tokens: tuple[int, int]) -> Ready:
    """``expert`` ready for denoise steps at ``times``; see ``Ready``."""
    return ReadyDecoder(expert, phase, alone, times) if isinstance(expert, Decoder) else Ready(expert, phase, alone, times, tokens)


@dataclass(frozen=True)
class _Steps:
    """A norm at every step: the weight and, where it is adaptive, shift and gate, (D,) each."""

    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...] | None
    gates: tuple[Tensor, ...] | None
    eps: float

    @classmethod
    def of(cls, norm: Norm, condition: Float[Tensor, "S 1 D"] | None, steps: int) -> "_Steps":
        """``norm`` at the ``condition`` of each step."""
        if norm.modulation is None or condition is None:
            return cls((norm.weight,) * steps, None, None, norm.eps)
        scale, shift = norm.modulation(condition[:, 0]).chunk(2, dim=-1)
        gates = None if norm.gating is None else (1 + norm.gating(condition[:, 0])).unbind()
        return cls((norm.weight * (1 + scale)).unbind(), shift.unbind(), gates, norm.eps)

    def norm(self, x: Float[Tensor, "B T D"], step: int) -> Float[Tensor, "B T D"]:
        """The normed tokens."""
        normed = F.rms_norm(x, x.shape[-1:], self.weights[step], self.eps)
        return normed if self.shifts is None else normed + self.shifts[step]

    def add(self, x: Float[Tensor, "B T D"], made: Float[Tensor, "B T D"], step: int) -> Float[Tensor, "B T D"]:
        """``x`` and what a layer ``made`` of it."""
        return x + made if self.gates is None else torch.addcmul(x, made, self.gates[step])


@dataclass(frozen=True)
class _Layer:
    """One layer: its norms at every step, the product that makes q, k and v at once, what turns the ``turning`` first heads of it,
    and the epsilon of their norm where they have one."""

    before: _Steps
    after: _Steps
    product: Callable[[Tensor], Tensor]
    turn: tuple[Tensor, Tensor]
    turning: int
    eps: float | None
    part: DecoderLayer


def _layer(decoder: Decoder, index: int, phase: Phase, alone: Phase, condition: Tensor | None, steps: int) -> _Layer:
    part, crosses = decoder._layer(index), decoder.config.crosses(index)
    heads = {"q": decoder.space.heads} if crosses else {"q": decoder.space.heads, "k": decoder.space.kv_heads}
    dtype = part.attention_norm.weight.dtype
    norms = [getattr(part, f"{name}_norm") for name in heads]
    cos, sin = (p[:, :, None] for p in (alone if crosses else phase))
    sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)  # what was left turns to the right
    eps = None
    if decoder.config.qk_norm:  # x w turned is x (w cos) + rolled x (rolled w sin)
        scale = torch.cat([norm.weight.expand(number, -1) for norm, number in zip(norms, heads.values(), strict=True)])
        cos, sin, eps = cos * scale, sin * scale.roll(scale.shape[-1] // 2, -1), norms[0].eps
    before, after = (_Steps.of(norm, condition, steps) for norm in (part.attention_norm, part.ffn_norm))
    return _Layer(before, after, part.q if crosses else _qkv(part), (cos.to(dtype), sin.to(dtype)), sum(heads.values()), eps, part)


def _qkv(part: DecoderLayer) -> Callable[[Tensor], Tensor]:
    """The product that makes q, k and v at once: packed beforehand where the model was (``vla/narrow.py``)."""
    packed = getattr(part, "qkv", None)
    return packed or partial(F.linear, weight=torch.cat([part.q.weight, part.k.weight, part.v.weight]))

"""An expert made ready for live tokens whose positions and flow times are known beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .base import QKV, Context, Expert
from .decoder import AdaptiveNorm, Decoder, DecoderLayer, Norm

Phase = tuple[Tensor, Tensor]


class Ready:
    """Any expert: its own methods, with what they need of positions and times computed before.

    Args:
        phase: rotary phases of the live tokens; ``alone``: the same counted from their stream's own start, for layers without keys.
        conditions: what the layers need to know of the flow time in each run.
    """

    def __init__(self, expert: Expert, phase: Phase, alone: Phase, conditions: Sequence[Tensor | None]) -> None:
        self.expert, self.phase, self.alone, self.conditions = expert, phase, alone, conditions

    def project(self, layer: int, x: Float[Tensor, "B T D"], run: int) -> QKV:
        """As ``Expert.project`` at the time of ``run``."""
        return self.expert.project(layer, x, self.phase, self.conditions[run])

    def ask(self, layer: int, x: Float[Tensor, "B T D"], run: int) -> Float[Tensor, "B N T H"]:
        """As ``Expert.ask``."""
        return self.expert.ask(layer, x, self.alone, self.conditions[run])

    def hear(self, layer: int, x: Float[Tensor, "B T D"], context: Context, run: int) -> Float[Tensor, "B T NH"]:
        """As ``Expert.hear``."""
        return self.expert.hear(layer, x, context, self.conditions[run])

    def finish(
        self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], run: int, context: Context | None = None
    ) -> Float[Tensor, "B T D"]:
        """As ``Expert.finish``."""
        return self.expert.finish(layer, x, attended, self.conditions[run], context)

    def final(self, x: Float[Tensor, "B T D"], run: int) -> Float[Tensor, "B T D"]:
        """As ``Expert.final``."""
        return self.expert.final(x, self.conditions[run])


def suits(expert: Expert) -> bool:
    """Whether ``ReadyDecoder`` knows all that an expert's layers do."""
    if not isinstance(expert, Decoder):
        return False
    config = expert.config
    plain = config.norm == "rms" and config.gated and not config.bias and config.final_norm and config.qk_norm != "whole"
    reads = config.cross is None or config.cross.reads == "keys"
    known = plain and reads and config.axes != () and config.time in ("none", "adaptive_norm")
    linears = [part for unit in expert.layers for name, part in unit.named_children() if name in ("q", "k", "v", "o", "gate_up", "down")]
    # neither adapted nor sharded: its very weight is what it multiplies by
    return known and all(type(part) is nn.Linear or getattr(part, "packed", False) for part in linears)


class ReadyDecoder(Ready):
    """Our own decoder with fewer and larger operations: one product for q, k and v, the norms of q and k folded into the rotary
    phases, and the adaptive norms of all steps computed at once (one flow time holds for all tokens but those that are settled).

    Args:
        times: the flow time of each run; where tokens are settled, theirs comes last.
        settled: which they are.
    """

    def __init__(
        self, decoder: Decoder, phase: Phase, alone: Phase, times: Float[Tensor, "S"], settled: Bool[Tensor, "B T 1"] | None = None
    ) -> None:
        self.decoder, self.heads = decoder, (decoder.space.heads, decoder.space.kv_heads)
        condition = decoder.condition(times[:, None])
        self.layers = [_layer(decoder, i, phase, alone, condition, len(times), settled) for i in range(decoder.depth)]
        assert decoder.final_norm is not None
        self.last = _Steps.of(decoder.final_norm, condition, len(times), settled)

    def project(self, layer: int, x: Float[Tensor, "B T D"], run: int) -> QKV:
        made, turned = self._turned(layer, x, run)
        (heads, shared), values = self.heads, made[:, :, sum(self.heads) :]
        return turned[:, :, :heads].transpose(1, 2), turned[:, :, heads : heads + shared].transpose(1, 2), values.transpose(1, 2)

    def ask(self, layer: int, x: Float[Tensor, "B T D"], run: int) -> Float[Tensor, "B N T H"]:
        return self._turned(layer, x, run)[1].transpose(1, 2)

    def finish(
        self, layer: int, x: Float[Tensor, "B T D"], attended: Float[Tensor, "B T NH"], run: int, context: Context | None = None
    ) -> Float[Tensor, "B T D"]:
        own = self.layers[layer]
        x = own.before.add(x, own.part.o(attended), run)
        left, right = own.part.gate_up(own.after.norm(x, run)).chunk(2, dim=-1)
        return own.after.add(x, own.part.down(self.decoder._activate(left) * right), run)

    def final(self, x: Float[Tensor, "B T D"], run: int) -> Float[Tensor, "B T D"]:
        return self.last.norm(x, run)

    def _turned(self, layer: int, x: Float[Tensor, "B T D"], run: int) -> tuple[Float[Tensor, "B T X H"], Float[Tensor, "B T Y H"]]:
        """All that the layer makes of its tokens, and the part of it that has positions (q and k, or q alone), normed and turned."""
        own = self.layers[layer]
        made = own.product(own.before.norm(x, run)).unflatten(-1, (-1, self.decoder.space.head_dim))
        turned = made[:, :, : own.turning]
        if own.eps is not None:
            turned = F.rms_norm(turned, turned.shape[-1:], None, own.eps)
        along, across = own.turn
        return made, torch.addcmul(turned * along, turned.roll(turned.shape[-1] // 2, -1), across)


@dataclass(frozen=True)
class _Steps:
    """A norm in every run: the weight and, where it is adaptive, shift and gate, (D,) each; those of ``settled`` tokens (B, T, 1) last."""

    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...] | None
    gates: tuple[Tensor, ...] | None
    eps: float
    settled: Tensor | None = None

    @classmethod
    def of(cls, norm: Norm, condition: Float[Tensor, "S 1 D"] | None, steps: int, settled: Tensor | None) -> "_Steps":
        """``norm`` at the ``condition`` of each step."""
        assert norm.weight is not None, "an RMS norm has a weight"
        if not isinstance(norm, AdaptiveNorm) or condition is None:
            return cls((norm.weight,) * steps, None, None, norm.eps)
        scale, shift = norm.modulation(condition[:, 0]).chunk(2, dim=-1)
        gates = None if norm.gating is None else (1 + norm.gating(condition[:, 0])).unbind()
        return cls((norm.weight * (1 + scale)).unbind(), shift.unbind(), gates, norm.eps, settled)

    def norm(self, x: Float[Tensor, "B T D"], run: int) -> Float[Tensor, "B T D"]:
        """The normed tokens."""
        if self.settled is not None and self.shifts is not None:
            return torch.addcmul(self._at(self.shifts, run), F.rms_norm(x, x.shape[-1:], None, self.eps), self._at(self.weights, run))
        normed = F.rms_norm(x, x.shape[-1:], self.weights[run], self.eps)
        return normed if self.shifts is None else normed + self.shifts[run]

    def add(self, x: Float[Tensor, "B T D"], made: Float[Tensor, "B T D"], run: int) -> Float[Tensor, "B T D"]:
        """``x`` and what a layer ``made`` of it."""
        return x + made if self.gates is None else torch.addcmul(x, made, self._at(self.gates, run))

    def _at(self, each: tuple[Tensor, ...], run: int) -> Tensor:
        """What holds in a run, token by token where some are settled."""
        return each[run] if self.settled is None else torch.where(self.settled, each[-1], each[run])


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


def _layer(
    decoder: Decoder, index: int, phase: Phase, alone: Phase, condition: Tensor | None, steps: int, settled: Tensor | None
) -> _Layer:
    part, crosses = decoder._layer(index), decoder.config.crosses(index)
    heads = {"q": decoder.space.heads} if crosses else {"q": decoder.space.heads, "k": decoder.space.kv_heads}
    dtype = next(part.attention_norm.parameters()).dtype
    norms = [getattr(part, f"{name}_norm") for name in heads]
    cos, sin = (p[:, :, None] for p in (alone if crosses else phase))
    sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)  # what was left turns to the right
    eps = None
    if decoder.config.qk_norm:  # x w turned is x (w cos) + rolled x (rolled w sin)
        scale = torch.cat([norm.weight.expand(number, -1) for norm, number in zip(norms, heads.values(), strict=True)])
        cos, sin, eps = cos * scale, sin * scale.roll(scale.shape[-1] // 2, -1), norms[0].eps
    before, after = (_Steps.of(norm, condition, steps, settled) for norm in (part.attention_norm, part.ffn_norm))
    return _Layer(before, after, part.q if crosses else _qkv(part), (cos.to(dtype), sin.to(dtype)), sum(heads.values()), eps, part)


def _qkv(part: DecoderLayer) -> Callable[[Tensor], Tensor]:
    """The product that makes q, k and v at once: packed beforehand where the model was (``vla/narrow.py``)."""
    packed = getattr(part, "qkv", None)
    return packed or partial(F.linear, weight=torch.cat([part.q.weight, part.k.weight, part.v.weight]))

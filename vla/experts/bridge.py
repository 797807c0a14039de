"""An expert of an attention space of its own among others: linear maps into the shared space and back, where it meets them."""

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from ..spec import Space
from .base import QKV, Context, Expert


class BridgeLayer(nn.Module):
    """Maps of one layer: queries, keys and values into the shared space (``normed`` after it, as DeepVision does), what was read back."""

    def __init__(self, own: Space, shared: Space, normed: bool) -> None:
        super().__init__()

        def across(heads: int, others: int) -> nn.Module:
            linear = nn.Linear(heads * own.head_dim, others * shared.head_dim, bias=False)
            return nn.Sequential(linear, nn.LayerNorm(linear.out_features)) if normed else linear

        self.q = across(own.heads, shared.heads)
        self.k, self.v = (across(own.kv_heads, shared.kv_heads) for _ in "kv")
        self.back = nn.Linear(shared.heads * shared.head_dim, own.heads * own.head_dim, bias=False)


class Bridge(Expert):
    """``inner`` with bridges in its ``joint`` layers; in the others its tokens attend among themselves, in their own space.

    What is mapped are the rotated queries and keys. HBridge (arXiv 2511.20520) bridges the middle layers of a generator, DeepVision-VLA
    (arXiv 2603.15618) aligns the last ones of a vision model.
    """

    def __init__(self, inner: Expert, shared: Space, joint: Sequence[int], normed: bool) -> None:
        super().__init__()
        self.inner, self.shared = inner, shared
        self.width, self.depth, self.space = inner.width, inner.depth, shared
        self.bridges = nn.ModuleDict({str(layer): BridgeLayer(inner.space, shared, normed) for layer in joint})

    def space_of(self, layer: int) -> Space:
        return self.shared if self._bridge(layer) is not None else self.inner.space

    def condition(self, time: Tensor | None) -> Tensor | None:
        return self.inner.condition(time)

    def phase(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.phase(x, ids)

    def project(self, layer: int, x: Float[Tensor, "B T D"], phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        q, k, v = self.inner.project(layer, x, phase, condition)
        bridge = self._bridge(layer)
        if bridge is None:
            return q, k, v
        return self._across(bridge.q, q), self._across(bridge.k, k), self._across(bridge.v, v)

    def inform(self, hidden: Float[Tensor, "B S W"]) -> Context:
        return self.inner.inform(hidden)

    def finish(
        self,
        layer: int,
        x: Float[Tensor, "B T D"],
        attended: Float[Tensor, "B T NH"],
        condition: Tensor | None,
        context: Context | None = None,
    ) -> Float[Tensor, "B T D"]:
        bridge = self._bridge(layer)
        return self.inner.finish(layer, x, attended if bridge is None else bridge.back(attended), condition, context)

    def final(self, x: Float[Tensor, "B T D"], condition: Tensor | None) -> Float[Tensor, "B T D"]:
        return self.inner.final(x, condition)

    def _across(self, linear: nn.Module, heads: Float[Tensor, "B X T H"]) -> Float[Tensor, "B Y T J"]:
        return linear(heads.transpose(1, 2).flatten(2)).unflatten(-1, (-1, self.shared.head_dim)).transpose(1, 2)

    def _bridge(self, layer: int) -> BridgeLayer | None:
        return cast(BridgeLayer, self.bridges[str(layer)]) if str(layer) in self.bridges else None

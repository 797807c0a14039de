"""What the MoT loop asks of an expert."""

from typing import Protocol, runtime_checkable

from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]


@runtime_checkable
class Expert(Protocol):
    """Per-layer pieces of a pre-norm transformer; the loop owns attention and order.

    ``time`` is the flow time (B, T) of each token where the expert is conditioned on it, else None.
    """

    width: int
    depth: int

    def condition(self, time: Tensor | None) -> Tensor | None:
        """What the layers need to know of ``time`` (B, T), computed once per forward."""
        ...

    def project(self, layer: int, x: Tensor, phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        """x (B, T, D) -> rotated q (B, N, T, H), rotated k and plain v (B, G, T, H)."""
        ...

    def finish(self, layer: int, x: Tensor, attended: Tensor, condition: Tensor | None) -> Tensor:
        """Output projection, residuals and FFN: x (B, T, D), attended (B, T, N*H) -> (B, T, D)."""
        ...

    def final(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The final norm."""
        ...

"""What the MoT loop asks of an expert."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from ..graph import Own
from ..spec import Space

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Prompt:
    """An embedded prompt.

    Attributes:
        x: (B, T, D).
        inject: (B, T, D) each, added after the first, second, ... layer.
        own: positions, where the family counts them in its own way.
    """

    x: Tensor
    inject: tuple[Tensor, ...] = ()
    own: Own | None = None


@dataclass(frozen=True)
class Reading:
    """Who reads which of the hidden states in a layer.

    Attributes:
        mask: (B or 1, 1, T, S), True where a token may read, or what is added to the scores; None where all may.
        deaf: (B or 1, T, 1), True for tokens that read nothing; None where there are none.
    """

    mask: Tensor | None = None
    deaf: Tensor | None = None

    def silenced(self, heard: Tensor) -> Tensor:
        """What was heard, with nothing for tokens that read nothing."""
        return heard if self.deaf is None else heard.masked_fill(self.deaf, 0.0)


@dataclass(frozen=True)
class Context:
    """Hidden states of others as an expert's cross layers read them.

    Attributes:
        keys, values: (B, G, S, H) per layer of the expert; None where the layer reads none.
        turns: how the first, second, ... of its cross layers reads them, over and over.
    """

    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]
    turns: tuple[Reading, ...] = (Reading(),)


class Expert(nn.Module, ABC):
    """Per-layer pieces of a pre-norm transformer; the loop owns attention and order.

    ``time`` is the flow time (B, T) of each token where the expert is conditioned on it, else None.
    """

    width: int
    depth: int
    space: Space

    def units(self) -> list[nn.Module]:
        """Its transformer layers, of which the joint steps are made."""
        return [layer for part in self.modules() if isinstance(part, nn.ModuleList) for layer in part]

    def space_of(self, layer: int) -> Space:
        """The space in which a layer's tokens attend."""
        return self.space

    @abstractmethod
    def condition(self, time: Tensor | None) -> Tensor | None:
        """What the layers need to know of ``time`` (B, T), computed once per forward."""

    @abstractmethod
    def phase(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, T, H) of the rotary phases at positions ``ids``, (B, T) or (P, B, T) of P axes."""

    @abstractmethod
    def project(self, layer: int, x: Tensor, phase: tuple[Tensor, Tensor], condition: Tensor | None) -> QKV:
        """x (B, T, D) -> rotated q (B, N, T, H), rotated k and plain v (B, G, T, H)."""

    def ask(self, layer: int, x: Tensor, phase: tuple[Tensor, Tensor], condition: Tensor | None) -> Tensor:
        """The rotated q of a layer without keys of its own (``spec.CrossLayers``)."""
        raise NotImplementedError(f"{type(self).__name__} has no such layers")

    def adapt(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Others' rotated keys and values (B, G, T, H), projected anew by such a layer."""
        raise NotImplementedError(f"{type(self).__name__} has no such layers")

    def inform(self, hidden: Tensor) -> Context:
        """Final hidden states of others (B, S, W) made ready for all layers."""
        raise NotImplementedError(f"{type(self).__name__} has no such layers")

    def hear(self, layer: int, x: Tensor, context: Context, condition: Tensor | None) -> Tensor:
        """What a layer that reads hidden states in place of keys attends to: (B, T, N*H)."""
        raise NotImplementedError(f"{type(self).__name__} has no such layers")

    @abstractmethod
    def finish(self, layer: int, x: Tensor, attended: Tensor, condition: Tensor | None, context: Context | None = None) -> Tensor:
        """Output projection, residuals and FFN: x (B, T, D), attended (B, T, N*H) -> (B, T, D).

        With a ``context``, a layer that reads hidden states after its attention does so here.
        """

    @abstractmethod
    def final(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The final norm."""

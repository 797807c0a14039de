"""What goes into a model and what comes out: observations, targets, what is between noise and data, answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What the streams are made of. A field is needed only where a live stream is made of it.

    Attributes:
        images: (B, V, 3, Y, X), uint8 or float from 0 to 255, views as in ``Spec.views``.
        ids: token ids (B, T) of the prompt or the words; present: (B, T) bool, False on padding.
        state: normalised proprioception (B, S).
        latents: patches (B, T, P) of the present frames, where foresight needs them; encoded from ``images`` where absent.
        features: stream -> (B, T, W), and which of them are there, (B, T) bool, where not all are.
        clean: stream -> data (B, T, X) of a flow that is given without noise.
        dropped: stream -> (B,) bool, True where a row goes without it (what guidance compares with).
        seen: prompt -> its image tokens (B * V, T, D) and what is added to them after each of the first layers; made of ``images``
            where absent.
    """

    images: UInt8[Tensor, "B V 3 Y X"] | Float[Tensor, "B V 3 Y X"] | None = None
    ids: Int[Tensor, "B T"] | None = None
    present: Bool[Tensor, "B T"] | None = None
    state: Float[Tensor, "B S"] | None = None
    latents: Float[Tensor, "B L P"] | None = None
    features: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    clean: Mapping[str, Tensor] = field(default_factory=dict)
    dropped: Mapping[str, Tensor] = field(default_factory=dict)
    seen: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """These inputs with every tensor changed."""
        whole = {n: change(t) for n, t in vars(self).items() if isinstance(t, Tensor)}
        features = {n: (change(x), None if there is None else change(there)) for n, (x, there) in self.features.items()}
        clean, dropped = ({n: change(t) for n, t in part.items()} for part in (self.clean, self.dropped))
        seen = {n: tuple(change(t) for t in parts) for n, parts in self.seen.items()}
        return replace(self, **whole, features=features, clean=clean, dropped=dropped, seen=seen)

    def repeated(self, copies: int) -> "Inputs":
        """These inputs with every row so often, one after the other."""
        rows = len(next(iter(self.seen.values()))[0]) // self.images.shape[1] if self.seen and self.images is not None else 1
        seen = {
            n: tuple(t.unflatten(0, (rows, -1)).repeat_interleave(copies, dim=0).flatten(0, 1) for t in parts)
            for n, parts in self.seen.items()
        }
        return replace(replace(self, seen={}).each(lambda t: t.repeat_interleave(copies, dim=0)), seen=seen)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of ``each``."""
        out: list[Tensor] = []
        self.each(lambda t: out.append(t) or t)  # type: ignore[func-returns-value]
        return out


@dataclass(frozen=True)
class Targets:
    """What training compares with.

    Attributes:
        actions: normalised chunk (B, C, A); mask: (B, C), False after the episode's end.
        future: (B, V, 3, Y, X) uint8 frames of the foresight cameras ``horizon`` steps ahead, or their patches (B, T, P).
    """

    actions: Float[Tensor, "B C A"]
    mask: Bool[Tensor, "B C"]
    future: Tensor


@dataclass(frozen=True)
class Noisy:
    """A flow between noise and data: x (B, T, X) at the time (B, T) of each token."""

    x: Tensor
    time: Tensor


@dataclass(frozen=True)
class Outputs:
    """What inference answers: the normalised chunk (B, C, A), predicted latent patches (B, T, P) per foresight stream, and ids (B, T)
    per stream of words that were spoken. ``timing``: milliseconds of the ``prefix`` and of the ``steps`` after it, where the call was not
    recorded."""

    actions: Float[Tensor, "B C A"] | None
    foresight: dict[str, Tensor] = field(default_factory=dict)
    words: dict[str, Tensor] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

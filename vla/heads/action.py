"""What is denoised, and proprioception, in and out of the backbone."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import UserError
from ..flow import sinusoid
from ..spec import TimeFeatures


def mlp(size: int, width: int, encoder: str, inner: int | None = None) -> nn.Sequential:
    """``linear``, a SiLU MLP of two (``mlp``) or three (``mlp3``) layers, one with ``relu`` of ``inner`` channels, or a layer ``norm``.

    Raises:
        UserError: a norm of other channels than it should give.
    """
    if encoder == "relu" and inner is not None:
        return nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, width))
    if encoder == "norm":
        if size != width:
            raise UserError(f"encoder: norm keeps {size} channels, {width} are wanted; use encoder: linear")
        return nn.Sequential(nn.LayerNorm(width))
    layers = {"linear": 0, "mlp": 1, "mlp3": 2}[encoder]
    deep = [part for _ in range(layers) for part in (nn.SiLU(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(size, width), *deep)


class StateEncoder(nn.Module):
    """Normalised proprioception (B, S) -> one token (B, 1, D)."""

    def __init__(self, state_dim: int, width: int, encoder: str = "mlp", inner: int | None = None) -> None:
        super().__init__()
        self.mlp = mlp(state_dim, width, encoder, inner)

    def forward(self, state: Float[Tensor, "B S"]) -> Float[Tensor, "B 1 D"]:
        return self.mlp(state)[:, None]


class FlowCodec(nn.Module):
    """What is between noise and data (B, T, X) to tokens, hidden states to velocities.

    With ``time_of`` the flow time joins each token by an MLP (pi0); otherwise the expert's norms alone carry it (pi0.5).
    ``answer``: channels of an MLP with ReLU that makes the velocity.
    """

    def __init__(self, size: int, width: int, encoder: str, time_of: str | None, features: TimeFeatures, answer: int | None = None) -> None:
        super().__init__()
        self.size, self.width, self.time_of, self.features = size, width, time_of, features
        self.into = nn.Linear(size, width)
        inner = width if time_of is None else width + (features.width or width)
        self.mix: nn.Sequential
        match encoder:
            case "mlp":
                self.mix = nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))
            case "mlp3":
                self.mix = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            case _:
                self.mix = nn.Sequential()
        self.out = nn.Linear(width, size) if answer is None else mlp(width, size, "relu", answer)

    def encode(self, noisy: Float[Tensor, "B T X"], time: Float[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.join(noisy, self.told(time))

    def told(self, time: Float[Tensor, "*S T"]) -> Float[Tensor, "*S T D"] | None:
        """What joins the tokens of the flow ``time``; None where the expert's norms carry it."""
        return None if self.time_of is None else sinusoid(time if self.time_of == "t" else 1 - time, self.features, self.width)

    def join(self, noisy: Float[Tensor, "B T X"], told: Float[Tensor, "#B #T D"] | None) -> Float[Tensor, "B T D"]:
        """Tokens of what is ``noisy``, joined by what is ``told`` of its time."""
        x = self.into(noisy)
        if told is not None:
            x = torch.cat([x, told.to(x.dtype).expand(*x.shape[:2], -1)], dim=-1)
        return self.mix(x)

    def velocity(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T X"]:
        return self.out(hidden)

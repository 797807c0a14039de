"""Actions and proprioception in and out of the backbone."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..flow import sinusoid


class StateEncoder(nn.Module):
    """Normalised proprioception (B, S) -> one token (B, 1, D)."""

    def __init__(self, state_dim: int, width: int, linear: bool = False) -> None:
        super().__init__()
        deep = () if linear else (nn.SiLU(), nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(state_dim, width), *deep)

    def forward(self, state: Float[Tensor, "B S"]) -> Float[Tensor, "B 1 D"]:
        return self.mlp(state)[:, None]


class ActionHead(nn.Module):
    """Noisy action chunks to tokens, hidden states to velocities.

    With ``time_of`` the flow time joins each action by an MLP (pi0); otherwise the expert's norms carry it (pi0.5), and a
    ``linear`` encoder does without the MLP.
    """

    def __init__(self, action_dim: int, width: int, time_of: str | None, linear: bool = False) -> None:
        super().__init__()
        self.width, self.time_of = width, time_of
        self.into = nn.Linear(action_dim, width)
        inner = width if time_of is None else 2 * width
        self.mix = nn.Identity() if linear else nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Linear(width, action_dim)

    def encode(self, noisy: Float[Tensor, "B C A"], time: Float[Tensor, "B C"]) -> Float[Tensor, "B C D"]:
        return self.join(noisy, self.features(time))

    def features(self, time: Float[Tensor, "B T"]) -> Float[Tensor, "B T D"] | None:
        """What joins the actions of the flow ``time``; None where the expert's norms carry it."""
        return None if self.time_of is None else sinusoid(time if self.time_of == "t" else 1 - time, self.width)

    def join(self, noisy: Float[Tensor, "B C A"], features: Float[Tensor, "#B #C D"] | None) -> Float[Tensor, "B C D"]:
        """Tokens of ``noisy`` actions at the flow time of ``features``."""
        x = self.into(noisy)
        if features is not None:
            x = torch.cat([x, features.to(x.dtype).expand_as(x)], dim=-1)
        return self.mix(x)

    def velocity(self, hidden: Float[Tensor, "B C D"]) -> Float[Tensor, "B C A"]:
        return self.out(hidden)

    @staticmethod
    def loss(velocity: Float[Tensor, "B C A"], target: Float[Tensor, "B C A"], mask: Tensor, kind: str) -> Float[Tensor, ""]:
        """Mean error over the present chunk steps; ``mask`` (B, C) is False where the episode had ended."""
        error = F.l1_loss(velocity, target, reduction="none") if kind == "l1" else F.mse_loss(velocity, target, reduction="none")
        weight = mask[..., None].to(error.dtype).expand_as(error)
        return (error * weight).sum() / weight.sum().clamp(min=1)

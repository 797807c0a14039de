"""Flow matching: t = 0 is noise, t = 1 is data, x_t = (1 - t) noise + t data, velocity = data - noise."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import Flow, TimeFeatures


def interpolate(noise: Float[Tensor, "B C A"], data: Float[Tensor, "B C A"], time: Float[Tensor, "B C"]) -> Float[Tensor, "B C A"]:
    """The point at ``time`` on the straight path from noise to data; time may differ per chunk step."""
    t = time[..., None]
    return (1 - t) * noise + t * data


def bend(time: Tensor, shift: float) -> Tensor:
    """``time`` bent towards noise: 1 - t becomes s (1 - t) / (1 + (s - 1)(1 - t)) (SD3, Wan)."""
    return time if shift == 1 else 1 - shift * (1 - time) / (1 + (shift - 1) * (1 - time))


def draw_times(shape: tuple[int, ...], flow: Flow, generator: torch.Generator | None = None) -> Tensor:
    """Training times. ``beta``: 1 - t = 0.999 Beta(1.5, 1) + 0.001, most mass near noise (openpi ``pi0.py``)."""
    match flow.time_distribution:
        case "beta":  # the inverse of the Beta(1.5, 1) distribution function is u ** (1 / 1.5)
            time = 1 - (0.999 * torch.rand(shape, generator=generator) ** (2 / 3) + 0.001)
        case "uniform":
            time = torch.rand(shape, generator=generator)
        case "logit_normal":
            time = torch.randn(shape, generator=generator).sigmoid()
    return bend(time, flow.shift)


def time_weight(time: Float[Tensor, "*S"], flow: Flow) -> Float[Tensor, "*S"]:
    """What a sample at ``time`` counts with ``time_weight: bell``: exp(-2 (1/2 - t)^2), from 0 and of mean 1 over 1,000 steps (FastWAM)."""
    grid = bend(torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], flow.shift)
    low, mean = (f(torch.exp(-2 * (0.5 - grid) ** 2)) for f in (torch.min, torch.mean))
    return ((torch.exp(-2 * (0.5 - time.double()) ** 2) - low) / (mean - low + 1e-10)).float()


def flow_loss(
    velocity: Float[Tensor, "B T X"], target: Float[Tensor, "B T X"], counted: Tensor, time: Float[Tensor, "B T"], flow: Flow, kind: str
) -> Float[Tensor, ""]:
    """Mean error over the tokens that are ``counted`` (B, T): not those after an episode's end, nor those that were given clean."""
    error = F.l1_loss(velocity, target, reduction="none") if kind == "l1" else F.mse_loss(velocity, target, reduction="none")
    weight = counted[..., None].to(error.dtype).expand_as(error)
    share = weight if flow.time_weight == "one" else weight * time_weight(time, flow)[..., None]
    return (error * share).sum() / weight.sum().clamp(min=1)


def grid(steps: int, shift: float = 1.0) -> list[float]:
    """The times 0 .. 1 between which a flow is integrated in ``steps``."""
    return bend(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def sinusoid(time: Float[Tensor, "*S"], features: TimeFeatures, width: int) -> Float[Tensor, "*S D"]:
    """Sine and cosine features of ``time`` (``spec.TimeFeatures``), in fp32.

    Angles reach 1,600 radians, so they are computed in double precision: in single precision two implementations differ by 1e-4.
    """
    half = (features.width or width) // 2
    steps = torch.arange(half, dtype=torch.float64, device=time.device) / (half - 1 if features.endpoint else half)
    angle = time[..., None].double() * (features.scale * features.base**-steps)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def table(first: int, length: int, width: int) -> Float[Tensor, "T D"]:
    """Sine and cosine of ``length`` places from ``first`` on, with wavelengths from 2 pi to 20,000 pi (Attention Is All You Need)."""
    angle = torch.arange(first, first + length, dtype=torch.float64)[:, None] * 10_000.0 ** (
        -torch.arange(width // 2, dtype=torch.float64) / (width // 2)
    )
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


class TimeEmbedding(nn.Module):
    """Flow time (B, T) -> features (B, T, D) by a sinusoid and an MLP, as they are and after one more SiLU."""

    def __init__(self, width: int, features: TimeFeatures) -> None:
        super().__init__()
        self.width, self.features = width, features
        self.mlp = nn.Sequential(nn.Linear(features.width or width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
        dtype = next(self.mlp.parameters()).dtype
        out = self.mlp(sinusoid(time, self.features, self.width).to(dtype))
        return out, F.silu(out)

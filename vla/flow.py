"""Flow matching: t = 0 is noise, t = 1 is data, x_t = (1 - t) noise + t data, velocity = data - noise."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor], Tensor]


def interpolate(noise: Float[Tensor, "B C A"], data: Float[Tensor, "B C A"], time: Float[Tensor, "B C"]) -> Float[Tensor, "B C A"]:
    """The point at ``time`` on the straight path from noise to data; time may differ per chunk step."""
    t = time[..., None]
    return (1 - t) * noise + t * data


def draw_times(shape: tuple[int, ...], distribution: str, generator: torch.Generator | None = None) -> Tensor:
    """Training times. ``beta``: 1 - t = 0.999 Beta(1.5, 1) + 0.001, most mass near noise (openpi ``pi0.py``)."""
    u = torch.rand(shape, generator=generator)
    match distribution:
        case "beta":  # the inverse of the Beta(1.5, 1) distribution function is u ** (1 / 1.5)
            return 1 - (0.999 * u ** (2 / 3) + 0.001)
        case "uniform":
            return u
        case _:
            raise ValueError(f"unknown time distribution '{distribution}'")


def euler(velocity: Velocity, noise: Float[Tensor, "B C A"], steps: int) -> Float[Tensor, "B C A"]:
    """Integrate ``velocity(x, time (B,))`` from noise at t = 0 to data at t = 1 in equal steps."""
    x = noise
    for i in range(steps):
        time = torch.full((x.shape[0],), i / steps, dtype=x.dtype, device=x.device)
        x = x + velocity(x, time) / steps
    return x


def sinusoid(time: Float[Tensor, "*S"], width: int, shortest: float = 4e-3, longest: float = 4.0) -> Float[Tensor, "*S D"]:
    """Sine and cosine features of ``time`` with periods spaced geometrically (openpi ``posemb_sincos``), in fp32.

    Angles reach 1,600 radians, so they are computed in double precision: in single precision two implementations differ by 1e-4.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = shortest * (longest / shortest) ** fraction
    angle = time[..., None].double() * (2 * torch.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


class TimeEmbedding(nn.Module):
    """Flow time (B, T) -> features (B, T, D): sinusoid and a two-layer SiLU MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, time: Float[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoid(time, self.width).to(dtype))

"""Inference: the schedule of a model, phase by phase, each stream no oftener than the graph demands."""

import torch
from jaxtyping import Float
from torch import Tensor

from .flow import euler
from .model import Inputs, Model, Outputs
from .mot import Cache


@torch.no_grad()
def infer(model: Model, inputs: Inputs, noise: Float[Tensor, "B C A"], cache: Cache | None = None, steps: int | None = None) -> Outputs:
    """Answer a batch of observations.

    Everything that does not change between denoise steps is computed once (``Model.observe``) and read from its cache.

    Args:
        noise: the start of the flow, standard normal.
        cache: streams computed before for these very observations.
        steps: Euler steps, by default those of the spec's schedule.
    """
    kept, foresight = model.observe(inputs, cache)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return model.velocity(inputs, x, time[:, None].expand(x.shape[:2]), kept)

    return Outputs(euler(velocity, noise, steps or model.denoise_steps), foresight)

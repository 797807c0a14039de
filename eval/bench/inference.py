"""From observation to action chunk: phases with caches, beside one joint forward in every denoise step."""

import itertools

import torch

from ...vla import Model, build, load_spec
from ...vla.engine import infer
from ...vla.flow import grid
from ...vla.model import Noisy
from ...vla.proofs import Probe, probe
from .run import Row, row, seconds

SPEC = "triune_tiny"


def run() -> list[Row]:
    """Rows for one observation and for a batch of eight, in milliseconds for the whole batch."""
    model = build(load_spec(SPEC)).eval()
    rows = []
    for batch in (1, 8):
        data = probe(model, batch)
        ours = 1e3 * seconds(lambda data=data: infer(model, data.inputs, data.noise))  # type: ignore[misc]
        joint = 1e3 * seconds(lambda data=data: _joint(model, data))  # type: ignore[misc]
        rows.append(row(f"{SPEC}, batch {batch}", ours, joint, "joint forward at every step", "ms", 1.5))
    return rows


@torch.no_grad()
def _joint(model: Model, data: Probe) -> torch.Tensor:
    """The same chunk without caches."""
    name = model.action_stream
    x, times = data.noise[name], grid(next(p.steps or 10 for p in model.graph.phases.values() if p.kind == "denoise"))
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * model.joint(data.inputs, {name: Noisy(x, torch.full(x.shape[:2], now))})[name]
    return x

"""From observation to action chunk: beside one joint forward in every denoise step, and beside transformers' own modules."""

import itertools
import statistics

import torch
from torch import Tensor

from ...vla import Model, build, load_spec
from ...vla.engine import infer
from ...vla.flow import grid
from ...vla.inputs import Noisy
from ...vla.narrow import narrow, patches_as_products
from ...vla.proofs import Probe, probe
from .peer import Composed
from .run import Row, in_turns, median_interval, row, seconds

SPEC = "triune_tiny"
MEASURED = "small_60m"
FP32, BF16 = 1e-4, 0.05
"""Largest difference from the peer: in fp32 of an action, over the largest; in bf16 of the whole flow (chunk less noise), in norm."""


def run() -> list[Row]:
    """Rows for one observation and for a batch of eight, in milliseconds for the whole batch; then those of ``composed``."""
    model = build(load_spec(SPEC)).eval()
    rows = []
    for batch in (1, 8):
        data = probe(model, batch)
        ours = 1e3 * seconds(lambda data=data: infer(model, data.inputs, data.noise))  # type: ignore[misc]
        joint = 1e3 * seconds(lambda data=data: _joint(model, data))  # type: ignore[misc]
        rows.append(row(f"{SPEC}, batch {batch}", ours, joint, "joint forward at every step", "ms", 1.5))
    return rows + composed(MEASURED)


def composed(name: str, repeats: int = 21) -> list[Row]:
    """One observation in bf16 on one thread, beside the same weights in transformers' modules, milliseconds of the processor.

    The peers run with both attentions of transformers, and once more with patches cut by our product instead of bf16's slow
    convolution, which says what is gained beyond it. All of them answer the same before any is timed.

    Raises:
        RuntimeError: the answers differ.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build(load_spec(name)).eval()
        data = probe(model, 1)
        peers = {f"transformers, {attention}": Composed(model, attention) for attention in ("eager", "sdpa")}
        peers["transformers, sdpa, patches as a product"] = last = Composed(model, "sdpa")
        noise = data.noise[model.action_stream]
        exact = _chunk(model, data)
        for peer, module in peers.items():
            _same(peer, float((module(data.inputs, noise) - exact).abs().max() / exact.abs().max()), FP32)
            module.narrow()
        narrow(model)
        patches_as_products(last)
        narrowed = _chunk(model, data)
        for answer, other in ((narrowed, exact), *((module(data.inputs, noise), narrowed) for module in peers.values())):
            _same("bf16", _apart(answer, other, noise), BF16)
        works = [lambda: infer(model, data.inputs, data.noise), *(lambda m=m: m(data.inputs, noise) for m in peers.values())]
        ours, *theirs = in_turns(works, repeats)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for peer, spent in zip(peers, theirs, strict=True):
        interval = median_interval([b / a for a, b in zip(ours, spent, strict=True)])
        mine, its = (1e3 * statistics.median(times) for times in (ours, spent))
        rows.append(row(f"{name}, bf16, 1 thread", mine, its, peer, "ms", 1.3, interval))
    return rows


def _same(what: str, difference: float, most: float) -> None:
    if difference > most:
        raise RuntimeError(f"the peer does not compute the same: {what} differs by {difference:.1e}, at most {most:.0e} is allowed")


def _apart(a: Tensor, b: Tensor, noise: Tensor) -> float:
    """How far two chunks lie apart, over the length of the way from ``noise``."""
    return float((a - b).norm() / (b - noise).norm())


def _chunk(model: Model, data: Probe) -> Tensor:
    actions = infer(model, data.inputs, data.noise).actions
    assert actions is not None
    return actions


@torch.no_grad()
def _joint(model: Model, data: Probe) -> Tensor:
    """The same chunk without caches."""
    name = model.action_stream
    x, times = data.noise[name], grid(next(p.steps or 10 for p in model.graph.phases.values() if p.kind == "denoise"))
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * model.joint(data.inputs, {name: Noisy(x, torch.full(x.shape[:2], now))})[name]
    return x

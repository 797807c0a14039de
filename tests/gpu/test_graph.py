"""One CUDA graph for the whole call, and what it does not compute again."""

from dataclasses import replace

import pytest
import torch

from triune.vla import build, load_spec
from triune.vla.engine import Captured, infer
from triune.vla.narrow import narrow
from triune.vla.proofs import probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def _on_cuda(data):
    return data.inputs.each(lambda t: t.cuda()), {n: t.cuda() for n, t in data.noise.items()}


@pytest.mark.parametrize(("narrowed", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_one_graph_equals_eager(narrowed: bool, tolerance: float) -> None:
    model = build(load_spec("small_60m_tiny")).eval().cuda()
    model = narrow(model) if narrowed else model
    captured = Captured(model, *_on_cuda(probe(model, seed=0)))
    for seed in (1, 2):  # other inputs than those it was captured with
        inputs, noise = _on_cuda(probe(model, seed=seed))
        eager, graph = infer(model, inputs, noise), captured(inputs, noise)
        torch.testing.assert_close(graph.actions, eager.actions, atol=tolerance, rtol=0)
        torch.testing.assert_close(graph.foresight["future"], eager.foresight["future"], atol=tolerance, rtol=0)


def test_a_frozen_prefix_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(load_spec("small_60m_tiny")).eval().cuda()
    inputs, noise = _on_cuda(probe(model))
    with torch.no_grad():
        prefix = {"obs": model.observe(inputs)[0]["obs"]}
    whole = infer(model, inputs, noise)
    monkeypatch.setattr(model.vlm("obs"), "embed", lambda *_: pytest.fail("the prefix was computed again"))
    blind = replace(inputs, images=None)
    answer = Captured(model, blind, noise, prefix)(blind, noise)
    torch.testing.assert_close(answer.actions, whole.actions, atol=1e-4, rtol=0)

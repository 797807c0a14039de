"""One CUDA graph for the whole call, and what it does not compute again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from triune.data import Camera, Contract, Observation, Vector
from triune.data.transforms import Affine
from triune.policies import Request, TriunePolicy
from triune.vla import build, load_spec
from triune.vla.answers import Answers
from triune.vla.engine import Captured, cuda_graph, infer
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


@pytest.mark.parametrize("name", ["pi0_tiny", "groot_n17_tiny", "twinbrain_tiny", "triune_tiny"])
def test_each_length_is_one_graph(name: str) -> None:
    """Towers that wait for the host (Qwen3-VL, SmolVLM) run before it."""
    model = build(load_spec(name)).eval().cuda()
    graphs, eager = Answers(model, cuda_graph), Answers(model)
    for seed, missing in ((0, 0), (1, 1), (2, 0), (3, 1)):
        inputs, noise = _on_cuda(probe(model, seed=seed))
        length = graphs.full - missing
        inputs = replace(inputs, present=inputs.present & (torch.arange(graphs.full, device="cuda") < length))
        given, expected = graphs(inputs, noise, length), eager(inputs, noise, length)
        torch.testing.assert_close(given.actions, expected.actions, atol=1e-4, rtol=0)
    assert len(graphs.graphs) == 2


def test_the_host_waits_for_nothing_in_a_call() -> None:
    model = build(load_spec("small_60m_tiny")).eval().cuda()
    (first, noise), (inputs, other) = (_on_cuda(probe(model, seed=seed)) for seed in (0, 1))
    captured = Captured(model, first, noise)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer = captured(inputs, other)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(answer.actions, infer(model, inputs, other).actions, atol=1e-4, rtol=0)


def _policy() -> TriunePolicy:
    model = build(load_spec("triune_tiny", ["streams.obs.length=160"]))
    cameras = tuple(Camera(name=n, height=96, width=96) for n in ("agentview", "wrist"))
    state, action = Vector(names=tuple("abcdefghij")), Vector(names=tuple("tuvwxyz"))
    ranges = {key: Affine(shift=[0.0] * size, scale=[1.0] * size) for key, size in (("observation.state", 10), ("action", 7))}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TriunePolicy(model.to(device), Contract(cameras=cameras, state=state, action=action, rate=20.0, executed=5), ranges)


def test_a_policy_acts_by_its_graphs() -> None:
    """The same actions as without, and for one session alone as in company."""
    policy = _policy()
    assert policy.answers.record is cuda_graph
    words = ("lift the red cube", "stack the green cube on the blue cube and then " * 2, "lift the blue cube")
    requests = []
    for number, text in enumerate(words):
        rng = np.random.default_rng(number)
        images = {c: rng.integers(0, 256, (96, 96, 3), np.uint8) for c in ("agentview", "wrist")}
        requests.append(Request(str(number), Observation(images, rng.normal(size=10), text)))

    def answers(asked: list[Request]) -> list[np.ndarray]:
        for request in asked:
            policy.reset(request.session, seed=0)
        return [plan.chunk.actions for plan in policy.plan(asked)]

    together = answers(requests)
    assert len(policy.answers.graphs) == len({policy._length(r.observation) for r in requests}) == 2
    for request, chunk in zip(requests, together, strict=True):
        np.testing.assert_array_equal(answers([request])[0], chunk)
    policy.answers = Answers(policy.model)
    for graph, eager in zip(together, answers(requests), strict=True):
        np.testing.assert_allclose(graph, eager, atol=1e-4)

"""Samples laid end to end: the numbers of the padded batch, without its padding; and the blocks that a GPU skips."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from triune import UserError
from triune.vla import attention, build, load_spec, mot
from triune.vla.attention import attend, blocks
from triune.vla.graph import Graph
from triune.vla.model import Model
from triune.vla.mot import Pass
from triune.vla.packing import Packing
from triune.vla.proofs import TOLERANCE, Probe, probe

Make = Callable[..., Any]


def _losses(model: Model, data: Probe, packed: bool, cache: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    losses = model.losses(data.inputs, data.targets, data.noise, data.time, cache, packed=packed)
    losses["loss"].backward()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same(model: Model, data: Probe, cache: Any = None) -> None:
    (padded, gradients), (packed, others) = (_losses(model, data, way, cache) for way in (False, True))
    torch.testing.assert_close(packed, padded, atol=TOLERANCE, rtol=0)
    assert gradients.keys() == others.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["hy_vla_tiny", "mot_tiny", "pi05_ki_tiny", "pi0_tiny", "smolvla_tiny"])
def test_losses_and_gradients_are_those_of_the_padded_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved sequences, detached edges, keys projected anew; prompts of two lengths, and a camera that one sample lacks."""
    model = build(load_spec(name))
    data = probe(model, batch=3)
    if data.inputs.images is not None and name != "mot_tiny":
        present = data.inputs.present.clone()
        present[2, :4] = False
        data = replace(data, inputs=replace(data.inputs, present=present))
    rows: list[int] = []
    run = Pass.run

    def counted(self: Pass, streams: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        rows.append(sum(x.shape[0] * x.shape[1] for x in streams.values()))
        return run(self, streams, *args, **kwargs)

    monkeypatch.setattr(Pass, "run", counted)
    _same(model, data)
    there = [p for n in model.graph.owner if (p := model.presence(data.inputs).get(n)) is not None]
    assert rows[1] == rows[0] - sum(int((~p).sum()) for p in there) < rows[0]


def test_what_is_added_after_layers_and_kept_from_before_is_packed_too(make_spec: Make) -> None:
    """DeepStack and rotary positions of three axes; the frozen prompt's keys out of a cache."""
    vlm = {"weights": "random:config:qwen3_vl_tiny", "frozen": False}
    spec = make_spec(
        space={"rope_theta": 5e6}, experts={"und": vlm, "gen": {"depth": 3}, "act": {"depth": 3}}, streams={"obs": {"length": 18}}
    )
    model = build(spec)
    data = probe(model, batch=3)
    assert model.embed(["obs"], data.inputs)["obs"].inject
    _same(model, data)
    with torch.no_grad():
        prefix = {"obs": model.observe(data.inputs)[0]["obs"]}
    _same(model, data, prefix)


def test_what_reads_hidden_states_is_not_packed() -> None:
    model = build(load_spec("groot_n17_tiny"))
    data = probe(model)
    with pytest.raises(UserError, match="groot_n17_tiny has streams that read final hidden states, which is not packed"):
        model.losses(data.inputs, data.targets, data.noise, data.time, packed=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_of_a_mask_are_found_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way through a whole forward, with its kernel not compiled."""
    model = build(load_spec("pi0_tiny")).eval()
    data = probe(model)
    with torch.no_grad():
        padded = model.joint(data.inputs, data.noisy)["action"]
        found: list[Tensor] = []
        monkeypatch.setattr(mot, "sparse", lambda mask: True)
        monkeypatch.setattr(mot, "blocks", lambda mask: found.append(mask) or blocks(mask))  # type: ignore[func-returns-value]
        for packed in (False, True):
            found.clear()
            answer = model.joint(data.inputs, data.noisy, packed=packed)["action"]
            torch.testing.assert_close(answer, padded, atol=TOLERANCE, rtol=0)
            assert len(model.mot.steps) > 1 and len(found) == 3  # one for each stream, since each reads other columns


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when its compiler is imported
@pytest.mark.parametrize(("name", "samples"), [("triune", 4), ("pi05", 3), ("hy_vla", 6), ("smolvla", 5)])
def test_compiled_blocks_equal_the_reference(name: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of published size, packed to more than a thousand tokens: what is compiled skips blocks and gives the same."""
    graph, rng = Graph(load_spec(name)), torch.Generator().manual_seed(0)
    lengths = {n: graph.spec.streams[n].length for n in graph.names}
    ends = {n: torch.randint(length // 2, length + 1, (samples, 1), generator=rng) for n, length in lengths.items()}
    present = {n: torch.arange(length) < ends[n] if n in ("obs", "words") else None for n, length in lengths.items()}
    packing = Packing.of(graph, present, samples, torch.device("cpu"))
    mask = packing.mask(graph.names, graph.names, frozenset(graph.edges))
    tokens = mask.shape[-1]
    assert 1024 < tokens == sum(len(places) for places in packing.places.values())
    plan = blocks(mask)
    computed = int(plan.kv_num_blocks.sum() + (plan.full_kv_num_blocks.sum() if plan.full_kv_num_blocks is not None else 0))
    assert computed < 0.8 * (-(-tokens // 128)) ** 2
    monkeypatch.setattr(attention, "_compiled", lambda: torch.compile(flex_attention))
    q, k, v = (torch.randn(1, heads, tokens, 16, generator=rng) for heads in (4, 2, 2))
    torch.testing.assert_close(attend(q, k, v, plan), attend(q, k, v, mask), atol=TOLERANCE, rtol=0)

"""Prompts of several lengths, and calls that are recorded once: both answer as the plain call does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from triune.config import CONFIGS
from triune.vla import Inputs, build, load_spec
from triune.vla.answers import GRAPHS, ROOM, Answers
from triune.vla.engine import Captured, infer, unrecordable
from triune.vla.graph import Graph
from triune.vla.model import Model
from triune.vla.proofs import TOLERANCE, probe

from ..tape import taped

Make = Callable[..., Any]
ACTS = sorted(p.stem for p in (CONFIGS / "model").glob("*_tiny.yaml") if p.stem != "mot_tiny")  # mot makes no actions
READS = [n for n in ACTS if any(s.tokens == "prompt" for s in load_spec(n).streams.values())]


def _shorter(model: Model, inputs: Inputs, room: int) -> tuple[Inputs, int]:
    """Prompts of which the first has ``room`` tokens after its last image token, the second one fewer; and how many that are."""
    vlm = next(model.vlm(n) for n, s in model.spec.streams.items() if s.tokens == "prompt")
    end = int((inputs.ids == vlm.image_token).nonzero()[:, 1].max()) + 1 + room
    present = torch.arange(inputs.ids.shape[1]) < torch.tensor([[end], [end - 1]])
    return replace(inputs, present=present), end


@pytest.mark.parametrize("name", READS)
def test_padding_carries_nothing(name: str) -> None:
    """Whatever it holds, and when there is less of it."""
    model = build(load_spec(name)).eval()
    data = probe(model)
    inputs, end = _shorter(model, data.inputs, 2)
    other = replace(inputs, ids=torch.where(inputs.present, inputs.ids, 0))
    assert not torch.equal(other.ids, inputs.ids)
    whole, same, short = infer(model, inputs, data.noise), infer(model, other, data.noise), Answers(model)(inputs, data.noise, end)
    assert torch.equal(whole.actions, same.actions)
    torch.testing.assert_close(short.actions, whole.actions, atol=TOLERANCE, rtol=0)
    for stream, patches in whole.foresight.items():
        assert torch.equal(patches, same.foresight[stream])
        torch.testing.assert_close(short.foresight[stream], patches, atol=TOLERANCE, rtol=0)
    assert model.graph.spec.streams == load_spec(name).streams  # the model itself is as it was


def test_a_prompt_is_padded_to_the_next_length(make_spec: Make) -> None:
    model = build(make_spec(streams={"obs": {"length": 60}})).eval()
    answers, image = Answers(model), model.vlm("obs").image_token
    ids = torch.tensor([5, image, image, 5, image, image] + [7] * 54)
    lengths = [answers.length(ids, torch.arange(60) < end) for end in (1, 6 + ROOM[0], 6 + ROOM[0] + 1, 6 + ROOM[1] + 1, 60)]
    assert lengths == [6 + ROOM[0], 6 + ROOM[0], 6 + ROOM[1], 60, 60]
    absent = (torch.arange(60) < 20) & (ids != image)  # a camera that is not there keeps its places
    assert answers.length(ids, absent) == 6 + ROOM[0]


@pytest.mark.parametrize("name", ACTS)
def test_a_recorded_call_answers_as_the_plain_one(name: str) -> None:
    """Nothing but what is copied in changes from call to call: no mask, constant, key or branch is left from the call that was recorded."""
    model = build(load_spec(name)).eval()
    first = probe(model, seed=0)
    captured = Captured(model, first.inputs, first.noise, record=taped)
    places = [t.data_ptr() for t in (*captured.inputs.tensors(), *captured.noise.values(), captured.outputs.actions)]
    before = infer(model, first.inputs, first.noise).actions
    for seed in (1, 2):
        data = probe(model, seed=seed)
        inputs = data.inputs if name not in READS else _shorter(model, data.inputs, seed)[0]
        answer, plain = captured(inputs, data.noise), infer(model, inputs, data.noise)
        assert torch.equal(answer.actions, plain.actions) and not torch.equal(plain.actions, before)
        assert all(torch.equal(answer.foresight[n], plain.foresight[n]) for n in plain.foresight)
        assert [t.data_ptr() for t in (*captured.inputs.tensors(), *captured.noise.values(), captured.outputs.actions)] == places
        assert answer.actions.data_ptr() not in places  # the next call does not overwrite it
    with pytest.raises(AssertionError, match="captured for"):
        captured(data.inputs.each(lambda t: t[:1]), data.noise)


def test_a_frozen_prefix_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(load_spec("small_60m_tiny")).eval()
    data = probe(model)
    with torch.no_grad():
        prefix = {"obs": model.observe(data.inputs)[0]["obs"]}
    whole = infer(model, data.inputs, data.noise)
    monkeypatch.setattr(model.vlm("obs"), "embed", lambda *_: pytest.fail("the prefix was computed again"))
    blind = replace(data.inputs, images=None)
    answer = Captured(model, blind, data.noise, prefix, record=taped)(blind, data.noise)
    torch.testing.assert_close(answer.actions, whole.actions, atol=1e-6, rtol=0)


def test_each_length_and_batch_is_recorded_once(make_spec: Make) -> None:
    model = build(make_spec(streams={"obs": {"length": 60}})).eval()
    recorded = []

    def record(call: Callable[[], Any]) -> Any:
        recorded.append(call)
        return taped(call)

    answers, data = Answers(model, record), probe(model)
    for room, length in ((1, 25), (16, 25), (17, 41), (1, 25)):
        inputs, end = _shorter(model, data.inputs, room)
        assert answers.length(inputs.ids[0], inputs.present[0]) == length >= end
        torch.testing.assert_close(
            answers(inputs, data.noise, length).actions, infer(model, inputs, data.noise).actions, atol=TOLERANCE, rtol=0
        )
    assert len(recorded) == 2
    answers(data.inputs.each(lambda t: t[:1]), {n: x[:1] for n, x in data.noise.items()}, 60)
    assert len(recorded) == len(answers.graphs) == 3
    for length in range(30, 30 + GRAPHS):
        answers(data.inputs, data.noise, length)
    assert len(answers.graphs) == GRAPHS and len(recorded) == 3 + GRAPHS


def test_what_cannot_be_recorded_is_said(make_spec: Make) -> None:
    phases = {"see": {"kind": "prefill", "streams": ["obs", "state"], "period": 2}, "imagine": {"kind": "regress", "streams": ["future"]}}
    model = build(make_spec(schedule=phases | {"act": {"kind": "denoise", "streams": ["action"]}})).eval()
    with pytest.warns(UserWarning, match="probe runs without a graph: phase 'see' runs at every call number 2 only"):
        answers = Answers(model, taped)
    data = probe(model)
    inputs, _ = _shorter(model, data.inputs, 1)
    assert answers.record is None and answers.length(inputs.ids[0], inputs.present[0]) == 16  # keys of a prompt are kept between calls
    assert torch.equal(answers(inputs, data.noise, 16).actions, infer(model, inputs, data.noise).actions)
    said = {"expert": "gen", "tokens": "words", "vocabulary": 9, "length": 4}
    speaking = make_spec(
        streams={"said": said},
        edges={"said": {"said": "causal"}},
        heads={"said": {"kind": "words"}},
        schedule={
            "see": {"kind": "prefill", "streams": ["obs", "state"]},
            "say": {"kind": "ar", "streams": ["said"]},
            "imagine": {"kind": "regress", "streams": ["future"]},
            "act": {"kind": "denoise", "streams": ["action"]},
        },
    )
    assert unrecordable(Graph(speaking)) == "phase 'say' says words one by one, and the host waits for each"

"""What a schedule can say: modes, guidance, settled actions, slow phases, clean copies, words said one by one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from triune import UserError
from triune.vla import Inputs, build, load_spec
from triune.vla.engine import Memory, Request, infer, infer_again
from triune.vla.flow import draw_times, grid, time_weight
from triune.vla.inputs import Noisy
from triune.vla.model import Model
from triune.vla.proofs import Probe, probe
from triune.vla.realtime import settled
from triune.vla.spec import Flow

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def motus() -> tuple[Model, Probe]:
    model = build(load_spec("motus_tiny")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, probe(model)


def _answer(model: Model, data: Probe, inputs: Inputs | None = None, **how: Any) -> Any:
    return infer(model, inputs or data.inputs, data.noise, request=Request(steps=3, **how))


def test_modes_are_schedules_over_one_model(motus: tuple[Model, Probe]) -> None:
    """Motus: what is neither wanted nor given stays noise; what is given is clean; both change what is drawn."""
    model, data = motus
    future, actions = data.targets.future, data.targets.actions
    joint, policy = _answer(model, data), _answer(model, data, mode="policy")
    assert joint.foresight["video"].shape == future.shape and joint.actions.shape == actions.shape
    assert policy.foresight == {} and not torch.equal(policy.actions, joint.actions)

    seen = [replace(data.inputs, clean={"video": future + i}) for i in range(2)]
    told = [_answer(model, data, given, mode="inverse_dynamics") for given in seen]
    assert not torch.equal(told[0].actions, told[1].actions) and torch.equal(told[0].foresight["video"], future)

    done = [replace(data.inputs, clean={"action": actions + i}) for i in range(2)]
    dreamt = [_answer(model, data, given, mode="world_model") for given in done]
    assert torch.equal(dreamt[0].actions, actions)
    assert not torch.equal(dreamt[0].foresight["video"], dreamt[1].foresight["video"])
    with pytest.raises(UserError, match="has no mode 'dream' .it has policy, inverse_dynamics, world_model, video"):
        _answer(model, data, mode="dream")


def test_tokens_that_share_a_time_carry_it(motus: tuple[Model, Probe]) -> None:
    """Proprioception and the present frame are as noisy as what they go with."""
    model, data = motus
    early, late = ({n: Noisy(x, torch.full(x.shape[:2], t)) for n, x in data.noise.items()} for t in (0.2, 0.8))
    with torch.no_grad():
        kept = model.observe(data.inputs)[0]
        tokens = [model.embed(["state", "frame", "registers"], data.inputs, noisy, kept) for noisy in (early, late)]
    for name in ("state", "frame", "registers"):
        assert [float(t[name].time.unique()) for t in tokens] == pytest.approx([0.2, 0.8])


def test_guidance_leads_away_from_what_is_left_out(make_spec: Make) -> None:
    def spec(scale: float) -> Any:
        act = {"kind": "denoise", "streams": ["action"], "guidance": {"scale": scale, "without": ["obs"]}}
        phases = {"see": {"kind": "prefill", "streams": ["obs", "state"]}, "imagine": {"kind": "regress", "streams": ["future"]}}
        return make_spec(schedule=phases | {"act": act})

    models = {scale: build(spec(scale)).eval() for scale in (0.0, 1.0, 3.0)}
    plain = build(make_spec()).eval()
    data = probe(plain)
    blind = replace(data.inputs, dropped={"obs": torch.ones(2, dtype=torch.bool)})
    answers = {scale: _answer(model, data).actions for scale, model in models.items()}
    torch.testing.assert_close(answers[1.0], _answer(plain, data).actions, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers[0.0], _answer(plain, data, blind).actions, atol=1e-5, rtol=0)
    assert (answers[3.0] - answers[1.0]).abs().max() > 1e-3
    one = replace(data.inputs, dropped={"obs": torch.tensor([True, False])})  # what training drops row by row
    halves = _answer(plain, data, one).actions
    torch.testing.assert_close(halves, torch.stack([answers[0.0][0], answers[1.0][1]]), atol=1e-5, rtol=0)


def test_settled_actions_stay_and_are_not_scored(make_spec: Make) -> None:
    model = build(make_spec(heads={"action": {"prefix": 2}})).eval()
    data = probe(model)
    begun = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(3))
    free, bound, other = _answer(model, data), *(_answer(model, data, prefix=settled(model, begun + i)) for i in (0, 1))
    assert torch.equal(bound.actions[:, :2], begun)
    assert not torch.allclose(bound.actions[:, 2:], free.actions[:, 2:]) and not torch.allclose(bound.actions[:, 2:], other.actions[:, 2:])
    with pytest.raises(UserError, match="was trained with up to 2 settled actions, 3 are given"):
        settled(model, torch.zeros(2, 3, 3))
    with pytest.raises(UserError, match="up to 0 settled actions"):
        settled(build(make_spec()).eval(), begun)

    # in training they are the data at t = 1, and what would be predicted of them does not count
    time = torch.full((2, 6), 0.4)
    time[:, :2] = 1.0
    scored = [
        model.losses(data.inputs, data.targets, {"action": noise}, {"action": time})["action"]
        for noise in (data.noise["action"], torch.cat([data.noise["action"][:, :2] + 5, data.noise["action"][:, 2:]], dim=1))
    ]
    assert torch.equal(scored[0], scored[1])


def test_slow_phases_are_read_as_they_were(make_spec: Make) -> None:
    """A VLM that sees every second call: age 0 equals fresh, and what it left is refused when it is too old."""
    phases = {
        "see": {"kind": "prefill", "streams": ["obs"], "period": 2, "stale": 0.5},
        "feel": {"kind": "prefill", "streams": ["state"]},
        "imagine": {"kind": "regress", "streams": ["future"]},
        "act": {"kind": "denoise", "streams": ["action"]},
    }
    model = build(make_spec(schedule=phases)).eval()
    first, second = probe(model, seed=0), probe(model, seed=1)
    later = replace(first.inputs, images=second.inputs.images, state=second.inputs.state)
    mixed = replace(later, images=first.inputs.images)  # the state is of now, the picture of before
    memory, how = Memory(), Request(steps=3)
    fresh = infer_again(model, first.inputs, first.noise, memory, now=0.0, request=how)
    assert torch.equal(fresh.actions, _answer(model, first).actions)
    again = infer_again(model, later, first.noise, memory, now=0.1, request=how)
    torch.testing.assert_close(again.actions, _answer(model, first, mixed).actions)
    assert not torch.allclose(again.actions, _answer(model, first, later).actions)
    third = infer_again(model, later, first.noise, memory, now=0.2, request=how)
    assert torch.equal(third.actions, _answer(model, first, later).actions)
    with pytest.raises(UserError, match=r"phase 'see' of probe ran 0.60 s ago, its limit is 0.50 s"):
        infer_again(model, later, first.noise, memory, now=0.8, request=how)


def test_a_clean_copy_is_made_of_what_was_denoised(make_spec: Make) -> None:
    """BAGEL's way: nobody reads the noisy frames; their result is read again without noise, and stands where they stood."""
    spec = make_spec(
        experts={"gen": {"time": "adaptive_norm"}},
        streams={
            "future": {"tokens": "frames", "encoder": "linear", "advances": False},
            "drawn": {"expert": "gen", "tokens": "clean", "of": "future", "length": 8, "ids": "one"},
        },
        edges={"drawn": {"obs": "full", "drawn": "full"}, "action": {"future": None, "drawn": "full"}},
    )
    model = build(spec).eval()
    assert [p.kind for p in model.graph.phases.values()] == ["prefill", "denoise", "prefill", "denoise"]
    positions = model.graph.positions({}, 1)
    assert positions["future"][0].tolist() == list(range(16, 24)) and positions["action"][0].tolist() == list(range(16, 22))
    assert positions["drawn"].unique().tolist() == [22]  # all of it at one place
    data = probe(model)
    drawn = _answer(model, data)
    told = model.joint(replace(data.inputs, clean={"future": drawn.foresight["future"]}), data.noisy)["action"]
    with torch.no_grad():
        kept = model.observe(data.inputs)[0]
        kept |= model.fill("prefill_drawn", replace(data.inputs, clean={"future": drawn.foresight["future"]}), kept)[0]
        cached = model.velocity(["action"], data.inputs, {"action": data.noisy["action"]}, kept)["action"]
    torch.testing.assert_close(cached, told, atol=1e-5, rtol=0)


def test_words_are_said_one_by_one() -> None:
    """Each is the likeliest after those before it, as one forward over all of them finds again; actions read what was said."""
    row = {"times": 3, "block": True, "pieces": [{"stream": "views", "length": 2}, {"stream": "marks", "length": 1}]}
    spec = load_spec("hy_vla_tiny").model_dump(mode="json", exclude_unset=True)
    spec |= {
        "heads": spec["heads"] | {"words": {"kind": "words"}},
        "sequence": [{"times": 3, "pieces": [row]}, {"stream": "words", "length": 8}],
    }
    spec["streams"]["words"]["length"] = 8
    spec["schedule"] = {
        "look": {"kind": "prefill", "streams": ["views", "marks"]},
        "say": {"kind": "ar", "streams": ["words"]},
        "feel": {"kind": "prefill", "streams": ["state"]},
        "act": {"kind": "denoise", "streams": ["action"], "steps": 2},
    }
    from triune.config import parse
    from triune.vla import Spec

    model = build(parse(Spec, spec, "spoken")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    data = probe(model)
    begun = torch.arange(8).expand(2, -1) < torch.tensor([[2], [3]])
    inputs = replace(data.inputs, present=begun)
    out = infer(model, inputs, data.noise)
    said = out.words["words"]
    assert torch.equal(said[begun], data.inputs.ids[begun])
    scores = model.joint(replace(inputs, ids=said, present=torch.ones_like(begun)), data.noisy)["words"]
    for row, first in enumerate((2, 3)):
        assert torch.equal(scores[row, first - 1 : -1].argmax(-1), said[row, first:])
    told = replace(inputs, ids=(said + 1) % 60, present=torch.ones_like(begun))
    assert not torch.allclose(infer(model, told, data.noise).actions, out.actions)


def test_times_are_bent_and_weighed_as_wan_does() -> None:
    flow = Flow(time_distribution="uniform", shift=5.0, time_weight="bell")
    times = draw_times((20000,), flow, torch.Generator().manual_seed(0))
    assert float((1 - times).median()) == pytest.approx(5 * 0.5 / 3, abs=0.01)
    weights = time_weight(1 - torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1].float(), Flow(time_weight="bell"))
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4) and float(weights.min()) == pytest.approx(0, abs=1e-6)
    assert grid(10, 5.0)[5] == pytest.approx(1 - 5 * 0.5 / 3)
    assert 0.4 < float(draw_times((20000,), Flow(time_distribution="logit_normal"), torch.Generator().manual_seed(0)).mean()) < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": {"action": {"expert": None}}}, "a context holds features or state, not actions"),
        ({"streams": {"words": {"tokens": "features", "length": 4}}}, "width is that of features"),
        ({"streams": {"said": {"expert": "gen", "tokens": "hidden", "length": 4}}}, "of names the stream"),
        ({"streams": {"said": {"expert": "gen", "tokens": "hidden", "of": "nobody", "length": 4}}}, "names no stream: 'nobody'"),
        ({"streams": {"said": {"expert": "gen", "tokens": "hidden", "of": "obs", "length": 4}}}, "its length must be 16, not 4"),
        ({"streams": {"copy": {"expert": "gen", "tokens": "clean", "of": "obs", "length": 16}}}, "must hold frames or actions, not prompt"),
        ({"streams": {"future": {"grid": [1, 2, 2]}}}, "holds 4 tokens, length says 8"),
        ({"streams": {"future": {"start": 2}}}, "positions: restart"),
        ({"streams": {"state": {"time_of": "future"}}}, "names a stream that is denoised"),
        ({"experts": {"act": {"axes": [4, 2]}}}, "has 6 channels, the space's head_dim is 8"),
        ({"experts": {"act": {"cross": {"place": "after"}}}}, "set reads: hidden"),
        ({"edges": {"action": {"obs": {"via": "hidden"}}}}, "no layer of expert 'act' reads hidden states"),
        ({"edges": {"action": {"obs": {"via": "hidden", "relation": "causal"}}}}, "an edge via hidden states is full"),
        (
            {"streams": {"words": {"tokens": "features", "width": 4, "length": 2}}, "edges": {"action": {"words": "full"}}},
            "the context words has no keys",
        ),
        ({"streams": {"words": {"tokens": "features", "width": 4, "length": 2}}, "edges": {"words": {"obs": "full"}}}, "reads nothing"),
        ({"sequence": [{"stream": "future", "length": 3}]}, "sequence has 3 tokens of future, its length is 8"),
        ({"heads": {"future": {"autoencoder": None}}}, "give either the autoencoder, or the channels"),
        ({"schedule": {"a": {"kind": "prefill", "streams": ["obs"], "steps": 3}}}, "are for denoise phases, not for prefill"),
        ({"schedule": {"a": {"kind": "denoise", "streams": ["action"], "period": 3}}}, "a denoise phase runs at every call"),
        ({"experts": {"gen": {"bridge": "linear"}}}, "a bridge leads from a space of the expert's own"),
        ({"experts": {"gen": {"space": {"heads": 2, "kv_heads": 1, "head_dim": 12}}}}, "or give the expert a bridge"),
        ({"edges": {"action": {"action": "row_causal"}}}, "is between two streams"),
        ({"couple": {"act": {"steps": [0]}}}, "couple.act.steps names 1 steps, the expert has 2 layers"),
        ({"edges": {"obs": {"future": "full"}}}, "or say allow_perturb: true"),
    ],
)  # fmt: skip
def test_what_does_not_hold_together_is_refused_in_a_sentence(changes: dict, message: str, make_spec: Make) -> None:
    with pytest.raises(UserError, match=message):
        build(make_spec(**changes))

"""The four proofs over the published specs, and over variants that use every word of the vocabulary."""

import pytest

from triune.config import CONFIGS
from triune.vla import Graph, build
from triune.vla.proofs import TOLERANCE, cache_equivalence, check, expert_parity, frozen, gradient_probe, overfit

NAMES = {p.stem for p in (CONFIGS / "model").glob("*.yaml")}
SPECS = sorted(name for name in NAMES if name.removesuffix("_tiny") not in NAMES - {name})
"""A published-size spec is proved through its tiny variant, which need not be proved twice."""

HIDDEN = {"cross": {"first": 0, "every": 2, "reads": "hidden"}}
AFTER = {"cross": {"first": 0, "every": 1, "reads": "hidden", "place": "after", "adapter": "mlp"}}
WORDS = {"tokens": "features", "width": 12, "length": 5}
"""Layers that read final hidden states in place of keys, or after them; a context."""

VARIANTS = {
    "plain": {},
    "block_causal": {"edges": {"action": {"action": "block_causal"}}},
    "own_block": {"edges": {"future": {"future": "own_block"}}},
    "causal": {"edges": {"action": {"action": "causal"}}},
    "detached": {"edges": {"action": {"obs": {"relation": "full", "detach": True}, "future": {"relation": "full", "detach": True}}}},
    "state_reads": {"edges": {"state": {"obs": "full", "future": "full"}}},
    "one_way": {"edges": {"action": {"future": None}}},
    "trained_vlm": {"experts": {"und": {"frozen": False}}},
    "concatenated_time": {"experts": {"act": {"time": "none"}}},
    "sees_latents": {"streams": {"future": {"tokens": "latents"}}, "heads": {"future": {"predicts": "change"}}},
    "joined_in_the_middle": {"couple": {"act": {"joint": [1, 2]}}},
    "tails_joined": {"experts": {"gen": {"depth": 4}}, "couple": {"und": {"first": 2}, "act": {"first": 2}, "gen": {"joint": [2, 4]}}},
    "every_second": {"experts": {"act": {"depth": 1}}, "couple": {"act": {"first": 1, "every": 2}}},
    "longer_than_the_vlm": {"experts": {"act": {"depth": 3}}, "couple": {"act": {}}},
    "cross_layers": {"experts": {"act": {"cross": {}}}},
    "restart": {"streams": {"action": {"positions": "restart"}, "future": {"positions": "restart"}}},
    "final_hidden": {
        "experts": {"gen": {"width": 32}, "act": HIDDEN | {"depth": 4}},
        "edges": {"action": {"obs": {"via": "hidden"}, "future": {"via": "hidden"}}},
    },
    "final_hidden_detached": {"experts": {"act": HIDDEN}, "edges": {"action": {"obs": {"via": "hidden", "detach": True}, "future": None}}},
    "context_after_attention": {"experts": {"act": AFTER}, "streams": {"words": WORDS}, "edges": {"action": {"words": {"via": "hidden"}}}},
    "made_of_hidden": {
        "experts": {"gen": {"width": 40}},
        "streams": {"said": {"expert": "gen", "tokens": "hidden", "of": "obs", "length": 16, "encoder": "mlp3"}},
        "edges": {"said": {"said": "full"}, "future": {"obs": None, "said": "full"}},
    },
    "noisy_and_clean_copies": {
        "experts": {"gen": {"time": "adaptive_norm"}},
        "streams": {
            "future": {"tokens": "frames", "encoder": "linear", "advances": False},
            "drawn": {"expert": "gen", "tokens": "clean", "of": "future", "length": 8, "ids": "one"},
        },
        "edges": {"drawn": {"obs": "full", "drawn": "full"}, "action": {"future": None, "drawn": "full"}},
        "heads": {"future": {"time_distribution": "logit_normal"}},
    },
    "tables_of_time": {"experts": {"act": {"time": "adaln", "norm": "layer_plain", "qk_norm": "whole", "bias": True, "gated": False}}},
    "time_in_attention_alone": {"experts": {"act": {"time": "attention_norm", "norm": "layer", "bias": "ffn"}}},
    "three_axes": {
        "experts": {"gen": {"axes": [4, 2, 2]}, "act": {"axes": []}},
        "streams": {"future": {"grid": [2, 2, 2], "positions": "restart", "start": 1}, "action": {"table": 3}},
    },
    "interleaved": {
        "sequence": [{"stream": "future", "length": 4}, {"stream": "state", "length": 1}, {"stream": "future", "length": 4}],
        "streams": {"state": {"positions": "continue"}},
        "edges": {"future": {"future": "block_causal", "state": "block_causal"}, "state": {"state": "full", "future": "causal"}},
        "schedule": {
            "see": {"kind": "prefill", "streams": ["obs"]},
            "imagine": {"kind": "regress", "streams": ["future", "state"]},
            "act": {"kind": "denoise", "streams": ["action"]},
        },
    },
    "bridged_in_the_middle": {
        "experts": {"gen": {"space": {"heads": 2, "kv_heads": 1, "head_dim": 12}, "bridge": "linear", "depth": 3}, "act": {"depth": 3}},
        "couple": {"gen": {"joint": [1, 2]}, "act": {}, "und": {"first": 1}},
    },
    "aligned": {"experts": {"gen": {"space": {"heads": 6, "kv_heads": 2, "head_dim": 4}, "bridge": "linear_norm"}}},
    "strictly_earlier_blocks": {
        "streams": {"future": {"block": 4}, "action": {"block": 3}},
        "edges": {"future": {"future": "earlier_block"}, "action": {"future": "block_causal", "action": "window"}},
    },
    "row_by_row": {"edges": {"action": {"future": "row_causal"}}},
    "explicit_steps": {"experts": {"act": {"depth": 1}}, "couple": {"act": {"steps": [1]}}},
    "perturbed": {"experts": {"und": {"allow_perturb": True}}, "edges": {"obs": {"future": "full"}, "future": {"obs": None}}},
    "registers": {
        "streams": {"notes": {"expert": "act", "tokens": "queries", "length": 3, "time_of": "action"}},
        "edges": {"notes": {"obs": "full", "notes": "full", "action": "full"}, "action": {"notes": "full"}},
        "schedule": {
            "see": {"kind": "prefill", "streams": ["obs", "state"]},
            "imagine": {"kind": "regress", "streams": ["future"]},
            "act": {"kind": "denoise", "streams": ["notes", "action"]},
        },
    },
}


@pytest.mark.parametrize("name", SPECS)
def test_published_spec(name: str) -> None:
    row = check([name])["rows"][0]
    assert row["passed"], row


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_follow_the_graph(name: str, make_spec) -> None:
    assert gradient_probe(build(make_spec(**VARIANTS[name]))) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_phases_with_caches_equal_the_joint_forward(name: str, make_spec) -> None:
    assert cache_equivalence(build(make_spec(**VARIANTS[name]))) < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "trained_vlm"])
def test_expert_alone_equals_transformers(name: str, make_spec) -> None:
    parity = expert_parity(build(make_spec(**VARIANTS[name])))
    assert parity is not None and parity < TOLERANCE


def test_frozen_expert_stays(make_spec) -> None:
    assert frozen(build(make_spec())) == []


def test_frozen_modules_stay_in_evaluation_mode(make_spec) -> None:
    """Dropout of a frozen VLM would make its keys noise."""
    model = build(make_spec()).train()
    assert not any(module.training for module in model.mot.experts["und"].modules())
    assert model.mot.experts["act"].training and not model.eval().mot.experts["act"].training


def test_a_trained_expert_is_not_called_frozen(make_spec) -> None:
    model = build(make_spec(experts={"und": {"frozen": False}}))
    assert any("und" in name for name in model.trained())


@pytest.mark.parametrize("name", ["plain", "detached", "concatenated_time", "sees_latents"])
def test_one_batch_is_learned(name: str, make_spec) -> None:
    assert overfit(build(make_spec(**VARIANTS[name])), steps=80) < 0.5


def test_the_probe_notices_a_wrong_mask(make_spec, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(make_spec(edges={"action": {"action": "causal"}}))
    honest, right = Graph(model.spec), model.graph.mask

    def wrong(rows, *given):
        return None if len(rows) == 4 else right(rows, *given)

    monkeypatch.setattr(model.graph, "mask", wrong)
    monkeypatch.setattr(model.graph, "reaches", honest.reaches)
    assert gradient_probe(model) != []


def test_the_cache_check_notices_moved_positions(make_spec, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(make_spec())
    right = model.graph.positions

    def moved(*given):
        out = right(*given)
        calls.append(1)
        return out if len(calls) == 1 else out | {"action": out["action"] + 7}

    calls: list[int] = []
    monkeypatch.setattr(model.graph, "positions", moved)
    assert cache_equivalence(model) > TOLERANCE

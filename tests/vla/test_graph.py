"""What follows from who reads whom."""

import pytest
import torch

from triune import UserError
from triune.config import CONFIGS
from triune.vla import Graph


def test_phases_follow_from_the_edges(make_spec) -> None:
    graph = Graph(make_spec())
    assert [(p.kind, p.streams) for p in graph.phases.values()] == [
        ("prefill", ("obs", "state")),
        ("regress", ("future",)),
        ("denoise", ("action",)),
    ]
    assert list(graph.cached().values()) == [("obs", "state"), ("future",), ()]


def test_what_nobody_reads_is_not_kept(make_spec) -> None:
    graph = Graph(make_spec(edges={"action": {"future": None, "state": None}}))
    assert list(graph.cached().values()) == [("obs",), (), ()]


def test_mask_blocks(make_spec) -> None:
    graph = Graph(make_spec(edges={"action": {"action": "block_causal"}, "future": {"future": "own_block"}}))
    mask = graph.mask(graph.names, graph.names, {})
    assert mask is not None
    tokens = mask[0, 0]
    obs, future, state, action = tokens.split([16, 8, 1, 6])
    assert torch.equal(obs[:, :16], torch.ones(16, 16).tril().bool()) and not obs[:, 16:].any()
    assert future[0, 16:20].all() and not future[0, 20:].any() and future[5, 20:24].all() and not future[5, 16:20].any()
    assert action[0, 25:27].all() and not action[0, 27:].any() and action[3, 25:29].all() and not action[3, 29:].any()
    assert state[0].sum() == 1


def test_no_mask_where_everything_reads_everything(make_spec) -> None:
    graph = Graph(make_spec())
    assert graph.mask(["action"], ["obs", "future", "state", "action"], {}) is None


def test_absent_tokens_are_not_read_and_do_not_count(make_spec) -> None:
    graph = Graph(make_spec())
    present = torch.ones(1, 16, dtype=torch.bool)
    present[0, 10:] = False
    mask = graph.mask(["action"], ["obs", "action"], {"obs": present})
    assert mask is not None and mask[0, 0, :, :10].all() and not mask[0, 0, :, 10:16].any() and mask[0, 0, :, 16:].all()
    positions = graph.positions({"obs": present}, 1)
    assert positions["future"][0].tolist() == list(range(10, 18)) and positions["action"][0, 0] == 18
    assert positions["state"].tolist() == [[0]]


def test_hash_sees_an_edge(make_spec) -> None:
    spec = make_spec()
    assert Graph(spec).hash() == Graph(make_spec()).hash() != Graph(spec.cut(("action", "future"))).hash()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": {"obs": {"action": "full"}}}, "is frozen and must not read action"),
        ({"edges": {"future": {"action": "full"}}}, "in a cycle"),
        ({"edges": {"action": {"obs": "causal"}}}, "inside one stream or sequence only"),
        ({"streams": {"action": {"block": None}}, "edges": {"action": {"action": "block_causal"}}}, "needs streams.action.block"),
        ({"schedule": {"all": {"kind": "prefill", "streams": ["obs"]}}}, "must name every stream once"),
        (
            {
                "schedule": {
                    "a": {"kind": "denoise", "streams": ["action"]},
                    "b": {"kind": "prefill", "streams": ["obs", "state"]},
                    "c": {"kind": "regress", "streams": ["future"]},
                }
            },
            "which a later phase makes",
        ),
    ],
)
def test_a_graph_that_cannot_run_is_refused(changes: dict, message: str, make_spec) -> None:
    with pytest.raises(UserError, match=message):
        Graph(make_spec(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": {"obs": {"expert": "nobody"}}}, "names no expert: 'nobody'"),
        ({"edges": {"action": {"sky": "full"}}}, "names no stream: 'sky'"),
        ({"heads": {"state": {"kind": "flow", "action_dim": 3}}}, "must be 'actions'"),
        ({"couple": {"sky": {}}}, "names no expert: 'sky'"),
        ({"experts": {"act": {"widht": 4}}}, "did you mean 'width'"),
        ({"space": {"heads": 3}}, "multiple of kv_heads"),
    ],
)
def test_a_spec_that_does_not_hold_together_is_refused(changes: dict, message: str, make_spec) -> None:
    with pytest.raises(UserError, match=message):
        make_spec(**changes)


def test_cutting_an_edge_that_is_not_there(make_spec) -> None:
    with pytest.raises(UserError, match="no edge obs <- action to cut; it has"):
        make_spec().cut(("obs", "action"))


def test_steps_say_which_layers_meet(make_spec) -> None:
    """DeepVision-VLA's arrangement: the last layers of experts of unequal depth meet, the others run beside each other."""
    spec = make_spec(couple={"und": {"first": 1}, "gen": {"joint": [3, 5]}, "act": {"first": 3, "every": 2}})
    steps = Graph(spec).steps({"und": 4, "gen": 5, "act": 1})
    assert [dict(step.layers) for step in steps] == [
        {"gen": 0},
        {"und": 0, "gen": 1},
        {"und": 1, "gen": 2},
        {"und": 2, "gen": 3, "act": 0},
        {"und": 3, "gen": 4},
    ]
    assert [("future", "obs") in step.edges for step in steps] == [False, False, False, True, True]
    assert all(("future", "future") in step.edges for step in steps)
    assert [("action", "obs") in step.edges for step in steps] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("couple", "depths", "message"),
    [
        ({}, {"und": 2, "gen": 3, "act": 2}, "depths differ .und 2, gen 3, act 2., so their layers do not meet"),
        ({"act": {"first": 1}}, {"und": 2, "gen": 3, "act": 2}, "say in couple where they stand"),
        ({"gen": {"joint": [5, 8]}}, {"und": 2, "gen": 3, "act": 2}, "steps 5 to 7, where none of its layers runs .they run in 0 to 2."),
    ],
)
def test_layers_that_cannot_meet_are_refused(couple: dict, depths: dict[str, int], message: str, make_spec) -> None:
    with pytest.raises(UserError, match=message):
        Graph(make_spec(couple=couple)).steps(depths)


def test_a_system_costs_few_lines_and_the_readme_counts_them() -> None:
    text = (CONFIGS.parent / "vla" / "README.md").read_text()
    rows = {cells[1].strip(" `"): cells for line in text.splitlines() if line.startswith("| `") and len(cells := line.split("|")) == 7}
    for path in sorted((CONFIGS / "model").glob("*.yaml")):
        lines = len(path.read_text().splitlines())
        assert lines <= 60, path
        if not path.stem.endswith("_tiny"):
            assert int(rows[path.stem][4]) == lines, path

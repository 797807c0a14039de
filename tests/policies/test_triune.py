"""From a dataset to a policy's answer: the recipe, the checkpoint, the contract of plans."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from triune import UserError
from triune.config import merge
from triune.data import Observation, Statistics
from triune.policies import Request, TriunePolicy, load_policy, read_checkpoint, verify
from triune.policies.train.policy import PolicyTask, Recipe
from triune.policies.train.recipe import run
from triune.policies.train.team import Part
from triune.vla.answers import Answers

from ..tape import taped

SIDE = 32


@pytest.fixture
def policy(checkpoint: Path) -> TriunePolicy:
    return load_policy(checkpoint)


def observation(seed: int = 0, words: str = "lift the red cube") -> Observation:
    rng = np.random.default_rng(seed)
    return Observation({c: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for c in ("agentview", "wrist")}, rng.normal(size=5), words, 0.5)


def blank(cameras: tuple[str, ...] = ("agentview", "wrist"), side: int = SIDE, state: int = 5) -> Observation:
    return Observation({c: np.zeros((side, side, 3), np.uint8) for c in cameras}, np.zeros(state), "go")


def answer(policy: TriunePolicy, sessions: list[int]) -> list[np.ndarray]:
    for s in sessions:
        policy.reset(str(s), s)
    return [plan.chunk.actions for plan in policy.plan([Request(str(s), observation(s)) for s in sessions])]


def test_a_checkpoint_holds_what_was_trained_and_no_more(checkpoint: Path) -> None:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert not any("experts.und" in name or "autoencoder" in name for name in file.keys())  # noqa: SIM118
    assert set(read_checkpoint(checkpoint).info.weights) == {"und", "future"}
    assert not list(checkpoint.rglob("*.pt")) and not list(checkpoint.rglob("*.pkl"))


def test_golden_observations_give_their_actions(checkpoint: Path, policy: TriunePolicy) -> None:
    rows = verify(read_checkpoint(checkpoint), policy)
    assert len(rows) >= 4 and all(row.passed for row in rows)


def test_plans_fit_the_contract(policy: TriunePolicy) -> None:
    policy.reset("s", 0)
    plan = policy.act(Request("s", observation()))
    assert plan.chunk.actions.shape == (6, 3) and plan.chunk.rate == 20.0 and plan.chunk.time == 0.5
    assert plan.foresight is not None
    expected = plan.foresight()
    assert expected["wrist"].shape == (SIDE, SIDE, 3) and expected["wrist"].dtype == np.uint8
    assert (policy.contract.chunk, policy.contract.executed, policy.contract.action.normalisation) == (6, 3, "quantile")


def test_answers_do_not_depend_on_who_else_asks(policy: TriunePolicy) -> None:
    together = answer(policy, [1, 2, 3, 4, 5])
    for i, seed in enumerate([1, 2, 3, 4, 5]):
        np.testing.assert_array_equal(answer(policy, [seed])[0], together[i])


def test_answers_do_not_depend_on_the_prompt_stream(checkpoint: Path, policy: TriunePolicy) -> None:
    """A stream with room for more words pads this prompt further, or in two lengths, and neither moves the actions."""
    found = read_checkpoint(checkpoint)
    statistics = {key: Statistics.model_validate(value) for key, value in found.statistics.items()}
    longer = TriunePolicy(policy.model.shortened(60), policy.contract, statistics)
    plain, padded = policy._length(observation()), longer._length(observation())
    assert plain == 24 < padded < 60
    for ours, theirs in zip(answer(longer, [1, 2, 3]), answer(policy, [1, 2, 3]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_recorded_policy_answers_the_same(policy: TriunePolicy) -> None:
    """What a GPU does with a CUDA graph, here with a tape."""
    plain = answer(policy, [1, 2, 3, 4, 5])
    policy.answers = Answers(policy.model, taped)
    for ours, theirs in zip(answer(policy, [1, 2, 3, 4, 5]), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(answer(policy, [5])[0], plain[4])
    assert len(policy.answers.graphs) == 1


def test_noise_is_keyed_by_seed_and_step(policy: TriunePolicy) -> None:
    policy.reset("s", 7)
    first, second = (policy.act(Request("s", observation())).chunk.actions for _ in range(2))
    policy.reset("s", 7)
    again = policy.act(Request("s", observation())).chunk.actions
    policy.reset("s", 8)
    other = policy.act(Request("s", observation())).chunk.actions
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


def test_words_matter_and_an_edge_can_be_cut(checkpoint: Path, policy: TriunePolicy) -> None:
    policy.reset("a", 0)
    policy.reset("b", 0)
    red, plain = policy.plan([Request("a", observation()), Request("b", observation(words="lift the cube"))])
    assert not np.array_equal(red.chunk.actions, plain.chunk.actions)
    assert not np.array_equal(answer(load_policy(checkpoint, cuts=(("action", "obs"),)), [1])[0], answer(policy, [1])[0])
    with pytest.raises(UserError, match="has no edge obs <- action to cut"):
        load_policy(checkpoint, cuts=(("obs", "action"),))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (blank(cameras=("agentview",)), "needs camera 'wrist'"),
        (blank(side=48), "is 48x48, the policy was trained on 32x32"),
        (blank(state=4), "has 4 numbers, the policy needs 5"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(wrong: Observation, message: str, policy: TriunePolicy) -> None:
    policy.reset("s", 0)
    with pytest.raises(UserError, match=message):
        policy.act(Request("s", wrong))


def test_a_session_must_begin(policy: TriunePolicy) -> None:
    with pytest.raises(UserError, match="call reset"):
        policy.act(Request("never", observation()))


def test_training_on_kept_prefixes_equals_the_joint_forward(recipe_tree: dict, tmp_path: Path) -> None:
    """Kept keys are bf16, so the losses agree to its precision."""
    tree = {**recipe_tree, "augment": None}
    kept = PolicyTask(Recipe.model_validate(tree), tmp_path)
    joint = PolicyTask(Recipe.model_validate({**tree, "cache": {"limit_gb": 1e-9}}), tmp_path)
    assert kept.prefix is not None and joint.prefix is None
    losses = []
    for task in (kept, joint):
        torch.manual_seed(0)
        task.module.eval()
        losses.append(task.losses(task.batch(Part(0))))
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("cache", [8.0, 1e-9])
def test_packed_training_has_the_same_losses(cache: float, recipe_tree: dict, tmp_path: Path) -> None:
    losses = []
    for pack in (False, True):
        task = PolicyTask(Recipe.model_validate({**recipe_tree, "augment": None, "pack": pack, "cache": {"limit_gb": cache}}), tmp_path)
        assert (task.prefix is not None) == (cache == 8.0)
        torch.manual_seed(0)
        task.module.eval()
        losses.append(task.losses(task.batch(Part(0))))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)


def test_a_frozen_expert_is_bit_identical_after_training(recipe_tree: dict, tmp_path: Path) -> None:
    from triune.policies.train.loop import train

    task = PolicyTask(Recipe.model_validate(recipe_tree), tmp_path)
    before = {n: p.clone() for n, p in task.module.mot.experts["und"].named_parameters()}
    train(task, task.recipe.train, tmp_path / "out")
    assert all(torch.equal(before[n], p) for n, p in task.module.mot.experts["und"].named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": {"cameras": ["agentview", "front"]}}, "has no camera front"),
        ({"overrides": {"state_dim": 4}}, "'observation.state' has 5 dimensions, probe takes 4"),
        ({"overrides": {"heads": {"action": {"action_dim": 2}}}}, "'action' has 3 dimensions, probe takes 2"),
        ({"action_key": "action.expert"}, "has no column 'action.expert'"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(change: dict, message: str, recipe_tree: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        PolicyTask(Recipe.model_validate({**recipe_tree, **change}), tmp_path)


def test_the_past_is_seen(recipe_tree: dict, tmp_path: Path) -> None:
    """Two frames of each camera, three control steps apart: in training the dataset's, in use those of the call before."""
    tree = merge(recipe_tree, {"overrides": {"history": {"frames": 2, "every": 3}, "streams": {"obs": {"length": 40}}}, "augment": None})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    task = PolicyTask(Recipe.model_validate(tree), tmp_path / "out")
    frames = task.frames
    for view, images in zip(frames.at(np.array([0, 4, 11])), frames.images.values(), strict=True):  # of episodes of nine frames
        np.testing.assert_array_equal(view, images[[[0, 0], [1, 4], [9, 11]]])

    policy = load_policy(run(str(tmp_path / "recipe.yaml"), [], tmp_path / "out", resume=False))
    seen: list[torch.Tensor] = []
    inputs = policy.inputs

    def watched(*given):
        seen.append(inputs(*given).images[0])
        return inputs(*given)

    policy.inputs = watched  # type: ignore[method-assign]
    policy.reset("s", 0)
    plans = [policy.act(Request("s", observation(i))).chunk.actions for i in range(3)]
    frames = [torch.from_numpy(np.stack(list(observation(i).images.values()))).permute(0, 3, 1, 2) for i in range(3)]
    for now, before, images in zip((0, 1, 2), (0, 0, 1), seen, strict=True):
        assert torch.equal(images, torch.stack([frames[before], frames[now]], dim=1).flatten(0, 1))
    policy.reset("s", 0)  # forgets
    np.testing.assert_array_equal(policy.act(Request("s", observation(0))).chunk.actions, plans[0])
    other = merge(tree, {"executed": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(UserError, match="looks back 3 steps at a time, and is asked every 2"):
        run(str(tmp_path / "recipe.yaml"), [], tmp_path / "other", resume=False)


def test_a_slow_vlm_is_read_as_it_was(recipe_tree: dict, tmp_path: Path) -> None:
    """It looks at every second call of each session, whoever else asks; the rest runs at every call."""
    phases = {"see": {"kind": "prefill", "streams": ["obs"], "period": 2}, "feel": {"kind": "prefill", "streams": ["state"]}}
    phases |= {"imagine": {"kind": "regress", "streams": ["future"]}, "act": {"kind": "denoise", "streams": ["action"], "steps": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merge(recipe_tree, {"overrides": {"schedule": phases}}), sort_keys=False))
    policy = load_policy(run(str(tmp_path / "recipe.yaml"), [], tmp_path / "out", resume=False))
    first, second = observation(0), observation(1)
    mixed = replace(second, images=first.images)  # what the second call has seen and felt

    def answers(*observations: Observation) -> list[np.ndarray]:
        policy.reset("a", 0)
        policy.reset("b", 1)
        plans = [policy.plan([Request("b", first), Request("a", o)])[1] for o in observations]
        return [plan.chunk.actions for plan in plans]

    told, seen = answers(first, second, second), answers(first, mixed, second)
    np.testing.assert_array_equal(told[1], seen[1])
    np.testing.assert_array_equal(told[2], seen[2])
    assert not np.array_equal(answers(first, first)[1], told[1])  # it feels the present
    fast = load_policy(tmp_path / "out")
    fast.batch = 4  # without periods
    for name in ("a", "b"):
        fast.reset(name, "ab".index(name))
    np.testing.assert_allclose(fast.act(Request("a", first)).chunk.actions, told[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "what"), [("fastwam_tiny", r"streams.text \(features\), heads.video \(latents\)"), ("mot_tiny", r"streams.words \(words\)")]
)
def test_a_spec_of_encoded_inputs_is_no_recipe_yet(name: str, what: str, recipe_tree: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} takes {what}"):
        PolicyTask(Recipe.model_validate(merge(recipe_tree, {"spec": name})), tmp_path)


def test_another_graph_than_was_trained_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from triune.policies.checkpoint import seal

    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    tree = yaml.safe_load((folder / "spec.yaml").read_text())
    assert set(read_checkpoint(folder).info.graph.matrix["action"]) == set(tree["streams"])
    tree["edges"]["action"]["obs"] = {"relation": "row_causal"}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    seal(folder)
    with pytest.raises(UserError, match="says another attention graph than was trained .action <- obs."):
        load_policy(folder)


def test_a_call_that_fails_counts_for_no_session(policy: TriunePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two parts the second one fails; who is then asked alone gets the answer that it would have got."""
    expected = answer(policy, [1])[0]
    for session in ("1", "2"):
        policy.reset(session, int(session))
    draw = policy._noise

    def fails(request: Request, sample: int = 0) -> dict[str, np.ndarray]:
        if sample:
            raise RuntimeError("out of memory")
        return draw(request)

    with monkeypatch.context() as broken:
        broken.setattr(policy, "_noise", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            policy.plan([Request("1", observation(1)), Request("2", observation(2), samples=2)])
    np.testing.assert_array_equal(policy.act(Request("1", observation(1))).chunk.actions, expected)

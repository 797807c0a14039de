"""Fine-tuning: from another policy's checkpoint, with adapters, frozen parts, other cameras and sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from triune import UserError
from triune.config import merge
from triune.data import Observation
from triune.data.transforms import Angles
from triune.policies import Request, load_policy, read_checkpoint, verify
from triune.policies.train.fit import misfits
from triune.policies.train.policy import PolicyTask, Recipe
from triune.policies.train.recipe import run
from triune.policies.train.team import Part

LORA = {"lora": {"rank": 4}}


@pytest.fixture
def tuned(recipe_tree: dict, checkpoint: Path) -> dict:
    """A recipe that goes on from a checkpoint."""
    return {**{k: v for k, v in recipe_tree.items() if k not in ("spec", "executed")}, "init": str(checkpoint)}


def train(tree: dict, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return run(str(out / "recipe.yaml"), [], out / "run", resume=False)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_begin_as_nothing_learn_and_merge(dora: bool, tuned: dict, checkpoint: Path, tmp_path: Path) -> None:
    experts = {"und": {"lora": {"rank": 4, "dora": dora}}, "act": {"lora": {"rank": 4, "dora": dora}}}
    tree = {**tuned, "experts": experts, "statistics": "checkpoint", "augment": None}
    task = PolicyTask(Recipe.model_validate(tree), tmp_path)
    plain = PolicyTask(Recipe.model_validate({**tree, "experts": {}}), tmp_path)
    for one in (task, plain):
        one.module.eval()
    with torch.no_grad():
        mine, before = (one.losses(one.batch(Part(0))) for one in (task, plain))
    torch.testing.assert_close(mine["action"], before["action"], rtol=2e-2, atol=1e-3)  # the other's frozen prefixes are kept in bf16
    trained = {name for name, p in task.module.named_parameters() if p.requires_grad and name.startswith("mot.experts.")}
    assert {name.split(".")[2] for name in trained if "lora" in name} == {"und", "act"}
    assert not any(name.endswith("base_layer.weight") for name in trained)

    folder = train(tree, tmp_path)
    held = load_file(folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size < (checkpoint / "model.safetensors").stat().st_size
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in held.items())
    policy = load_policy(folder)
    assert not any("lora" in name for name, _ in policy.model.named_parameters())
    assert all(row.passed for row in verify(read_checkpoint(folder), policy))


def test_what_did_not_learn_is_not_stored_twice(tuned: dict, checkpoint: Path, tmp_path: Path) -> None:
    """Only the action expert learns: the rest comes from the checkpoint before, which must be there, and be the same."""
    tree = {**tuned, "experts": {"act": {"lr": 0.5}, "gen": {"frozen": True}}}
    assert Recipe.model_validate(tree).train.lr_scale == {"mot.experts.act.": 0.5}
    folder = train(tree, tmp_path)
    held = load_file(folder / "model.safetensors")
    assert held and not any(name.startswith("mot.experts.gen.") for name in held)
    info = read_checkpoint(folder).info
    assert info.base is not None and Path(info.base.path) == checkpoint.resolve()
    before, after = load_policy(checkpoint).model, load_policy(folder).model
    named = dict(after.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in before.named_parameters() if n.startswith("mot.experts.gen."))
    assert any(not torch.equal(p, named[n]) for n, p in before.named_parameters() if n.startswith("mot.experts.act."))


def test_a_base_that_is_gone_or_another_is_told(tuned: dict, recipe_tree: dict, tmp_path: Path) -> None:
    import shutil

    base = train(recipe_tree, tmp_path / "base").resolve()
    folder = train({**tuned, "init": str(base), "experts": {"act": LORA}}, tmp_path / "tuned")
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="was fine-tuned from the checkpoint .* which is not there"):
        load_policy(folder)
    shutil.copytree(moved, base)
    load_policy(folder)
    (base / "manifest.json").write_text((base / "manifest.json").read_text() + " ")
    with pytest.raises(UserError, match="from another checkpoint than the one in"):
        load_policy(folder)


def test_fine_tuning_twice(tuned: dict, tmp_path: Path) -> None:
    """Each stands on the one before; all in all the weights are those of the last training."""
    first = train({**tuned, "experts": {"act": LORA}}, tmp_path / "first")
    tree = {**tuned, "init": str(first), "experts": {"act": LORA, "und": LORA}}
    task = PolicyTask(Recipe.model_validate(tree), tmp_path)
    start = {n.replace(".base_layer", ""): p for n, p in task.module.named_parameters() if "lora" not in n}
    assert all(torch.equal(p, start[n]) for n, p in load_policy(first).model.named_parameters())
    second = train(tree, tmp_path / "second")
    assert len(read_checkpoint(second).lineage()) == 3
    assert all(row.passed for row in verify(read_checkpoint(second), load_policy(second)))


def test_merged_it_stands_alone(tuned: dict, tmp_path: Path) -> None:
    from triune.policies.merge import merge_checkpoint

    folder = train({**tuned, "experts": {"act": LORA, "und": LORA}}, tmp_path)
    merge_checkpoint(folder, tmp_path / "whole")
    whole = read_checkpoint(tmp_path / "whole")
    assert whole.info.base is None and not whole.info.experts
    one, other = load_policy(folder), load_policy(tmp_path / "whole")
    theirs = dict(other.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in one.model.named_parameters())
    assert all(row.passed for row in verify(whole, other))


def test_other_cameras_and_a_wider_network(tuned: dict, recipe_tree: dict, tmp_path: Path) -> None:
    """Six state and five action dimensions, of which the robot has five and three; its cameras stand in for the views in their order."""
    wide = merge(recipe_tree, {"overrides": {"state_dim": 6, "heads": {"action": {"action_dim": 5}}}})
    base = train(wide, tmp_path / "base")
    policy = load_policy(train({**tuned, "init": str(base), "cameras": ["wrist", "agentview"]}, tmp_path / "tuned"))
    assert policy.contract.camera_names == policy.model.spec.cameras == ("wrist", "agentview")
    assert (policy.contract.executed, policy.contract.action.size, policy.model.spec.state_dim) == (3, 3, 6)
    golden = read_checkpoint(base).golden
    assert golden is not None and np.array(golden.cases[0].actions).shape == (6, 3)


def test_relative_actions_leave_the_policy_absolute(recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triune.data import Camera, Contract, Episode, Vector
    from triune.data.writer import DatasetWriter
    from triune.vla.inputs import Outputs

    rng = np.random.default_rng(0)
    cameras = tuple(Camera(name=n, height=32, width=32) for n in ("agentview", "wrist"))
    contract = Contract(cameras=cameras, state=Vector(names=tuple("yxwvu")), action=Vector(names=tuple("xyz")), rate=20.0)
    with DatasetWriter(tmp_path / "data", contract, 20) as writer:
        for _ in range(2):
            images = {c.name: rng.integers(0, 256, (9, 32, 32, 3), np.uint8) for c in cameras}
            state, action = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)
            writer.add(Episode(images, state, action, "lift the cube"))
    tree = {**recipe_tree, "data": str(tmp_path / "data"), "relative": ["x", "y"]}
    with pytest.raises(UserError, match="there is no state called 'z'"):
        PolicyTask(Recipe.model_validate({**tree, "relative": ["z"]}), tmp_path)
    task = PolicyTask(Recipe.model_validate(tree), tmp_path)
    batch, drawn = task.batch(Part(0)), task.sampler.batch(0)
    learned = task.action.unnormalise(batch["actions"].numpy())
    np.testing.assert_allclose(learned[..., :2], drawn["action"][..., :2] - drawn["state"][:, None, [1, 0]], atol=1e-5)
    np.testing.assert_allclose(learned[..., 2], drawn["action"][..., 2], atol=1e-5)

    policy = load_policy(train(tree, tmp_path))
    monkeypatch.setattr(policy, "answers", lambda *given: Outputs(torch.zeros(4, 6, 3)))
    monkeypatch.setattr(policy, "_length", lambda observation: 0)
    policy.reset("s", 0)
    seen = Observation({c.name: np.zeros((32, 32, 3), np.uint8) for c in cameras}, np.arange(5, dtype=np.float32), "lift the cube")
    still = policy.action.unnormalise(np.zeros((6, 3), np.float32)) + np.array([1, 0, 0])
    np.testing.assert_allclose(policy.act(Request("s", seen)).chunk.actions, still, atol=1e-6)


def test_angles_are_learned_as_they_are_seen(recipe_tree: dict, tmp_path: Path) -> None:
    task = PolicyTask(Recipe.model_validate({**recipe_tree, "overrides": {"state_dim": 9}}), tmp_path)
    plain, size = task.batch(Part(0))["state"], task.contract.state.size
    task.settings = task.settings.model_copy(update={"angles": Angles(groups=((1, 2),))})
    state = task.batch(Part(0))["state"]
    torch.testing.assert_close(state[:, 1], plain[:, 1].sin())
    torch.testing.assert_close(state[:, 2], plain[:, 1].cos())
    torch.testing.assert_close(state[:, 3 : size + 1], plain[:, 2:size])
    beyond = task.settings.model_copy(update={"angles": Angles(groups=((0, size + 1),))})
    found = [row.sentence for row in misfits(task.demonstrations, task.spec, "action", beyond)]
    assert any(f"takes those up to {size + 1} as angles" in sentence for sentence in found)


def test_parts_of_a_batch_add_up(recipe_tree: dict, tmp_path: Path) -> None:
    """The gradient of a batch is the mean of those of its parts, though these count unequal numbers of steps."""
    tree = {**recipe_tree, "augment": None, "cache": {"limit_gb": 1e-9}}
    task = PolicyTask(Recipe.model_validate(tree), tmp_path)
    task.module.eval()

    def gradient(parts: list[Part]) -> tuple[torch.Tensor, float]:
        task.module.zero_grad()
        losses = [task.losses(task.batch(part))["loss"] / len(parts) for part in parts]
        for loss in losses:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None]), sum(loss.item() for loss in losses)

    (whole, loss), (sliced, total) = gradient([Part(0)]), gradient([Part(0, i, 4) for i in range(4)])
    assert abs(loss - total) < 1e-5
    torch.testing.assert_close(whole, sliced, rtol=1e-3, atol=1e-5)


def test_weights_that_do_not_learn_may_lie_in_bf16(tuned: dict, tmp_path: Path) -> None:
    tree = {**tuned, "experts": {"act": LORA}, "augment": None, "train": {**tuned["train"], "precision": "bf16"}}
    found = []
    for frozen in ("fp32", "bf16"):
        task = PolicyTask(Recipe.model_validate({**tree, "frozen": frozen}), tmp_path)
        kinds = {p.dtype for n, p in task.module.named_parameters() if n.startswith("mot.experts.act.") and not p.requires_grad}
        assert kinds == {torch.float32 if frozen == "fp32" else torch.bfloat16}
        assert {p.dtype for p in task.module.parameters() if p.requires_grad} == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = task.losses(task.batch(Part(0)))
        losses["loss"].backward()
        found.append(losses["action"].item())
    assert found[0] == pytest.approx(found[1], rel=2e-2)


def test_layers_computed_again_give_the_same_gradient(recipe_tree: dict, tmp_path: Path) -> None:
    tree = {**recipe_tree, "augment": None, "cache": {"limit_gb": 1e-9}}
    found = []
    for again in (False, True):
        task = PolicyTask(Recipe.model_validate({**tree, "checkpointing": again}), tmp_path)
        task.losses(task.batch(Part(0)))["loss"].backward()
        found.append({n: p.grad for n, p in task.module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_frames_that_do_not_fit_are_streamed(recipe_tree: dict, tmp_path: Path) -> None:
    """The same batches, whether all frames lie in memory or are loaded ahead, also when begun in the middle."""
    tree = {
        **recipe_tree,
        "cache": {"limit_gb": 1e-9},
        "train": {**recipe_tree["train"], "batch_size": 2},
        "overrides": {"history": {"frames": 2, "every": 3}, "streams": {"obs": {"length": 40}}},
    }
    memory = PolicyTask(Recipe.model_validate(tree), tmp_path)
    streamed = PolicyTask(Recipe.model_validate({**tree, "cache": {"limit_gb": 1e-9, "images_gb": 2e-4}}), tmp_path)
    assert type(memory.frames).__name__ == "InMemory" and type(streamed.frames).__name__ == "Streamed"
    for part in (Part(0), Part(1), Part(7), Part(8, 0, 2), Part(8, 1, 2)):
        one, other = memory.batch(part), streamed.batch(part)
        assert all(torch.equal(a, b) for a, b in zip(one["views"], other["views"], strict=True))
        assert all(torch.equal(one[key], other[key]) for key in ("state", "actions", "mask", "ids", "present"))
        torch.manual_seed(0)
        with torch.no_grad():
            losses = [task.losses(batch) for task, batch in ((memory, one), (streamed, other))]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)  # kept latents are fp16
    streamed.frames.close()


def test_several_datasets_and_held_out_episodes(recipe_tree: dict, tmp_path: Path) -> None:
    data = [{"path": recipe_tree["data"], "weight": 3.0}, {"path": recipe_tree["data"]}]
    tree = {**recipe_tree, "data": data, "hold_out": 0.4, "validation_batches": 2}
    folder = train(tree, tmp_path)
    row = yaml.safe_load((tmp_path / "run/validation.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4 and len(row["open_loop_error_per_step"]) == 6 and set(row["open_loop_error_per_action"]) == set("xyz")
    assert row["held_out_loss"] > 0 and row["open_loop_error"] > 0
    assert all(r.passed for r in verify(read_checkpoint(folder), load_policy(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"action": LORA}}, "experts.action: probe has no such expert; it has act, gen, und"),
        ({"experts": {"act": {"lora": {"targets": ["q_proj"]}}}}, "no linear layer is called .* choose among"),
        ({"experts": {"act": {"freeze": ["mlp"]}}}, "no parameter begins with 'mlp'"),
        ({"spec": "triune_tiny"}, "give either spec"),
        ({"init": None, "spec": "SPEC", "executed": 3, "experts": {"act": LORA}}, "experts.act would stay random"),
        ({"init": "nowhere"}, "there is no checkpoint nowhere"),
    ],
)
def test_wrong_tuning_is_refused(change: dict, message: str, tuned: dict, recipe_tree: dict, tmp_path: Path) -> None:
    change = {**change, "spec": recipe_tree["spec"]} if change.get("spec") == "SPEC" else change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**tuned, **change}))
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "recipe.yaml"), [], tmp_path / "run", resume=False)

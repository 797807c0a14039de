"""What ``--dry-run`` says beside what a run takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from triune.cli.main import app
from triune.data import Camera, Contract, Episode, Vector
from triune.data.writer import DatasetWriter
from triune.policies.train import dry_run as dry
from triune.policies.train import policy
from triune.policies.train.imagined import Held
from triune.policies.train.loop import AHEAD, Run, train
from triune.policies.train.optim import Ema, make_optimizer, trainable
from triune.policies.train.policy import PolicyTask, Recipe
from triune.policies.train.team import Part

LORA = {"und": {"lora": {"rank": 4}}, "act": {"lora": {"rank": 4}}}


@pytest.fixture
def tuned(recipe_tree: dict, checkpoint: Path) -> dict:
    return {k: v for k, v in recipe_tree.items() if k not in ("spec", "executed")} | {"init": str(checkpoint)}


def saved_bytes(task: PolicyTask) -> int:
    """Bytes that a real forward keeps for its backward, each storage once, without weights; counted by autograd's own hooks."""
    weights = {p.untyped_storage().data_ptr() for p in (*task.module.parameters(), *task.module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = task.batch(Part(0))
    given = {t.untyped_storage().data_ptr() for t in batch.values() if isinstance(t, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        task.losses(batch)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in given)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["frozen VLM", "frozen VLM in each step", "all", "adapters"])
def test_memory_without_values_is_that_of_a_real_part(
    kind: str, checkpointing: bool, recipe_tree: dict, tuned: dict, tmp_path: Path
) -> None:
    tree = {
        "frozen VLM": recipe_tree,
        "frozen VLM in each step": {**recipe_tree, "cache": {"limit_gb": 1e-9}},
        "all": {**recipe_tree, "overrides": {"experts": {"und": {"frozen": False}}}},
        "adapters": {**tuned, "experts": LORA},
    }[kind]
    recipe = Recipe.model_validate({**tree, "checkpointing": checkpointing, "train": {**tree["train"], "batch_size": 16}})
    sketched, held, flops = dry.rehearse(policy, recipe, torch.float32)
    task = PolicyTask(recipe, tmp_path)
    real, counted = Held(), torch.utils.flop_counter.FlopCounterMode(display=False)
    dry._forward_and_backward(task, task.batch(Part(0)), torch.float32, counted, real)
    assert dry.parameters(sketched.module) == dry.parameters(task.module)
    assert held.peak == pytest.approx(real.peak, rel=0.15)
    assert held.together == pytest.approx(real.together, rel=0.15)
    assert held.grads == real.grads > 0
    assert flops == counted.get_total_flops()
    if not checkpointing:
        assert held.peak >= 0.85 * saved_bytes(task)


def test_weights_and_optimizer_are_those_of_a_run(recipe_tree: dict, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_tree)
    sketched, held, _ = dry.rehearse(policy, recipe, torch.float32)
    told = dry.memory(sketched.module, recipe.train, held, 1, torch.float32)
    task = PolicyTask(recipe, tmp_path)
    learning = trainable(task.module)
    optimizer, average = make_optimizer(learning, recipe.train), Ema(learning, recipe.train.ema)
    task.losses(task.batch(Part(0)))["loss"].backward()
    optimizer.step()
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    unused = sum(p.nbytes for p in learning.values() if p.grad is None)
    assert told.trained == sum(p.nbytes for p in learning.values())
    assert told.frozen == sum(p.nbytes for p in task.module.parameters() if not p.requires_grad)
    assert told.moments == moments + 2 * unused
    assert told.average == sum(t.nbytes for t in average.average.values())
    assert told.gradients == sum(p.grad.nbytes for p in learning.values() if p.grad is not None) + unused


def test_time_comes_from_steps_or_from_a_peak(recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "MOST", 5)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree))
    before = sorted(tmp_path.rglob("*"))
    told = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--json", "--out", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["step_seconds"] == pytest.approx(np.mean(found["measured"])) and len(found["measured"]) == 5
    assert 0 < found["waiting_seconds"] < found["step_seconds"] and found["time_from"].startswith("measured: the mean of 5 steps")
    assert sorted(tmp_path.rglob("*")) == before
    report = dry.dry_run(str(path), ["train.accumulate=2"], processes=2, peak=1e9, utilisation=0.5)
    assert report.share == 1 and report.step_seconds == pytest.approx(report.flops / 2 / 0.5e9)
    assert report.epochs == pytest.approx(4 * 4 / (report.samples or 0)) and report.memory.exchange == report.memory.trained
    assert CliRunner().invoke(app, ["train", str(path), "--dry-run", "--flops", "1e12"]).exit_code == 0


def test_what_is_timed_are_steps_of_a_run(recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function gives them, moving average and all; and until the last one of them batches are made ahead, as until shortly
    before the end of a run."""
    monkeypatch.setattr(dry, "MOST", 4)
    recipe, taken, left = Recipe.model_validate(recipe_tree), list[Run](), list[int]()
    once = Run.once

    def noted(self: Run, batches: Iterator[Any], lr: float) -> Any:
        taken.append(self)
        left.append(self.config.steps - self.state.step - 1)
        return once(self, batches, lr)

    monkeypatch.setattr(Run, "once", noted)
    timed = dry.measure(policy, recipe)
    assert len(timed.steps) == 4 and len(taken) == dry.WARM + 4 and min(left) >= AHEAD
    state = taken[-1].state
    assert state.step == dry.WARM + 4 and state.ema is not None
    assert any(not torch.equal(state.ema.average[name], state.parameters[name]) for name in state.parameters)
    taken.clear()
    train(PolicyTask(recipe, tmp_path / "run"), recipe.train, tmp_path / "run")
    assert len(taken) == recipe.train.steps


@pytest.mark.slow
def test_a_published_size_needs_neither_weights_nor_memory(tmp_path: Path) -> None:
    cameras = tuple(Camera(name=n, height=224, width=224) for n in ("base", "left_wrist", "right_wrist"))
    contract = Contract(cameras=cameras, state=Vector(names=tuple("abc")), action=Vector(names=tuple("xyz")), rate=20.0, render="fast")
    with DatasetWriter(tmp_path / "data", contract, 20) as writer:
        vector = np.zeros((60, 3), np.float32)
        writer.add(Episode({c.name: np.zeros((60, 224, 224, 3), np.uint8) for c in cameras}, vector, vector, "lift", {"seed": 0}))
    tree = {"kind": "policy", "spec": "pi0", "data": str(tmp_path / "data"), "executed": 10}
    tree |= {"train": {"steps": 100, "batch_size": 32, "device": "cpu", "precision": "bf16", "parallel": "fsdp"}}
    (tmp_path / "pi0.yaml").write_text(yaml.safe_dump(tree))
    report = dry.dry_run(str(tmp_path / "pi0.yaml"), [], processes=4, peak=989e12)
    assert report.parameters["total"] == (3_238_179_600, 3_238_179_600)
    assert report.other is not None and report.other.activations < 0.6 * report.memory.activations
    assert report.memory.trained == pytest.approx(3_238_179_600, rel=1e-3)  # four bytes each, in four processes

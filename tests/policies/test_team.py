"""Several processes train as one does: the same losses on the same global batches, the same checkpoint, resumed by any number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from triune.policies import load_policy, read_checkpoint, verify


def launch(processes: int, recipe: Path, out: Path, *more: str) -> list[dict]:
    """Run ``vla train`` in some processes; returns the rows of its log."""
    command = ["-m", "triune", "train", str(recipe), "--out", str(out), *more]
    if processes > 1:
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", *command]
    run = subprocess.run(
        [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(recipe_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of four samples; also the VLM learns, by adapters, and a part is held out."""
    train = {**recipe_tree["train"], "steps": 5, "log_every": 1, "save_every": 3, "lr": 1e-3, "weight_decay": 0.1, "clip": 0.5}
    tree = {**recipe_tree, "train": train, "experts": {"und": {"lora": {"rank": 2}}}, "hold_out": 0.3, "validation_batches": 1}
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("alone") / "run"
    return launch(1, recipe, out), out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(parallel: str, recipe: Path, alone: tuple[list[dict], Path], tmp_path: Path) -> None:
    rows = launch(2, recipe, tmp_path / "run", f"train.parallel={parallel}")
    for one, both in zip(alone[0], rows, strict=True):
        assert abs(one["loss"] - both["loss"]) < 1e-5 and abs(one["grad_norm"] - both["grad_norm"]) < 1e-3 * one["grad_norm"]
    mine, theirs = (load_file(out / "checkpoints/last/model.safetensors") for out in (tmp_path / "run", alone[1]))
    assert mine.keys() == theirs.keys() and all((mine[n] - theirs[n]).abs().max() < 1e-3 for n in mine)
    looks = [json.loads((out / "validation.jsonl").read_text()) for out in (tmp_path / "run", alone[1])]
    assert looks[0]["held_out_loss"] == pytest.approx(looks[1]["held_out_loss"], abs=1e-4)
    policy = load_policy(tmp_path / "run")
    assert all(row.passed for row in verify(read_checkpoint(tmp_path / "run"), policy))

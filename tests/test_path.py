"""The whole path of a user who comes from lerobot: their policy, their dataset, no Python of their own.

README.md tells the same for released weights and full size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triune.cli.main import main
from triune.data import Observation, open_dataset
from triune.envs import build_world
from triune.policies import Request, load_policy, read_checkpoint, verify
from triune.policies.train.logs import read_log
from triune.vla.weights.released import HEAD_DIM, VISION_HEADS

from .lerobot_peers import SMOL_SIDE, smol_fill, smol_folder
from .policies.tokens import byte_tokenizer
from .strangers import ACTION, CAMERAS, STATE, TASK, WORLD, record_as_stranger

RECIPE = """
kind: policy
init: base
data: data
robot: robot.yaml
cameras: [agentview, sideview, wrist]
experts: {und: {lora: {rank: 4}}, act: {lora: {rank: 8}}}
hold_out: 0.25
validation_batches: 1
train: {steps: 150, batch_size: 8, lr: 1.0e-2, warmup: 5, precision: fp32, device: cpu, log_every: 25, save_every: 150}
"""
SUITE = """
title: The world that the data came from
tasks: {robosuite/lift: {}}
"""
SMALL = ((HEAD_DIM, ("smolvlm", 32), 8), (VISION_HEADS, ("smolvlm", 32), 4))
"""Head counts of the small network, which no published one has."""


def save_policy(folder: Path, dataset: Path) -> Any:
    """lerobot saves a SmolVLA of random weights for the dataset; returns it with its processors."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    smol_folder(folder / "vlm")
    byte_tokenizer(folder / "vlm")
    views = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 120, 160)) for name in CAMERAS}
    config = SmolVLAConfig(
        vlm_model_name=str(folder / "vlm"),
        num_vlm_layers=4,
        prefix_length=0,
        device="cpu",
        chunk_size=8,
        n_action_steps=4,
        num_steps=4,
        resize_imgs_with_padding=(SMOL_SIDE, SMOL_SIDE),
        load_vlm_weights=False,
        input_features=views | {"observation.state": PolicyFeature(FeatureType.STATE, (len(STATE),))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(ACTION),))},
    )
    policy = SmolVLAPolicy(config)
    smol_fill(policy.model)
    policy.eval()
    stats = json.loads((dataset / "meta/stats.json").read_text())
    kept = {key: {name: np.float32(row) for name, row in stats[key].items()} for key in ("observation.state", "action")}
    before, after = make_pre_post_processors(config, dataset_stats=kept)
    for part in (policy, before, after):
        part.save_pretrained(folder / "policy")
    return policy, before, after


def test_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for table, key, value in SMALL:
        monkeypatch.setitem(table, key, value)
    record_as_stranger(tmp_path / "data", episodes=4)
    policy, before, after = save_policy(tmp_path / "lerobot", tmp_path / "data")

    def vla(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vla", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert not end.value.code, out + err
        return out

    vla("model", "convert", "lerobot/policy", "base")
    same_actions(policy, before, after, tmp_path / "data")

    vla("data", "inspect", "data", "--write", "robot.yaml")
    rename(Path("robot.yaml"))
    Path("mine.yaml").write_text(RECIPE)
    Path("suite.yaml").write_text(SUITE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "triune"]
    command, environment = [sys.executable, *launch, "train", "mine.yaml"], {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = read_log(Path("runs/mine/log.jsonl"))
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]

    results = json.loads(vla("eval", "suite.yaml", "--policy", "runs/mine", "--episodes", "1", "--out", "eval", "--json"))
    assert results["tasks"][0]["errors"] == 0 and results["tasks"][0]["view"]["rate"] == 10

    vla("model", "merge", "runs/mine", "whole")
    vla("verify", "whole")
    tuned, whole = read_checkpoint("runs/mine"), read_checkpoint("whole")
    assert tuned.weights.stat().st_size < 0.5 * whole.weights.stat().st_size
    assert all(row.passed for row in verify(tuned, load_policy("whole")))


def rename(mapping: Path) -> None:
    """What a user edits in the proposed mapping: the names under which a world knows their numbers and cameras."""
    known = build_world(WORLD).contract
    text = mapping.read_text().replace("side_cam:", "sideview:")
    for theirs, ours in zip((*STATE, *ACTION), (*known.state.names, *known.action.names), strict=True):
        text = text.replace(f"name: {theirs},", f"name: {ours},")
    mapping.write_text(text)


def same_actions(policy: Any, before: Any, after: Any, data: Path) -> None:
    """From the same noise, lerobot's answer to a frame of the dataset and ours."""
    ours, dataset = load_policy("base"), open_dataset(data)
    seen = Observation({c: dataset.frames(c, [7])[0] for c in dataset.cameras}, dataset.vectors["observation.state"][7], TASK)
    ours.reset("s", 3)
    noise = ours._noise(Request("s", seen))["action"]
    batch: dict[str, Any] = {"task": [TASK], "observation.state": torch.from_numpy(seen.state)[None]}
    for camera, image in seen.images.items():
        batch[f"observation.images.{camera}"] = torch.from_numpy(image)[None].permute(0, 3, 1, 2).float() / 255
    theirs = after(policy.predict_action_chunk(before(batch), noise=torch.from_numpy(noise)[None]))[0].numpy()
    np.testing.assert_allclose(ours.act(Request("s", seen)).chunk.actions, theirs, atol=1e-5)

"""The whole path of a user who comes from lerobot: their policy, their dataset, no Python of their own.

What a user types is in ``STEPS``; README.md tells the same for released weights and full size.
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
import yaml

from triune.cli.main import main
from triune.data import Observation, open_dataset
from triune.policies import Request, load_policy, read_checkpoint, verify
from triune.policies.train.logs import read_log
from triune.vla.weights.released import HEAD_DIM, VISION_HEADS

from .lerobot_peers import SMOL_SIDE, smol_fill, smol_folder
from .policies.tokens import byte_tokenizer
from .strangers import ACTION, CAMERAS, STATE, TASK, record_as_stranger

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
    print(Path("robot.yaml").read_text())


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

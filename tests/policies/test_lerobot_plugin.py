"""lerobot 0.6.1 trains and evaluates our specs through ``lerobot_policy_triune``, and both open what the other wrote."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from triune import UserError
from triune.config import merge
from triune.data import Observation, open_dataset
from triune.policies import Request, load_policy, read_checkpoint, verify

SIDE, STATE, ACTION, LENGTH = 32, 4, 2, 9
CAMERAS = ("top", "hand")
CHANGES = ["cameras=[top, hand]", "heads.future.cameras=[top, hand]"]


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that lerobot's own recorder wrote: two cameras and joints with names of its own, PNG."""
    return record(tmp_path_factory.mktemp("theirs") / "d", use_videos=False)


def record(folder: Path, use_videos: bool) -> Path:
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "video" if use_videos else "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channel"]}
    features = {f"observation.images.{camera}": image for camera in CAMERAS}
    features["observation.state"] = {"dtype": "float32", "shape": (STATE,), "names": ["pan", "lift", "elbow", "jaw"]}
    features["action"] = {"dtype": "float32", "shape": (ACTION,), "names": {"motors": ["pan", "lift"]}}
    dataset = LeRobotDataset.create("local/theirs", 10, features, root=folder, use_videos=use_videos, video_backend="pyav")
    rng = np.random.default_rng(0)
    for episode in range(3):
        for _ in range(LENGTH):
            row: dict[str, Any] = {f"observation.images.{c}": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for c in CAMERAS}
            row["observation.state"] = rng.normal(episode, 1, STATE).astype(np.float32)
            dataset.add_frame(row | {"action": rng.normal(0, 2, ACTION).astype(np.float32), "task": ("fold it", "open it")[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return folder


@pytest.fixture(scope="session")
def spec(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "probe.yaml"
    file.write_text(yaml.safe_dump(merge(tiny_tree, {"streams": {"obs": {"length": 24}}})))
    return file


def arguments(spec: Path, data: Path, out: Path, **more: Any) -> list[str]:
    said = {
        "policy.type": "triune",
        "policy.spec": spec,
        "policy.overrides": json.dumps(CHANGES),
        "policy.n_action_steps": 3,
        "policy.push_to_hub": "false",
        "policy.device": "cpu",
        "dataset.repo_id": "local/theirs",
        "dataset.root": data,
        "output_dir": out,
        "batch_size": 4,
        "steps": 2,
        "num_workers": 0,
        "log_freq": 1,
        "save_freq": 2,
    } | more
    return [f"--{key}={value}" for key, value in said.items() if value is not None]


@pytest.fixture(scope="session")
def trained(spec: Path, theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy that lerobot-train made in two steps."""
    out = tmp_path_factory.mktemp("lerobot") / "run"
    lerobot("train", arguments(spec, theirs, out))
    return out


def lerobot(command: str, argv: list[str]) -> Any:
    """``lerobot-train`` or ``lerobot-eval`` in this process."""
    from importlib import import_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"lerobot-{command}", *argv])
        return import_module(f"lerobot.scripts.lerobot_{command}").main()


def test_lerobot_trains_a_spec(trained: Path) -> None:
    folder = trained / "checkpoints" / "last" / "pretrained_model"
    print(sorted(p.name for p in folder.iterdir()))
    rows = verify(read_checkpoint(trained), load_policy(trained))
    assert len(rows) == 5 and all(row.passed for row in rows)

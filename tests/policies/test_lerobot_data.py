"""What lerobot's own recorder writes trains here."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from triune.cli.main import main
from triune.config import merge
from triune.policies import load_policy, read_checkpoint, verify

from ..lerobot_peers import record_frames


@pytest.mark.parametrize("use_videos", [False, True], ids=["png", "video"])
def test_lerobots_dataset_trains_a_spec(use_videos: bool, tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = record_frames(tmp_path / "data", use_videos)
    own = {"streams": {"obs": {"length": 24}}, "heads": {"future": {"cameras": ["top", "hand"]}, "action": {"action_dim": 2}}}
    spec = tmp_path / "probe.yaml"
    spec.write_text(yaml.safe_dump(merge(tiny_tree, own | {"state_dim": 4, "cameras": ["top", "hand"]})))
    train = {"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu", "log_every": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kind": "policy", "spec": str(spec), "data": str(data), "executed": 3, "train": train}))
    monkeypatch.setattr(sys, "argv", ["vla", "train", str(recipe), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="0"):
        main()
    log = [yaml.safe_load(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(math.isfinite(row["loss"]) for row in log)
    policy = load_policy(tmp_path / "run")
    assert (policy.contract.camera_names, policy.contract.rate) == (("top", "hand"), 10.0)
    assert (policy.contract.state.names, policy.contract.action.names) == (("pan", "lift", "elbow", "jaw"), ("pan", "lift"))
    assert all(row.passed for row in verify(read_checkpoint(tmp_path / "run"), policy))
    lowest = np.array(read_checkpoint(tmp_path / "run").statistics["action"]["min"])
    assert (lowest < -1.5).all()  # of 27 draws with standard deviation 2

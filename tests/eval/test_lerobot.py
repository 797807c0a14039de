"""``vla eval --policy <a folder that lerobot saved>``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from triune import UserError
from triune.cli.evaluate import judge
from triune.eval import runner

from .fakes import CONTRACT, FakePool, FakeWorld
from .test_suite import SUITE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a suite, and an ACT of random weights as lerobot saves it, for the cameras, states and actions of the fake world."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    sizes = {"dim_model": 16, "n_heads": 2, "dim_feedforward": 16, "n_encoder_layers": 1, "n_vae_encoder_layers": 1, "latent_dim": 4}
    seen = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in CONTRACT.camera_names}
    config = ACTConfig(
        **sizes,
        chunk_size=6,
        n_action_steps=4,
        pretrained_backbone_weights=None,
        device="cpu",
        input_features=seen | {"observation.state": PolicyFeature(FeatureType.STATE, (2,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
    )
    torch.manual_seed(0)
    row = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    stats = {key: {n: np.full(size, x, np.float32) for n, x in row.items()} for key, size in (("observation.state", 2), ("action", 3))}
    images = {key: {n: np.full((3, 1, 1), x, np.float32) for n, x in row.items()} for key in seen}
    for part in (ACTPolicy(config), *make_pre_post_processors(config, dataset_stats=stats | images)):
        part.save_pretrained(tmp_path / "act")
    monkeypatch.setattr(runner, "build_world", FakeWorld)
    monkeypatch.setattr(runner, "camera_names", lambda name: CONTRACT.camera_names)
    monkeypatch.setattr(runner, "WorldPool", FakePool)
    return tmp_path


def play(place: Path, out: str, controls: dict[str, Any]) -> dict[str, Any]:
    suite = SUITE | {"tasks": {"fake/reach-red": {}}, "controls": controls}
    (place / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    options: dict[str, Any] = {"episodes": 2, "seed": 1_000_000, "workers": 1, "overrides": None}
    return judge(str(place / "suite.yaml"), str(place / "act"), place / out, **options)


def test_a_policy_of_lerobot_is_evaluated(place: Path) -> None:
    results = play(place, "first", {"images blanked": {"images": "blank", "episodes": 1}})
    assert results["tasks"][0]["episodes"] == 2 and results["tasks"][0]["errors"] == 0
    assert results["controls"][0]["errors"] == 0 and (place / "first" / "report.html").is_file()
    again = play(place, "again", {})
    rows = [(place / out / "episodes.jsonl").read_text().splitlines()[:2] for out in ("first", "again")]
    told = [[{k: v for k, v in yaml.safe_load(line).items() if not k.endswith("_ms")} for line in part] for part in rows]
    assert told[0] == told[1] and again["checkpoint"]["manifest_sha256"] == results["checkpoint"]["manifest_sha256"]


def test_what_it_cannot_be_asked_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="no edges to cut"):
        play(place, "cut", {"action does not read the observation": {"cut": ["action", "obs"], "episodes": 1}})

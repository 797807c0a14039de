"""Grounding scores: what counts as right, and what the text alone gives."""

import json
from pathlib import Path

import numpy as np
import pytest

from triune.data.readers.scenes import CAMERAS, SceneWriter
from triune.errors import UserError
from triune.eval import reconstruction
from triune.eval.grounding import Scorer, score


@pytest.fixture(scope="module")
def folder(tiny_weights: dict[str, str]) -> str:
    return tiny_weights["vlm"].removeprefix("path:")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    for kind, shape in (("cubes", "cube"), ("heldout-shape", "capsule")):
        with SceneWriter(path / f"{kind}-0.parquet") as writer:
            for seed in range(3):
                common = {"size": 0.02, "position": [0, 0, 0], "state": "table", "on": None}
                red = {"agentview": [0.2, 0.5], "wrist": None}
                green = {"agentview": [0.5, 0.5], "wrist": [0.5, 0.5]}
                objects = [
                    {"name": "red", "colour": "red", "shape": "cube", **common, "image": red},
                    {"name": "green", "colour": "green", "shape": shape, **common, "image": green},
                ]
                gripper = {"position": [0, 0, 1], "image": {"agentview": [0.5, 0.25], "wrist": [0.5, 0.75]}}
                images = {camera: generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for camera in CAMERAS}
                writer.add(images, json.dumps({"world": f"scenes:{kind}", "seed": seed, "objects": objects, "gripper": gripper}))
    return path


def test_rows_of_every_kind_and_of_the_text_alone(folder: str, scenes: Path) -> None:
    rows = score(folder, scenes, limit=2)
    assert [row["name"] for row in rows] == ["scenes:cubes", "scenes:heldout-shape", "text only (images blank)"]
    assert [row["scenes"] for row in rows] == [2, 2, 4]
    assert all(0 <= row["colour"] <= 1 and 0 <= row["relation"] <= 1 for row in rows)
    assert score(folder, scenes, 2) == rows  # the same every time


def test_a_model_that_is_right_scores_full(folder: str, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def oracle(self: Scorer, pixels: torch.Tensor, packed: dict[str, torch.Tensor]) -> torch.Tensor:
        place = self.packer.first + (packed["value"] * 128).long()
        return torch.nn.functional.one_hot(torch.where(packed["word"] < 0, place, packed["word"]), 1000).float()

    monkeypatch.setattr(Scorer, "_logits", oracle)
    for row in score(folder, scenes):
        assert row["colour"] == 1 and row["relation"] == 1
        assert row["median"] <= row["p90"] < 0.0056 and row["wrist_median"] < 0.0056  # half a location bin each way
        assert row["absent"] in (1, None)


def test_mistakes_are_said(folder: str, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model \(there is no config\.json\)"):
        score(tmp_path, scenes)
    with pytest.raises(UserError, match="there are no scenes in"):
        score(folder, tmp_path)


def test_an_autoencoder_is_scored_by_what_it_keeps(tiny_weights: dict[str, str], folder: str, scenes: Path) -> None:
    autoencoder = tiny_weights["autoencoder"].removeprefix("path:")
    assert reconstruction.is_autoencoder(autoencoder) and not reconstruction.is_autoencoder(folder)
    rows = reconstruction.score(autoencoder, scenes, limit=2)
    assert [(row["name"], row["images"]) for row in rows] == [("scenes:cubes", 4), ("scenes:heldout-shape", 4)]
    assert all(0 < row["psnr"] < 20 and 0 < row["coloured_psnr"] < 20 for row in rows)  # noise, through random weights
    assert reconstruction._psnr(np.full((4, 4), 0.01)) == pytest.approx(20)

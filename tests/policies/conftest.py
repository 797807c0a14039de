"""A small dataset of noise, a recipe over it, and what it trains."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from triune.config import merge
from triune.data import Camera, Contract, Episode, Vector
from triune.data.writer import DatasetWriter
from triune.policies.train.recipe import run

SIDE = 32


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short episodes of noise with two instructions; 32 px, two cameras, 5 state and 3 action dimensions."""
    folder = tmp_path_factory.mktemp("data") / "noise"
    cameras = tuple(Camera(name=n, height=SIDE, width=SIDE) for n in ("agentview", "wrist"))
    contract = Contract(cameras=cameras, state=Vector(names=tuple("abcde")), action=Vector(names=tuple("xyz")), rate=20.0, render="fast")
    with DatasetWriter(folder, contract, 20) as writer:
        for i in range(4):
            rng = np.random.default_rng(i)
            images = {c.name: rng.integers(0, 256, (9, SIDE, SIDE, 3), np.uint8) for c in cameras}
            state, action = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)
            words = ("lift the red cube", "lift the cube")[i % 2]
            writer.add(Episode(images, state, action, words, {"world": "noise", "seed": i, "success": True}))
    return folder


@pytest.fixture(scope="session")
def recipe_tree(dataset: Path, tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    spec = tmp_path_factory.mktemp("spec") / "probe.yaml"
    spec.write_text(yaml.safe_dump(merge(tiny_tree, {"streams": {"obs": {"length": 24}}})))
    train = {"steps": 4, "batch_size": 4, "precision": "fp32", "device": "cpu", "save_every": 4}
    return {"kind": "policy", "spec": str(spec), "data": str(dataset), "executed": 3, "train": train}


@pytest.fixture(scope="session")
def checkpoint(recipe_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree))
    return run(str(folder / "recipe.yaml"), [], folder / "out", resume=False)

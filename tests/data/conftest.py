"""Small episodes, and datasets of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from triune.data import Camera, Contract, Episode, Vector
from triune.data.writer import DatasetWriter

SIZE = 16
CONTRACT = Contract(
    cameras=(Camera(name="agentview", height=SIZE, width=SIZE), Camera(name="wrist", height=SIZE, width=SIZE)),
    state=Vector(names=("x", "y", "z"), units=("m", "m", "m"), frame="base"),
    action=Vector(names=("dx", "dy", "gripper"), mode="relative", gripper="+1 closes"),
    rate=20.0,
    render="fast",
)
MakeEpisode = Callable[..., Episode]
MakeDataset = Callable[..., Path]


def _episode(index: int, length: int | None = None) -> Episode:
    generator = np.random.default_rng(index)
    count = length or 5 + index % 4
    return Episode(
        images={name: generator.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8) for name in CONTRACT.camera_names},
        state=generator.normal(size=(count, 3)).astype(np.float32),
        action=generator.normal(size=(count, 3)).astype(np.float32),
        task=("lift the red cube", "stack the red cube")[index % 2],
        meta={"world": "cubes/lift-red", "seed": index, "success": True, "cameras": {"wrist": {"intrinsics": np.eye(3)}}},
        extra={"action.expert": generator.normal(size=(count, 3)).astype(np.float32)},
    )


@pytest.fixture
def contract() -> Contract:
    return CONTRACT


@pytest.fixture
def make_episode() -> MakeEpisode:
    """``make_episode(index, length=None)``: random, the same for the same arguments."""
    return _episode


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """``make_dataset(count)``: the folder of a dataset of episodes 0, 1, ..."""

    def make(count: int, name: str = "dataset") -> Path:
        with DatasetWriter(tmp_path / name, CONTRACT, 20) as writer:
            for index in range(count):
                writer.add(_episode(index))
        return tmp_path / name

    return make

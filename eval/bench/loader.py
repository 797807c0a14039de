"""Training samples per second from disk: two cameras, state, and a chunk of actions; ours beside lerobot's dataset."""

import tempfile
from pathlib import Path

import numpy as np

from ...data import Camera, ChunkSampler, Contract, Episode, Vector, open_dataset
from ...data.writer import DatasetWriter
from .run import Row, row, seconds

CAMERAS = ("agentview", "wrist")
EPISODES, FRAMES, SIDE, RATE, BATCH = 10, 60, 96, 20, 32


def run() -> list[Row]:
    """Rows for chunks of 16 and 50 actions: the same samples of the same folder, images as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dataset"
        _write(path)
        return [
            row(f"2 cameras {SIDE} px, chunk {c}", _ours(path, c), _lerobot(path, c), "LeRobotDataset", "samples/s", 3.0) for c in (16, 50)
        ]


def _ours(path: Path, chunk: int) -> float:
    dataset = open_dataset(path)
    sampler = ChunkSampler(dataset, chunk, BATCH, seed=0)

    def load() -> None:
        index = sampler.batch(0)["index"]
        for camera in CAMERAS:
            dataset.frames(camera, index)

    return BATCH / seconds(load)


def _lerobot(path: Path, chunk: int) -> float:
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/bench", root=path, delta_timestamps={"action": [i / RATE for i in range(chunk)]})
    index = np.random.default_rng(0).permutation(len(dataset))[:BATCH].tolist()
    return BATCH / seconds(lambda: [dataset[i] for i in index], repeats=1)


def _write(path: Path) -> None:
    """Smooth moving pictures, which compress about as well as rendered ones."""
    generator = np.random.default_rng(0)
    named = {n: Vector(names=tuple(f"{n}{i}" for i in range(size))) for n, size in (("state", 10), ("action", 7))}
    cameras = tuple(Camera(name=name, height=SIDE, width=SIDE) for name in CAMERAS)
    contract = Contract(cameras=cameras, state=named["state"], action=named["action"], rate=RATE)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    with DatasetWriter(path, contract, RATE) as writer:
        for _ in range(EPISODES):
            phase = generator.uniform(0, 6.28, (FRAMES, 1, 1, 3)) * 0.1 + np.linspace(0, 2, FRAMES)[:, None, None, None]
            waves = np.sin(6 * x[None, :, :, None] + phase) * np.cos(4 * y[None, :, :, None] - phase)
            images = (127 + 100 * waves).astype(np.uint8)
            state, action = (generator.normal(size=(FRAMES, n)).astype(np.float32) for n in (10, 7))
            writer.add(Episode(dict.fromkeys(CAMERAS, images), state, action, "move"))

"""Training samples from disk: two cameras of 224 px, a state, and a chunk of 50 actions; ours beside lerobot's dataset and loader.

Both read the same folders in the same run, one epoch from a new loader, with as many workers as there are processors. lerobot:
``LeRobotDataset`` with ``delta_timestamps`` for the chunk and the decoder that it chooses itself, in torch's ``DataLoader`` with
``shuffle`` and two batches ahead per worker; its workers are warm before it is timed.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...data import Camera, ChunkSampler, Contract, Episode, Vector, open_dataset
from ...data.loader import Loader, best_order
from ...data.order import Windowed
from ...data.writer import DatasetWriter
from .run import Row, in_turns, median_interval, row

CAMERAS = ("agentview", "wrist")
EPISODES, FRAMES, SIDE, RATE, CHUNK = 10, 100, 224, 20, 50
SIZES = {"state": 10, "action": 7}
PEER = "LeRobotDataset, DataLoader"


def run() -> list[Row]:
    """Rows for videos, PNG images and vectors alone; for the order of decoding; and for memory over a million samples."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("video", "png", "vectors")}
        write(paths["video"], video=True)
        write(paths["png"], video=False)
        write_vectors(paths["vectors"])
        case = f"2 cameras {SIDE} px, chunk {CHUNK}"
        return [
            row(f"video, {case}", ours(paths["video"]), theirs(paths["video"], 12), PEER, "samples/s", 3.0),
            row(f"PNG, {case}", ours(paths["png"]), theirs(paths["png"], 2), PEER, "samples/s", 10.0),
            row(f"vectors only, chunk {CHUNK}", ours(paths["vectors"]), theirs(paths["vectors"], 20), PEER, "samples/s", 20.0),
            shuffled(paths["video"]),
            memory(paths["vectors"]),
        ]


def ours(path: Path, batch_size: int = 32, repeats: int = 3) -> float:
    """Samples per second over an epoch, the median of some, each from a loader that holds nothing."""
    dataset = open_dataset(path)
    rates = []
    for seed in range(repeats):
        sampler = ChunkSampler(dataset, CHUNK, batch_size, seed, order=best_order([dataset], dataset.cameras))
        steps = len(sampler) // batch_size
        start = time.perf_counter()
        epoch(sampler, steps)
        rates.append(steps * batch_size / (time.perf_counter() - start))
    return statistics.median(rates)


def epoch(sampler: ChunkSampler, steps: int, workers: int | None = None, **settings: Any) -> None:
    """Load ``steps`` batches of all cameras."""
    cameras = sampler.datasets[0].cameras
    if not cameras:
        for step in range(steps):
            sampler.batch(step)
        return
    with Loader(sampler, cameras, workers=workers, **settings) as loader:
        for step in range(steps):
            loader.batch(step)


def theirs(path: Path, batches: int, batch_size: int = 32) -> float:
    """Samples per second over some batches, after one of each worker."""
    from lerobot.datasets import LeRobotDataset
    from torch.utils.data import DataLoader

    workers = len(os.sched_getaffinity(0))
    dataset = LeRobotDataset("local/bench", root=path, delta_timestamps={"action": [i / RATE for i in range(CHUNK)]})
    flow: Iterator[Any] = iter(DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, prefetch_factor=2, drop_last=True))
    for _ in range(workers):
        next(flow)
    start = time.perf_counter()
    for _ in range(batches):
        next(flow)
    return batches * batch_size / (time.perf_counter() - start)


def shuffled(path: Path) -> Row:
    """Frames per second of one processor: a shuffled epoch of the loader, and the same files from end to end through PyAV.

    The loader's memory holds a third of the frames, so most of what it shows has to be decoded for it.
    """
    import av

    dataset = open_dataset(path)
    files = sorted((path / "videos").rglob("*.mp4"))
    frames = len(dataset) * len(dataset.cameras)
    cache = frames * SIDE * SIDE * 3 // 3
    window = len(dataset) // 10
    sampler = ChunkSampler(dataset, 1, 20, seed=0, order=Windowed(window=window))

    def straight() -> None:
        for file in files:
            with av.open(str(file)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for frame in container.decode(video=0):
                    frame.to_ndarray(format="rgb24")

    ahead, sequential = in_turns([lambda: epoch(sampler, len(sampler) // 20, 1, cache_bytes=cache), straight], 7)
    interval = median_interval([b / a for a, b in zip(ahead, sequential, strict=True)])
    mine, limit = (frames / statistics.median(times) for times in (ahead, sequential))
    return row("video, shuffled, one processor", mine, limit, "decoded from end to end", "frames/s", 0.45, interval)


def memory(path: Path) -> Row:
    """Resident megabytes after a million vector samples, beside those after the first ten thousand, in a process of its own."""
    code = MEMORY.format(path=str(path), chunk=CHUNK, page=resource.getpagesize())
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    early, late = map(float, done.stdout.split())
    return row("vectors only, 10^6 samples, resident memory", late, early, "after 10^4 samples", "MB", 0.95)


MEMORY = """
from pathlib import Path
from triune.data import ChunkSampler, open_dataset
sampler = ChunkSampler(open_dataset({path!r}), {chunk}, 100, seed=0)
for step in range(10_000):
    sampler.batch(step)
    if step in (99, 9_999):
        print(int(Path("/proc/self/statm").read_text().split()[1]) * {page} / 2**20)
"""


def write(path: Path, video: bool) -> None:
    """Moving pictures with the noise of a camera."""
    generator = np.random.default_rng(0)
    named = {name: Vector(names=tuple(f"{name}{i}" for i in range(size))) for name, size in SIZES.items()}
    cameras = tuple(Camera(name=name, height=SIDE, width=SIDE) for name in CAMERAS)
    contract = Contract(cameras=cameras, state=named["state"], action=named["action"], rate=RATE)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    with DatasetWriter(path, contract, RATE, video=video) as writer:
        for _ in range(EPISODES):
            phase = generator.uniform(0, 6.28, (1, 1, 1, 3)) + np.linspace(0, 4, FRAMES)[:, None, None, None]
            waves = np.sin(9 * x[None, :, :, None] + phase) * np.cos(7 * y[None, :, :, None] - phase)
            noise = generator.normal(0, 6, (FRAMES, SIDE, SIDE, 1))
            images = (127 + 100 * waves + noise).clip(0, 255).astype(np.uint8)
            state, action = (generator.normal(size=(FRAMES, size)).astype(np.float32) for size in SIZES.values())
            writer.add(Episode(dict.fromkeys(CAMERAS, images), state, action, "move"))


def write_vectors(path: Path) -> None:
    """The same without images, as lerobot records it."""
    from lerobot.datasets import LeRobotDataset

    features: dict[str, dict[str, Any]] = {
        key: {"dtype": "float32", "shape": (size,), "names": [f"{key}{i}" for i in range(size)]}
        for key, size in (("observation.state", SIZES["state"]), ("action", SIZES["action"]))
    }
    dataset = LeRobotDataset.create("local/bench", RATE, features, root=path, use_videos=False)
    generator = np.random.default_rng(0)
    for _ in range(EPISODES):
        for _ in range(FRAMES):
            vectors = {key: generator.normal(size=feature["shape"]).astype(np.float32) for key, feature in features.items()}
            dataset.add_frame(vectors | {"task": "move"})
        dataset.save_episode()
    dataset.finalize()

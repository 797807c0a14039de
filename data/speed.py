"""How fast a dataset loads here: samples per second, where the time goes, how many workers are worth having."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .loader import SPANS, Loader, best_order
from .order import Windowed
from .readers import Dataset
from .sampler import ChunkSampler

FRAMES = 128
"""Frames of each camera that are decoded in order, for comparison."""
ENOUGH = 0.9
"""Share of the best rate that makes more workers needless."""


def measure(dataset: Dataset, chunk: int, batch_size: int, cache_bytes: int, samples: int) -> dict[str, Any]:
    """Ready for JSON: ``cameras``, ``rates`` (samples/s), ``milliseconds`` (of the processor, per sample), ``workers``, ``advice``.

    Each rate is that of a new loader over at most ``samples`` samples of the first epoch, so that no frame is decoded already;
    what the operating system has read stays read.
    """
    cameras = dataset.cameras
    sampler = ChunkSampler(dataset, chunk, batch_size, seed=0, order=best_order([dataset], cameras))
    steps = max(1, min(samples, len(sampler)) // batch_size)
    alone = _timed(sampler.batch, steps)
    rates = {"vectors only": steps * batch_size / alone["wall"]}
    parts = {"vectors": alone["process"]}
    choices: list[int] = []
    if cameras:
        most = len(os.sched_getaffinity(0))
        choices = sorted({1, 2, 4, 8, 16, most} & set(range(1, most + 1)))
        for workers in choices:
            with Loader(sampler, cameras, workers=workers, cache_bytes=cache_bytes) as loader:
                spent = _timed(loader.batch, steps)
            rates[f"{workers} worker" + "s" * (workers > 1)] = steps * batch_size / spent["wall"]
            if workers == 1:
                parts |= {"decoding": spent["process"] - spent["thread"], "gathering images": spent["thread"] - alone["thread"]}
    named = list(rates.items())[1:]
    best = max((rate for _, rate in named), default=0.0)
    workers = next((n for n, (_, rate) in zip(choices, named, strict=True) if rate >= ENOUGH * best), 0)
    return {
        "path": str(dataset.path),
        "chunk": chunk,
        "batch": batch_size,
        "samples": steps * batch_size,
        "cameras": [_camera(dataset, camera) for camera in cameras],
        "rates": {name: round(rate, 1) for name, rate in rates.items()},
        "milliseconds": {name: round(1e3 * max(0.0, s) / (steps * batch_size), 4) for name, s in parts.items()},
        "workers": workers,
        "advice": _advice(dataset, sampler, parts, workers, cache_bytes),
    }


def _camera(dataset: Dataset, camera: str) -> dict[str, Any]:
    source = dataset.source(camera)
    frames = np.arange(min(FRAMES, len(dataset)))
    out = np.empty((len(frames), *source.size(0), 3), np.uint8)
    source.fill(frames[:2], out, frames[:2])
    spent = _timed(lambda _: source.fill(frames, out, frames), 1)
    size = "x".join(map(str, source.size(0)))
    return {"camera": camera, "kept as": source.kind, "size": size, "in order": round(len(frames) / spent["process"], 1)}


def _advice(dataset: Dataset, sampler: ChunkSampler, parts: dict[str, float], workers: int, cache_bytes: int) -> list[str]:
    if not dataset.cameras:
        return ["There are no images: no workers are needed."]
    slowest = max(parts, key=lambda part: parts[part])
    said = [f"Use {workers} worker{'s' * (workers > 1)}; most of the processor's time goes into {slowest}."]
    frame = sum(int(np.prod(dataset.source(camera).size(0))) * 3 for camera in dataset.cameras)
    if len(dataset) * frame <= cache_bytes:
        said.append("All decoded frames fit the cache: from the second epoch on nothing is decoded.")
    elif isinstance(order := best_order([dataset], dataset.cameras), Windowed) and order.window * frame * SPANS > cache_bytes:
        least = order.window * frame * SPANS // 2**20 + 1
        said.append(f"A window of {order.window} samples does not fit a third of the cache: give {least} MB, or a smaller window.")
    return said


def _timed(work: Callable[[int], object], steps: int) -> dict[str, float]:
    """Seconds of ``work`` for all steps: by the clock, of the processor, and of the processor in this thread."""
    clocks = {"wall": time.perf_counter, "process": time.process_time, "thread": time.thread_time}
    before = {name: clock() for name, clock in clocks.items()}
    for step in range(steps):
        work(step)
    return {name: clock() - before[name] for name, clock in clocks.items()}

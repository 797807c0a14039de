"""x"""

from pathlib import Path
from typing import Any

import numpy as np

from .readers import open_dataset


def inspect(path: str | Path) -> dict[str, Any]:
    """What a dataset holds, ready for JSON: sizes, cameras, features, tasks, ranges per dimension, doubts."""
    dataset = open_dataset(path)
    contract = dataset.contract
    named = {"observation.state": contract.state.names, "action": contract.action.names, "action.expert": contract.action.names}
    lengths = [episode.length for episode in dataset.episodes]
    ranges = {}
    for key, values in dataset.vectors.items():
        names = named.get(key, tuple(f"{key}_{i}" for i in range(values.shape[1])))
        ranges[key] = [
            {"name": name, "min": float(low), "max": float(high), "mean": float(mean), "constant": bool(low == high)}
            for name, low, high, mean in zip(names, values.min(0), values.max(0), values.mean(0), strict=True)
        ]
    fields: list[tuple[str, object]] = [("rate", contract.rate), ("render", contract.render)]
    fields += [(f"camera {camera.name} flip", camera.flip) for camera in contract.cameras]
    for part, vector in (("state", contract.state), ("action", contract.action)):
        fields += [(f"{part} {name}", value) for name, value in (("units", vector.units), ("frame", vector.frame), ("mode", vector.mode))]
    return {
        "path": str(dataset.path),
        "episodes": len(dataset.episodes),
        "frames": len(dataset),
        "fps": dataset.fps,
        "seconds": len(dataset) / dataset.fps,
        "episode_length": {"min": min(lengths), "mean": float(np.mean(lengths)), "max": max(lengths)},
        "cameras": [camera.model_dump(mode="json") for camera in contract.cameras],
        "tasks": {task: sum(episode.task == task for episode in dataset.episodes) for task in dataset.tasks},
        "worlds": sorted({str(episode.meta["world"]) for episode in dataset.episodes if "world" in episode.meta}),
        "features": {key: int(values.shape[1]) for key, values in dataset.vectors.items()},
        "ranges": ranges,
        "unknown": [name for name, value in fields if value is None],
    }

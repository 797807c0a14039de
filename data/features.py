"""What an episode holds in lerobot's words, and whether it may follow the episodes before it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .contract import Contract
from .readers.metadata import DEFAULT_COLUMNS, EPISODES_FILE
from .types import Episode


def vectors_of(episode: Episode) -> dict[str, np.ndarray]:
    """The vector columns of an episode, float32 (T, D) each."""
    columns = {"observation.state": episode.state, "action": episode.action, **episode.extra}
    return {key: np.asarray(value, np.float32).reshape(len(value), -1) for key, value in columns.items()}


def episode_features(
    episode: Episode, path: Path, contract: Contract, video: bool, before: dict[str, Any] | None, wrong: Sequence[str] = ()
) -> dict[str, Any]:
    """lerobot's feature table of an episode, without its default columns.

    Args:
        episode: about to be written.
        path: the dataset folder.
        contract: its conventions.
        video: whether images are kept as video.
        before: the feature table of the episodes before, where there are some.
        wrong: what the writer itself found wrong, in words.

    Raises:
        UserError: the episode's cameras or sizes are not those of the contract, or of the episodes before.
    """
    features: dict[str, Any] = {}
    for camera, images in episode.images.items():
        features[f"observation.images.{camera}"] = {
            "dtype": "video" if video else "image",
            "shape": images.shape[1:],
            "names": ["height", "width", "channels"],
        }
    for key, value in vectors_of(episode).items():
        known = {"observation.state": contract.state.names}.get(key, contract.action.names)
        names = list(known) if len(known) == value.shape[1] else [f"{key}_{i}" for i in range(value.shape[1])]
        features[key] = {"dtype": "float32", "shape": (value.shape[1],), "names": names}
    problems = [*wrong]
    problems += [
        f"{key} has {len(value)} frames and action {len(episode)}"
        for key, value in [*episode.images.items(), *vectors_of(episode).items()]
        if len(value) != len(episode)
    ]
    if len(episode) < 2:
        problems.append("it has fewer than two frames")
    if sorted(episode.images) != sorted(contract.camera_names):
        problems.append(f"its cameras are {', '.join(episode.images)} and the contract's {', '.join(contract.camera_names)}")
    for name, value, vector in (("state", episode.state, contract.state), ("action", episode.action, contract.action)):
        if value.shape[1] != vector.size:
            problems.append(f"its {name} has {value.shape[1]} dimensions and the contract's {vector.size}")
    if before is not None:
        mine, stored = _kinds(features), _kinds(before)
        different = [key for key in sorted(mine | stored) if mine.get(key) != stored.get(key)]
        problems += [f"its {key} is {mine.get(key, 'absent')}, and {stored.get(key, 'absent')} in the episodes before" for key in different]
    if problems:
        raise UserError(f"an episode does not fit {path}: {'; '.join(problems)}. Record it into another folder")
    return features


def _kinds(features: dict[str, Any]) -> dict[str, str]:
    """What of the feature table must not change between episodes."""
    return {key: f"{f['dtype']} {tuple(f['shape'])}" for key, f in features.items() if key not in DEFAULT_COLUMNS}


def refuse_headless(root: Path) -> None:
    """Refuse to begin anew over episodes that nothing counts: a recorder that dies in its first one leaves facts of one at most.

    Raises:
        UserError: ``meta/info.json`` is gone from a folder that held more.
    """
    facts = root / EPISODES_FILE
    held = facts.read_bytes().count(b"\n") if facts.is_file() else 0
    if held > 1 and not (root / "meta" / "info.json").is_file():
        raise UserError(f"{root} holds {held} episodes but no meta/info.json; put that file back from a copy, or choose another folder")

"""What a policy may send where no robot's mapping says it: the range of the actions that it was trained on."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data.contract import Contract
from ..data.statistics import Statistics
from ..data.transforms import Affine
from .inputs import Settings

WIDER = 0.05
"""Share of an action's range by which it is widened at both ends."""


def default_limits(statistics: Mapping[str, Statistics | Affine], contract: Contract, settings: Settings | None = None) -> dict[str, Any]:
    """What ``triune_client.ActionLimits.from_dict`` reads, from a checkpoint alone.

    Each action stays within the smallest and largest of the training data, widened by ``WIDER`` of the range; a step of 0 stays allowed. An
    action that the network counts from the state stays within the states' range and the offsets' together. Not limited are velocities and
    accelerations, since statistics do not hold steps; poses that are counted from the hand's; and, of a converted checkpoint, actions whose
    ranges its peer did not store. What is not finite holds the robot in any case. A gripper's number counts as a place also among steps,
    so that holding does not open it.

    Args:
        statistics: ``observation.state`` and ``action`` of the checkpoint.
        settings: those of the checkpoint, which say what its statistics of actions are counted from.
    """
    settings, action = settings or Settings(), contract.action
    low, high = _range(statistics["action"], action.size)
    if settings.relative is not None:
        counted = np.array([i is not None for i in settings.relative.state_of])
        at = [i or 0 for i in settings.relative.state_of]
        least, most = _range(statistics["observation.state"], contract.state.size)
        low, high = np.where(counted, low + least[at], low), np.where(counted, high + most[at], high)
    for pose in settings.poses:
        low[pose.action : pose.action + 9], high[pose.action : pose.action + 9] = -np.inf, np.inf
    rows = []
    for i, name in enumerate(action.names):
        mode = "absolute" if "gripper" in name.lower() and action.mode is not None else action.mode
        row: dict[str, Any] = {"name": name, "unit": action.units and action.units[i], "mode": mode}
        if np.isfinite([low[i], high[i]]).all():
            room = WIDER * (high[i] - low[i])
            ends = (float(low[i] - room), float(high[i] + room))
            row["min"], row["max"] = (min(ends[0], 0.0), max(ends[1], 0.0)) if mode == "relative" else ends
        if mode == "absolute" and action.units and name in contract.state.names:
            reported = contract.state.names.index(name)
            if contract.state.units and contract.state.units[reported] == action.units[i]:
                row["state"] = reported
        rows.append({key: value for key, value in row.items() if value is not None})
    return {"dimensions": rows, "source": "range of the training data"}


def _range(found: Statistics | Affine, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest, (size,) each; infinite where they are not known."""
    if isinstance(found, Affine):
        return np.full(size, -np.inf), np.full(size, np.inf)
    return np.array(found.min, np.float64), np.array(found.max, np.float64)

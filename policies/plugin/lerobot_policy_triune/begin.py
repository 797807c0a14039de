"""From a dataset to a policy: what a spec takes over from the frames it is to learn."""

from typing import Any

import numpy as np

from triune import UserError
from triune.config import parse
from triune.data import Contract, Dataset, Observation, Statistics, compute_statistics
from triune.data.transforms import Affine
from triune.policies.train.fit import check_spec
from triune.vla import Spec

from .configuration_triune import action_head

GOLDEN = 5
"""Frames of the dataset that a saved policy is verified by."""


def fitted(spec: Spec, dataset: Dataset) -> Spec:
    """``spec`` with the dataset's sizes of states and actions.

    Raises:
        UserError: the spec sees a camera that the dataset has not, or is made of what a dataset does not hold.
    """
    check_spec(spec)
    missing = [camera for camera in spec.cameras if camera not in dataset.cameras]
    if missing:
        there = ", ".join(dataset.cameras) or "none"
        example = ", ".join(dataset.cameras[: len(spec.cameras)])
        raise UserError(
            f"{dataset.path} has no camera {', '.join(missing)} (it has {there}), which {spec.name} sees; name its own: "
            f"--policy.overrides='[\"cameras=[{example}]\"]', and likewise heads.<foresight>.cameras where there is one"
        )
    tree = spec.model_dump(mode="json") | {"state_dim": dataset.contract.state.size}
    tree["heads"][action_head(spec)]["action_dim"] = dataset.contract.action.size
    return parse(Spec, tree, spec.name)


def statistics(dataset: Dataset) -> dict[str, Statistics | Affine]:
    """Of states and actions over all frames, quantiles included."""
    return {**compute_statistics(dataset, ("observation.state", "action"))}


def adopted(contract: Contract, kept: dict[str, Any], dataset: Dataset, new: bool) -> tuple[Contract, dict[str, Any]]:
    """Contract and statistics with which a saved policy goes on to learn ``dataset``.

    Args:
        kept: its own statistics, as JSON values.
        new: whether the dataset's take their place.

    Raises:
        UserError: the states or actions are others than the policy's.
    """
    same = dataset.contract.model_copy(update={"cameras": contract.cameras})  # these may be renamed on the way
    contract.require(same, "the saved policy", f"dataset {dataset.path}")
    if not new:
        return contract, kept
    parts = {part: getattr(contract, part) for part in ("state", "action")}
    kinds = {part: vector.model_copy(update={"normalisation": vector.normalisation or "quantile"}) for part, vector in parts.items()}
    return contract.model_copy(update=kinds), {name: found.model_dump(mode="json") for name, found in statistics(dataset).items()}


def five_frames(dataset: Dataset, cameras: tuple[str, ...]) -> list[Observation]:
    """Observations spread over the dataset."""
    picks = np.linspace(0, len(dataset) - 1, GOLDEN).astype(int)
    images = {camera: dataset.frames(camera, picks) for camera in cameras}
    states, words = dataset.vectors["observation.state"], dataset.task_of_frame
    return [Observation({c: images[c][i] for c in cameras}, states[frame], words[frame]) for i, frame in enumerate(picks)]

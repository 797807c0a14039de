"""What lerobot's loops hand to a policy, as observations of ours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from triune import UserError
from triune.data import Contract, Observation
from triune.data.readers.metadata import camera_name


def observations(contract: Contract, batch: dict[str, Any], frame: int, timestamp: float = 0.0) -> list[Observation]:
    """The rows of a batch at one of its frames, with those of their cameras that the contract names."""
    cameras = {camera_name(key): value for key, value in batch.items() if key.startswith("observation.image")}
    seen = {name: pixels(cameras[name], frame) for name in contract.camera_names if name in cameras}
    state = batch["observation.state"]
    state = (state[:, frame] if state.ndim == 3 else state).float().cpu().numpy()
    return [
        Observation({name: images[row] for name, images in seen.items()}, state[row], text, timestamp)
        for row, text in enumerate(texts(batch, len(state)))
    ]


def texts(batch: dict[str, Any], rows: int) -> list[str]:
    """The instruction of each row.

    Raises:
        UserError: the batch has none.
    """
    said = batch.get("task")
    if said is None:
        raise UserError("the batch has no 'task'; a Triune policy acts on words, so give the task of each row")
    return [said] * rows if isinstance(said, str) else list(said)


def pixels(images: Tensor, frame: int) -> np.ndarray:
    """lerobot's images (B[, T], 3, Y, X), uint8 or from 0 to 1, at one frame: uint8 (B, Y, X, 3)."""
    images = images[:, frame] if images.ndim == 5 else images
    if images.dtype != torch.uint8:
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

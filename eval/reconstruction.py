"""How much of a picture an autoencoder's latents keep, on annotated scenes: what the foresight expert can show at best."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data.readers.scenes import open_scenes

BATCH = 32
COLOURED = 0.4
"""Pixels count as coloured when their largest and smallest channel differ by more than this share of the full scale."""


def is_autoencoder(folder: str | Path) -> bool:
    """Whether the folder's ``config.json`` names a diffusers autoencoder."""
    config = Path(folder) / "config.json"
    return config.is_file() and str(json.loads(config.read_text()).get("_class_name", "")).startswith("Autoencoder")


def score(folder: str | Path, scenes: str | Path, limit: int = 300) -> list[dict[str, Any]]:
    """One row per kind of scene: ``name``, ``images``, ``psnr`` in dB over all pixels and ``coloured_psnr`` over the coloured
    ones, which are mostly the things to act on.

    Args:
        folder: a diffusers folder of AutoencoderTiny, such as ``vla/assets/autoencoder/v1``.
        scenes: folder of recorded scenes, of seeds that the autoencoder was not trained on.
        limit: scenes of each kind.

    Raises:
        UserError: there are no scenes.
    """
    import torch
    from diffusers import AutoencoderTiny

    found = open_scenes(scenes, limit)
    autoencoder = AutoencoderTiny.from_pretrained(folder).eval()
    worlds = [annotation["world"] for annotation in found.annotations]
    rows = []
    for world in dict.fromkeys(worlds):
        images = found.images[[i for i, name in enumerate(worlds) if name == world]]
        images = images.reshape(-1, *images.shape[2:])
        decoded = []
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.inference_mode():
                decoded.append(autoencoder.decode(autoencoder.encode(pixels).latents).sample.permute(0, 2, 3, 1).numpy())
        true = images.astype(np.float32) / 255
        error = np.square(np.clip((np.concatenate(decoded) + 1) / 2, 0, 1) - true).mean(-1)
        coloured = true.max(-1) - true.min(-1) > COLOURED
        rows.append({"name": world, "images": len(images), "psnr": _psnr(error), "coloured_psnr": _psnr(error[coloured])})
    return rows


def _psnr(squared: np.ndarray) -> float | None:
    return float(-10 * np.log10(squared.mean())) if squared.size else None

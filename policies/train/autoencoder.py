"""The recipe that trains the small autoencoder whose latents the foresight expert predicts: ``diffusers``' AutoencoderTiny.

Loss: the absolute error of pixels, weighted by colourfulness (what is acted on is small and coloured, tables are not),
and of their differences to the right and down, which keeps edges. ``latents_mean`` and ``latents_std`` per channel are
measured on the training images and stand in ``config.json``.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from ...config import Strict
from ...data.readers.scenes import open_scenes
from .optim import TrainConfig
from .team import Part

SAMPLE = 512
"""Images that the latents' mean and deviation are measured on."""


class Recipe(Strict):
    """``kind: autoencoder``.

    Attributes:
        data: folder of scenes.
        limit: scenes of each kind that are read.
        crop: side in pixels of the squares that are trained on; the network is convolutional throughout.
        width: channels of every level but the latents.
        blocks: residual blocks per level of the encoder, from full to an eighth of the size; the decoder mirrors them.
        latent_channels: channels of the latents.
        edge_weight: weight of the differences between neighbouring pixels.
        colour_weight: a fully saturated pixel counts 1 + this.
        latent_weight: pulls latents towards zero, so that they stay where the decoder's bounded input is linear.
    """

    kind: Literal["autoencoder"]
    data: str
    limit: PositiveInt = 6000
    crop: PositiveInt = 48
    width: PositiveInt = 32
    blocks: tuple[NonNegativeInt, ...] = (0, 1, 2, 2)
    latent_channels: PositiveInt = 4
    edge_weight: NonNegativeFloat = 1.0
    colour_weight: NonNegativeFloat = 3.0
    latent_weight: NonNegativeFloat = 1e-3
    train: TrainConfig


class AutoencoderTask:
    """See ``loop.Task``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            self.module = build_autoencoder(recipe)
        images = open_scenes(recipe.data, recipe.limit).images
        self.images = images.reshape(-1, *images.shape[2:])

    def batch(self, part: Part) -> Tensor:
        generator = np.random.default_rng(np.random.SeedSequence([self.recipe.train.seed, part.index, 3]))
        count, crop = self.recipe.train.batch_size // part.of, self.recipe.crop
        corners = generator.integers(0, (len(self.images), *(side - crop + 1 for side in self.images.shape[1:3])), (count, 3))
        chosen = np.stack([self.images[i, y : y + crop, x : x + crop] for i, y, x in corners])
        return torch.from_numpy(chosen).permute(0, 3, 1, 2)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        target = (batch.float() / 127.5 - 1).to(memory_format=torch.channels_last)
        latents = self.module.encode(target).latents
        decoded = self.module.decode(latents).sample.float()
        chroma = 0.5 * (target.amax(1, keepdim=True) - target.amin(1, keepdim=True))
        weight = 1 + self.recipe.colour_weight * chroma
        error = decoded - target
        pixel = (weight * error.abs()).mean()
        edge = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
        loss = pixel + self.recipe.edge_weight * edge + self.recipe.latent_weight * latents.float().square().mean()
        with torch.no_grad():
            psnr = -10 * torch.log10((0.5 * error.clamp(-2, 2)).square().mean())
        return {"loss": loss, "pixel": pixel, "edge": edge, "psnr": psnr}

    def validate(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        module = build_autoencoder(self.recipe)
        module.load_state_dict(weights)
        module.eval()
        step = max(1, len(self.images) // SAMPLE)
        sample = torch.from_numpy(np.ascontiguousarray(self.images[::step][:SAMPLE])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            latents = torch.cat([module.encode(part).latents for part in sample.split(64)])
        mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
        module.register_to_config(latents_mean=[round(v, 5) for v in mean], latents_std=[round(v, 5) for v in std])
        module.save_pretrained(folder)


def build_autoencoder(recipe: Recipe) -> Any:
    """A freshly initialised ``AutoencoderTiny``."""
    from diffusers import AutoencoderTiny

    levels = len(recipe.blocks)
    module = AutoencoderTiny(
        encoder_block_out_channels=(recipe.width,) * levels,
        decoder_block_out_channels=(recipe.width,) * levels,
        num_encoder_blocks=recipe.blocks,
        num_decoder_blocks=recipe.blocks[::-1],
        latent_channels=recipe.latent_channels,
    )
    return module.to(memory_format=torch.channels_last)


def build(recipe: Recipe, out: Path) -> AutoencoderTask:
    """The task of a recipe."""
    return AutoencoderTask(recipe)

"""Foresight in a frozen autoencoder's latents: regressed in one forward (the way of InternVLA-A1) or denoised by flow matching."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ...errors import UserError
from ..heads import FlowCodec
from ..spec import LatentHead, Stream, TimeFeatures
from ..weights.references import resolve_weights


class LatentForesight(nn.Module):
    """Patches of the future frames' latents, by regression or by flow matching.

    Regression: learned queries in, patches out; where the stream holds ``latents`` the present frame's patches go in with the queries,
    and a head that predicts the change adds what comes out to them. Flow: ``codec``, noisy patches in, velocities out.
    The autoencoder is referenced, never saved: it is frozen and kept out of this module's parameters.

    Raises:
        UserError: the stream's length is not the number of latent patches of the cameras.
    """

    autoencoder: Any

    def __init__(self, head: LatentHead, stream: Stream, width: int, time_of: str | None, features: TimeFeatures) -> None:
        super().__init__()
        self.head, length = head, stream.length
        self.channels = head.channels or 0
        object.__setattr__(self, "autoencoder", None)
        if head.autoencoder is not None:
            self._open(head.autoencoder, length)
        size = self.channels * head.patch**2
        sees = stream.tokens == "latents"
        self.codec = FlowCodec(size, width, stream.encoder, time_of, features) if stream.tokens == "frames" else None
        if self.codec is None:
            self.queries = nn.Parameter(torch.randn(length, width) * 0.02)
            self.into = nn.Linear(size, width) if sees else None
            self.out = nn.Linear(width, size)

    def _open(self, reference: str, length: int) -> None:
        with torch.device("cpu"), torch.no_grad():  # it is small, so it is real in a sketch too
            autoencoder = _load(reference)
            object.__setattr__(self, "autoencoder", autoencoder)
            self.channels = autoencoder.config.latent_channels
            self.mean, self.std = (nn.Buffer(part, persistent=False) for part in _scales(autoencoder))
            self.grid = autoencoder.encode(torch.zeros(1, 3, self.head.image_size, self.head.image_size)).latents.shape[-1]
        per_camera = (self.grid // self.head.patch) ** 2
        if self.grid % self.head.patch or per_camera * len(self.head.cameras) != length:
            raise UserError(
                f"the foresight stream needs {per_camera * len(self.head.cameras)} tokens ({len(self.head.cameras)} cameras, "
                f"{self.grid}x{self.grid} latents in patches of {self.head.patch}), its length is {length}"
            )

    @property
    def needs_present(self) -> bool:
        """Whether the patches of the present frames are asked for."""
        return self.codec is None and (self.into is not None or self.head.predicts == "change")

    def tokens(self, batch: int, present: Float[Tensor, "B T P"] | None) -> Float[Tensor, "B T D"]:
        """The stream's tokens; ``present`` holds the patches of the present frames where it ``sees`` them."""
        if self.into is None:
            return self.queries[None].expand(batch, -1, -1)
        assert present is not None, "this foresight sees the present frames"
        return self.queries + self.into(present)

    def predict(self, hidden: Float[Tensor, "B T D"], present: Float[Tensor, "B T P"] | None) -> Float[Tensor, "B T P"]:
        """Patches of the future frames; ``present`` as in ``tokens``."""
        out = self.out(hidden)
        if self.head.predicts == "frame":
            return out
        assert present is not None, "this foresight predicts the change of the present frames"
        return present + out

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B V 3 Y X"] | Float[Tensor, "B V 3 Y X"]) -> Float[Tensor, "B T P"]:
        """Target patches of the cameras' frames, normalised per latent channel.

        Raises:
            UserError: the spec names no autoencoder.
        """
        if self.autoencoder is None:
            raise UserError(
                f"the foresight of cameras {', '.join(self.head.cameras)} has no autoencoder, so latents must come encoded with the data; "
                "name one (heads.<stream>.autoencoder) or give Inputs.latents and Targets.future as patches"
            )
        size = self.head.patch
        pixels = (images.flatten(0, 1).float() / 127.5 - 1.0).to(memory_format=torch.channels_last)
        latents = (self.autoencoder.encode(pixels).latents - self.mean) / self.std
        patches = latents.unfold(2, size, size).unfold(3, size, size)  # (B*V, K, h, w, p, p)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return patches.unflatten(0, (images.shape[0], -1)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, patches: Float[Tensor, "B T P"]) -> UInt8[Tensor, "B V 3 Y X"]:
        """Frames of (predicted) patches: the inverse of ``encode`` up to the autoencoder's own loss."""
        size, side, views = self.head.patch, self.grid // self.head.patch, len(self.head.cameras)
        x = patches.unflatten(1, (views, side, side)).unflatten(-1, (self.channels, size, size)).flatten(0, 1)
        latents = x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, self.grid, self.grid)
        latents = latents.float() * self.std + self.mean
        pixels = self.autoencoder.decode(latents).sample
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).unflatten(0, (-1, views))

    def _apply(self, fn: Any, recurse: bool = True) -> "LatentForesight":
        """Move the autoencoder with the module, which does not own it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        if self.autoencoder is not None:
            self.autoencoder._apply(fn)
        return self


def _load(reference: str) -> Any:
    """The referenced diffusers autoencoder (AutoencoderTiny), frozen, in fp32."""
    from diffusers import AutoencoderTiny
    from diffusers.utils import logging

    folder = resolve_weights(reference, "autoencoder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no diffusers autoencoder (no config.json); train one with `vla train autoencoder`")
    logging.set_verbosity_error()  # it warns of config keys that it wrote itself
    autoencoder = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32)
    return autoencoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _scales(autoencoder: Any) -> tuple[Tensor, Tensor]:
    config = autoencoder.config
    return torch.tensor(config.latents_mean)[:, None, None], torch.tensor(config.latents_std)[:, None, None]

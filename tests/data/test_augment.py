"""Augmentation on a device: the same for any number of processes, and what it says it does."""

import numpy as np
import torch

from triune.data.augment import Augment


def images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 24, 32, 3), np.uint8))


def test_photometric_factors_are_the_formula() -> None:
    """Brightness, then contrast about the mean, then colour about the grey; one set per image."""
    x = images(3, 2)
    varied = Augment().draw((3, 2), np.random.default_rng(5)).apply(x)
    rng = np.random.default_rng(5)
    brightness, contrast, saturation = (rng.uniform(0.8, 1.2, (3, 2, 1, 1, 1)).astype(np.float32) for _ in range(3))
    y = x.numpy().astype(np.float32) * brightness
    y = (y - y.mean((2, 3, 4), keepdims=True)) * contrast + y.mean((2, 3, 4), keepdims=True)
    grey = y.mean(-1, keepdims=True)
    wanted = ((y - grey) * saturation + grey).round().clip(0, 255)
    assert varied.dtype == torch.uint8
    assert np.abs(varied.numpy().astype(float) - wanted).max() <= 1  # rounding of the means


def test_rows_do_not_depend_on_the_number_of_processes() -> None:
    x = images(4, 2)
    strength = Augment(crop=0.2)
    whole = strength.draw((4, 2), np.random.default_rng(1)).apply(x)
    parts = [strength.draw((4, 2), np.random.default_rng(1))[rows].apply(x[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, strength.draw((4, 2), np.random.default_rng(2)).apply(x))


def test_the_frames_of_a_history_vary_alike() -> None:
    x = images(2, 2)[:, :, None].expand(-1, -1, 3, -1, -1, -1)
    varied = Augment(crop=0.3).draw((2, 2), np.random.default_rng(0)).apply(x)
    assert varied.shape == x.shape
    assert torch.equal(varied[:, :, 0], varied[:, :, 2])


def test_crops_are_parts_of_the_image() -> None:
    """A ramp stays a ramp: a crop of share s has s of its slope, and begins inside."""
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8)[None, None, :, None].expand(8, 60, 100, 3)
    still = Augment(brightness=0, contrast=0, saturation=0, crop=0.4)
    factors = still.draw((8,), np.random.default_rng(3))
    share = factors.values[:, 3]
    assert share.min() >= 0.6 and share.max() <= 1 and np.ptp(share) > 0.1
    cropped = factors.apply(ramp).float()
    assert cropped.shape == ramp.shape
    width = (cropped[:, 30, 95] - cropped[:, 30, 5])[:, 0].numpy() / 180
    np.testing.assert_allclose(width, share, atol=0.02)
    assert cropped[..., 0].std(1).max() < 1e-3  # nothing moved between rows
    untouched = Augment(brightness=0, contrast=0, saturation=0).draw((8,), np.random.default_rng(3)).apply(ramp)
    assert torch.equal(untouched, ramp)

"""Foresight: what comes next, encoded, predicted, scored and decoded."""

from .latent import LatentForesight

__all__ = ["LatentForesight"]

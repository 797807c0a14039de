"""Datasets on disk, read without the library that wrote them."""

from .dataset import Dataset, EpisodeInfo
from .open import open_dataset

__all__ = ["Dataset", "EpisodeInfo", "open_dataset"]

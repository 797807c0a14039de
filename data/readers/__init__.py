"""Datasets on disk, read without the library that wrote them."""

from .lerobot import Dataset, EpisodeInfo, inspect, open_dataset

__all__ = ["Dataset", "EpisodeInfo", "inspect", "open_dataset"]

"""The words that all folders share, and datasets."""

from .contract import Camera, Contract, Vector
from .readers import Dataset, open_dataset
from .sampler import ChunkSampler
from .statistics import Statistics, compute_statistics
from .transforms import Normaliser
from .types import ActionChunk, Episode, Observation

__all__ = [
    "ActionChunk",
    "Camera",
    "ChunkSampler",
    "Contract",
    "Dataset",
    "Episode",
    "Normaliser",
    "Observation",
    "Statistics",
    "Vector",
    "compute_statistics",
    "open_dataset",
]

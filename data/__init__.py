"""The words that all folders share, and datasets."""

from .contract import Camera, Contract, Vector
from .types import ActionChunk, Episode, Observation

__all__ = ["ActionChunk", "Camera", "Contract", "Episode", "Observation", "Vector"]

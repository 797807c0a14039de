"""Experts: the weights that process a stream's tokens. All answer to the ``Expert`` protocol of ``base.py``."""

from .base import Expert
from .decoder import Decoder
from .pretrained import PretrainedVLM

__all__ = ["Decoder", "Expert", "PretrainedVLM"]

"""Experts: the weights that process a stream's tokens. All are an ``Expert`` of ``base.py``."""

from .base import Expert
from .decoder import Decoder
from .pretrained import PretrainedVLM

__all__ = ["Decoder", "Expert", "PretrainedVLM"]

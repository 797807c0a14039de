"""Experts: the weights that process a stream's tokens. All are an ``Expert`` of ``base.py``."""

from .base import Expert
from .bridge import Bridge
from .decoder import Decoder
from .pretrained import PretrainedVLM

__all__ = ["Bridge", "Decoder", "Expert", "PretrainedVLM"]

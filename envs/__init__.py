"""Simulators behind one contract, their scripted experts, and recording of demonstrations."""

from .base import Expert, World
from .registry import make_expert, make_world, world_names

__all__ = ["Expert", "World", "make_expert", "make_world", "world_names"]

"""Simulators behind one contract, their scripted experts, and recording of demonstrations."""

from .base import Expert, World
from .registry import build_world, camera_names, make_expert, make_world, world_names
from .view import View

__all__ = ["Expert", "View", "World", "build_world", "camera_names", "make_expert", "make_world", "world_names"]

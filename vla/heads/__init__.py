"""Heads and encoders of streams."""

from .action import FlowCodec, StateEncoder, mlp

__all__ = ["FlowCodec", "StateEncoder", "mlp"]

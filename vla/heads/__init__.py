"""Heads: what turns tokens into actions."""

from .action import ActionHead, StateEncoder

__all__ = ["ActionHead", "StateEncoder"]

"""Networks turned into behaviour: the Policy contract, policies, checkpoints, training."""

from .base import Plan, Policy, Request

__all__ = ["Plan", "Policy", "Request"]

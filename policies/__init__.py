"""Networks turned into behaviour: the Policy contract, policies, checkpoints, training."""

from .base import Plan, Policy, Request
from .checkpoint import find_checkpoint, read_checkpoint, verify
from .triune import TriunePolicy, load_policy

__all__ = ["Plan", "Policy", "Request", "TriunePolicy", "find_checkpoint", "load_policy", "read_checkpoint", "verify"]

"""Networks turned into behaviour: the Policy contract, policies, checkpoints, training, serving.

What needs torch is imported when it is first asked for: the server's own process does without.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .base import Plan, Policy, Request

if TYPE_CHECKING:
    from .checkpoint import find_checkpoint, read_checkpoint, verify
    from .triune import TriunePolicy, load_policy, open_policy

__all__ = ["Plan", "Policy", "Request", "TriunePolicy", "find_checkpoint", "load_policy", "open_policy", "read_checkpoint", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module = ".triune" if name in ("TriunePolicy", "load_policy", "open_policy") else ".checkpoint"
    return getattr(importlib.import_module(module, __name__), name)

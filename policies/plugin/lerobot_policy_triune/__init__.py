"""Triune in LeRobot: ``--policy.type=triune`` and ``--env.type=triune``. Importing it makes both known."""

from .configuration_triune import TriuneConfig
from .environment_triune import TriuneEnv

__all__ = ["TriuneConfig", "TriuneEnv"]

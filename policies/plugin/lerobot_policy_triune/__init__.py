"""Triune in LeRobot: ``--policy.type=triune``, ``--policy.type=triune_remote`` and ``--env.type=triune``. Importing it makes them known."""

from .configuration_triune import TriuneConfig
from .configuration_triune_remote import TriuneRemoteConfig
from .environment_triune import TriuneEnv

__all__ = ["TriuneConfig", "TriuneEnv", "TriuneRemoteConfig"]

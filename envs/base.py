"""The World contract: the gymnasium API with a few promises more.

Observations follow the names that LeRobot's evaluators read: ``{"pixels": {camera: uint8 (H, W, 3)}, "agent_pos":
float32 (S,)}``. ``info["is_success"]`` is a bool at every step; a world never resets itself and success does not end
an episode. ``task_description`` is the instruction. The same seed gives the same rollout bit for bit.
"""

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np

from ..data import Contract, Observation

Info = dict[str, Any]


class World(gymnasium.Env[dict[str, Any], np.ndarray]):
    """A simulated task.

    Attributes:
        name: registry name, such as ``cubes/lift-red``.
        task_description: the instruction.
        max_steps: control steps after which an evaluator gives up; the world itself reports ``truncated`` then.
        rate: control rate in Hz.
        contract: cameras, state and action conventions of this world, compared with those of a policy.
    """

    name: str
    task_description: str
    max_steps: int
    rate: float
    contract: Contract

    @abstractmethod
    def step_chunk(self, actions: np.ndarray, video: bool = False) -> tuple[dict[str, Any], Info, list[dict[str, np.ndarray]]]:
        """Execute ``actions`` (n, A) one control step each, stopping early at success or truncation.

        Only the last frame is rendered, unless ``video`` is asked: then the frames after each step are returned too.

        Returns:
            the last observation; the last info, with ``steps`` (executed), ``is_success``, ``truncated``; frames.
        """

    @abstractmethod
    def privileged(self) -> dict[str, Any]:
        """Object poses and whatever else the scripted experts, scene captions and checkers need. Never observed."""

    def observation(self, obs: dict[str, Any], timestamp: float = 0.0) -> Observation:
        """A gymnasium observation of this world as a policy's ``Observation``."""
        return Observation(dict(obs["pixels"]), obs["agent_pos"], self.task_description, timestamp)

"""The World contract: the gymnasium API with a few promises more.

Observations follow the names that LeRobot's evaluators read: ``{"pixels": {camera: uint8 (H, W, 3)}, "agent_pos":
float32 (S,)}``. ``info["is_success"]`` is a bool at every step; a world never resets itself and success does not end
an episode. ``task_description`` is the instruction. The same seed gives the same rollout bit for bit.

A simulator becomes a world by four methods: ``_begin``, ``_advance``, ``_state`` and ``_images``.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from ..data import Contract, Observation
from ..errors import UserError

Info = dict[str, Any]

Expert = Callable[[dict[str, Any]], np.ndarray]
"""A scripted expert: a pure function of ``World.privileged()`` to an action (A,) inside the action space."""


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
    render_mode = "rgb_array"

    def __init__(
        self, name: str, task_description: str, max_steps: int, contract: Contract, state_range: tuple[list[float], list[float]]
    ) -> None:
        if contract.rate is None:
            raise ValueError(f"the contract of world {name} must say the control rate")
        self.name = name
        self.task_description = task_description
        self.max_steps = max_steps
        self.contract = contract
        self.rate = contract.rate
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(self.rate)}
        images: dict[str, gymnasium.Space[Any]] = {}
        for camera in contract.cameras:
            black = np.zeros((camera.height or 0, camera.width or 0, 3), np.uint8)
            images[camera.name] = Box(black, black + np.uint8(255), dtype=np.uint8)
        low, high = (np.array(values, np.float32) for values in state_range)
        self.observation_space = Dict({"pixels": Dict(images), "agent_pos": Box(low, high, dtype=np.float32)})
        self.action_space: Box = Box(-1.0, 1.0, (contract.action.size,), np.float32)
        self._steps: int | None = None
        self._success = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], Info]:
        """Begin an episode; everything random in it follows from ``seed``. Without one, the next of a seeded series."""
        super().reset(seed=seed)
        self._begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._steps = 0
        self._success = False
        return self._observe(), {"is_success": False}

    def become(self, name: str) -> bool:
        """Take on the task ``name``, where that needs no other simulator than this world has; ``reset`` must follow.

        Building a simulator takes seconds, so who goes from task to task asks first. False: nothing has changed.
        """
        return name == self.name

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, Info]:
        """One control step; actions outside [-1, 1] are clipped. ``terminated`` is always false.

        Raises:
            UserError: the episode has not begun or is over, or the action has not the shape (A,) or is not finite.
        """
        reward = self._step(action)
        return self._observe(), reward, False, self._truncated, {"is_success": self._success}

    def step_chunk(self, actions: np.ndarray, video: bool = False) -> tuple[dict[str, Any], Info, list[dict[str, np.ndarray]]]:
        """Execute ``actions`` (n, A) one control step each, stopping early at success or truncation.

        Only the last frame is rendered, unless ``video`` is asked: then the frames after each step are returned too.

        Returns:
            the last observation; the last info, with ``steps`` (executed), ``is_success``, ``truncated``; frames.

        Raises:
            UserError: as ``step``, or there is no action.
        """
        return self._run(lambda step: actions[step], len(actions), video)

    def expert_chunk(self, expert: Expert, steps: int, video: bool = False) -> tuple[dict[str, Any], Info, list[dict[str, np.ndarray]]]:
        """As ``step_chunk``, with ``expert`` asked before each of at most ``steps`` control steps."""
        return self._run(lambda _: expert(self.privileged()), steps, video)

    def _run(
        self, choose: Callable[[int], np.ndarray], count: int, video: bool
    ) -> tuple[dict[str, Any], Info, list[dict[str, np.ndarray]]]:
        if count < 1:
            raise UserError(f"a chunk for world {self.name} has no action; give at least one")
        frames: list[dict[str, np.ndarray]] = []
        steps = 0
        while steps < count and not (steps and (self._success or self._truncated)):
            self._step(choose(steps))
            steps += 1
            if video:
                frames.append(self._images())
        images = frames[-1] if video else self._images()
        return self._observe(images), {"is_success": self._success, "truncated": self._truncated, "steps": steps}, frames

    def render(self) -> np.ndarray:
        """The first camera's image, uint8 (H, W, 3)."""
        return self._images()[self.contract.camera_names[0]]

    def observation(self, obs: dict[str, Any], timestamp: float = 0.0) -> Observation:
        """A gymnasium observation of this world as a policy's ``Observation``."""
        return Observation(dict(obs["pixels"]), obs["agent_pos"], self.task_description, timestamp)

    @abstractmethod
    def privileged(self) -> dict[str, Any]:
        """Object poses and whatever else the scripted experts, scene captions and checkers need. Never observed.

        Plain numbers, strings and lists, so that any of it can be written down. ``cameras`` (name -> ``intrinsics``
        (3, 3) in pixels and ``extrinsics`` (4, 4), world to camera) and ``gripper`` (``position`` in metres, ...) are
        always there. Asking changes nothing.
        """

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Put the simulator into the start that belongs to ``seed``, whatever happened before."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        """One control step with a clipped float32 action (A,): reward and whether the task is done now."""

    @abstractmethod
    def _state(self) -> np.ndarray:
        """Proprioception (S,) as the contract names it."""

    @abstractmethod
    def _images(self) -> dict[str, np.ndarray]:
        """Camera -> upright uint8 (H, W, 3)."""

    @property
    def _truncated(self) -> bool:
        return self._steps is not None and self._steps >= self.max_steps

    def _step(self, action: np.ndarray) -> float:
        if self._steps is None:
            raise UserError(f"world {self.name} has not begun an episode; call reset first")
        if self._truncated:
            raise UserError(f"the episode in world {self.name} ended after {self.max_steps} steps; call reset")
        action = np.asarray(action, np.float32)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise UserError(f"world {self.name} takes finite actions of shape {self.action_space.shape}, got {action}")
        reward, self._success = self._advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        return reward

    def _observe(self, images: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
        space = self.observation_space["agent_pos"]  # type: ignore[index]
        state = np.clip(np.asarray(self._state(), np.float32), space.low, space.high)
        return {"pixels": self._images() if images is None else images, "agent_pos": state}

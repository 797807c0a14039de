"""Triune's worlds as environments of lerobot: ``--env.type=triune --env.task=cubes/lift-red``."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from triune import UserError
from triune.envs import World, make_world, world_names


class Stopping(gymnasium.Wrapper):
    """A world in which success ends an episode, as lerobot's evaluator expects, with the words that it asks for."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.task, self.task_description, self._max_episode_steps = world.name, world.task_description, world.max_steps

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, float(reward), bool(info["is_success"]), truncated, info


def make_stopping(task: str, render: str, size: int) -> Stopping:
    """The world ``task`` for lerobot's evaluator."""
    return Stopping(make_world(task, render=render, size=size))


@EnvConfig.register_subclass("triune")
@dataclass
class TriuneEnv(EnvConfig):
    """A world of triune.

    Attributes:
        task: its name; ``vla`` lists them.
        render: ``fast`` or ``default``; size: height and width of the images.
    """

    task: str | None = None
    render: str = "fast"
    size: int = 96

    def __post_init__(self) -> None:
        if self.task is None:
            raise UserError(f"--env.task names the world; there are {', '.join(world_names()[:7])}, metaworld/<task>-v3")
        world = make_world(self.task, render=self.render, size=self.size)
        contract = world.contract
        world.close()
        self.fps = round(world.rate)
        self.features = {f"pixels/{c.name}": PolicyFeature(FeatureType.VISUAL, (c.height or 0, c.width or 0, 3)) for c in contract.cameras}
        self.features |= {
            "agent_pos": PolicyFeature(FeatureType.STATE, (contract.state.size,)),
            "action": PolicyFeature(FeatureType.ACTION, (contract.action.size,)),
        }
        self.features_map = {f"pixels/{c.name}": f"observation.images.{c.name}" for c in contract.cameras}
        self.features_map |= {"agent_pos": "observation.state", "action": "action"}

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"task": self.task, "render": self.render, "size": self.size}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        makers = [partial(make_stopping, **self.gym_kwargs)] * n_envs
        if use_async_envs and n_envs > 1:
            vector: VectorEnv = AsyncVectorEnv(makers, context="forkserver", autoreset_mode=AutoresetMode.SAME_STEP)
        else:
            vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        return {self.type: {0: vector}}

"""A policy of lerobot whose network runs elsewhere: each chunk is asked of an action server of Triune."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from triune import UserError
from triune.policies import Request
from triune.policies.lerobot import lerobot_files
from triune.policies.remote import open_remote

from .configuration_triune_remote import TriuneRemoteConfig
from .seen import observations


class TriuneRemotePolicy(PreTrainedPolicy):
    """See ``lerobot.policies.pretrained.PreTrainedPolicy``. Actions come in physical units.

    Raises:
        UserError: no address is given, nobody answers there, or the policy has other states or actions than the robot.
    """

    config_class = TriuneRemoteConfig
    name = "triune_remote"

    def __init__(self, config: TriuneRemoteConfig, dataset_stats: Any = None, dataset_meta: Any = None) -> None:
        super().__init__(config)
        self.config: TriuneRemoteConfig = config
        if config.url is None:
            raise UserError("a remote policy needs its server: --policy.url=ws://host:port, or wss://host:port")
        self.remote = open_remote(config.url, ca=config.ca, timeout=config.timeout, jpeg=config.jpeg, resize=config.resize)
        contract, welcome = self.remote.contract, self.remote.client.welcome
        if config.n_action_steps is None:
            config.n_action_steps = welcome.executed
        if not 1 <= config.n_action_steps <= welcome.chunk:
            raise UserError(
                f"a chunk of {config.url} has {welcome.chunk} steps, not {config.n_action_steps}; lower --policy.n_action_steps"
            )
        theirs = {
            "state": (config.robot_state_feature, PolicyFeature(FeatureType.STATE, (contract.state.size,))),
            "action": (config.action_feature, PolicyFeature(FeatureType.ACTION, (contract.action.size,))),
        }
        for part, (here, there) in theirs.items():
            if here is not None and tuple(here.shape) != there.shape:
                raise UserError(
                    f"the {part} of this robot has {here.shape[0]} numbers, that of the policy at {config.url} {there.shape[0]}"
                )
        seen = {
            f"observation.images.{c.name}": PolicyFeature(FeatureType.VISUAL, (3, c.height or 0, c.width or 0)) for c in contract.cameras
        }
        config.input_features = config.input_features or {**seen, "observation.state": theirs["state"][1]}
        config.output_features = {"action": theirs["action"][1]}
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: TriuneRemoteConfig | None = None, **options: Any
    ) -> "TriuneRemotePolicy":
        """The policy that a saved ``config.json`` names; there are no weights to read."""
        return cls(config or PreTrainedConfig.from_pretrained(pretrained_name_or_path)).eval()

    def reset(self) -> None:
        """Begin new episodes in every row; their noise follows from torch's generator, which lerobot seeds."""
        self._begun: set[str] = set()
        self._queue: deque[Tensor] = deque()
        self._asked = 0

    def select_action(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """The next action of each row, (B, A); a chunk is asked for when the steps that are executed of the last one are over."""
        if not self._queue:
            planned = self.predict_action_chunk(batch, **options)
            self._queue.extend(planned[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    def predict_action_chunk(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """A chunk (B, C, A) for each row, in physical units.

        Raises:
            UserError: an option such as ``noise`` is given, a camera is missing, or the server does not answer.
        """
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise UserError(f"a policy behind a server takes no {', '.join(given)} from lerobot")
        contract, client = self.remote.contract, self.remote.client
        seen = observations(contract, batch, 0, self._asked * (self.config.n_action_steps or 1) / client.welcome.rate)
        self._asked += 1
        missing = [c.name for c in contract.cameras if not c.optional and c.name not in seen[0].images]
        if missing:
            there = ", ".join(seen[0].images) or "none that it knows"
            raise UserError(
                f"the policy at {self.config.url} needs camera '{missing[0]}', the robot has {there}; give lerobot's rename_map"
            )
        for session in map(str, range(len(seen))):
            if session not in self._begun:
                self.remote.reset(session, int(torch.randint(2**31, ())))
                self._begun.add(session)
        plans = self.remote.plan([Request(str(row), observation) for row, observation in enumerate(seen)])
        return torch.from_numpy(np.stack([plan.chunk.actions for plan in plans])).to(batch["observation.state"].device)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """
        Raises:
            UserError: always; nothing learns here.
        """
        raise UserError("a policy behind a server is not trained from here: train where its checkpoint lies, and serve that")

    def get_optim_params(self) -> list[Tensor]:
        return []

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """A folder for ``--policy.path``: the address and the pipelines, no weights and no token."""
        for name, text in lerobot_files().items():
            (save_directory / name).write_text(text, encoding="utf-8")
        self.config._save_pretrained(save_directory)

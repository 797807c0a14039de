"""lerobot on either side: its policies behind our contract, and what it looks for in a folder beside our checkpoint."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import ActionChunk, Camera, Contract, Observation, Vector
from ..errors import UserError
from .base import Plan, Policy, Request

SAME = {"eps": 1e-8, "features": {}, "norm_map": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}}
STEPS: Mapping[str, list[tuple[str, dict[str, Any]]]] = {
    "policy_preprocessor": [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
        ("normalizer_processor", SAME),
    ],
    "policy_postprocessor": [("unnormalizer_processor", SAME), ("device_processor", {"device": "cpu", "float_dtype": None})],
}
"""The steps that lerobot's commands set options of, in version 0.6.1; none changes a value."""
BESIDE = ("config.json", "train_config.json", *STEPS)
"""How the names of lerobot's own files in a checkpoint begin: it writes them when ours are sealed."""


def lerobot_files() -> dict[str, str]:
    """Files by which ``lerobot`` (with the distribution ``lerobot_policy_triune``) opens a checkpoint of ours: name -> JSON."""
    pipelines = {
        name: {"name": name, "steps": [{"registry_name": step, "config": config} for step, config in steps]}
        for name, steps in STEPS.items()
    }
    files: dict[str, Any] = {"config.json": {"type": "triune"}} | {f"{name}.json": pipeline for name, pipeline in pipelines.items()}
    return {name: json.dumps(tree, indent=2) for name, tree in files.items()}


def is_lerobot(folder: Path) -> bool:
    """Whether ``folder`` is a policy that lerobot saved and not a checkpoint of ours."""
    theirs, ours = ("config.json", "policy_preprocessor.json"), ("policy.json", "manifest.json")
    return all((folder / name).is_file() for name in theirs) and not any((folder / name).exists() for name in ours)


class LeRobotPolicy(Policy):
    """A policy of lerobot with its own processors, asked one observation at a time: its noise comes from torch's global generator, which
    is set for each by (seed, step of the session), so answers do not depend on who else asks.

    Policies that do real-time chunking go on from what is left of the chunk before, by lerobot's own guidance: as their ``rtc_config``
    says, or by its defaults with all that is left as the horizon.

    Args:
        policy: a ``PreTrainedPolicy`` that plans a chunk from one observation; before, after: its processors.

    Raises:
        UserError: the policy looks back over several observations.
    """

    def __init__(self, policy: Any, before: Any, after: Any) -> None:
        if policy.config.n_obs_steps != 1:
            raise UserError(
                f"lerobot's {policy.config.type} looks at {policy.config.n_obs_steps} observations (n_obs_steps) that it keeps itself; "
                "only policies of one observation can act here"
            )
        self.policy, self.before, self.after = policy.eval(), before, after
        self.contract = read_contract(policy.config, before)
        self.sessions: dict[str, tuple[int, int]] = {}
        self.guides = bool(policy.supports_rtc()) and hasattr(policy.config, "rtc_config") and hasattr(policy, "init_rtc_processor")
        if self.guides:
            _enable_guidance(policy)

    @property
    def realtime(self) -> dict[str, int | bool]:
        return {"prefix": 0, "guided": self.guides}

    def reset(self, session: str, seed: int) -> None:
        self.sessions[session] = (seed, 0)

    def skip(self, session: str, plans: int) -> None:
        seed, step = self.sessions[session]
        self.sessions[session] = (seed, step + plans)

    def close(self, session: str) -> None:
        self.sessions.pop(session, None)

    def plan(self, requests: list[Request]) -> list[Plan]:
        """See ``Policy``.

        Raises:
            UserError: a session was never reset, a camera is missing, several samples are asked for, or a prefix is given to a policy that
                cannot go on from it.
        """
        plans = [self._plan(request) for request in requests]
        for request in requests:
            self.skip(request.session, 1)
        return plans

    @torch.no_grad()
    def _plan(self, request: Request) -> Plan:
        began = time.perf_counter()
        if request.session not in self.sessions:
            raise UserError(f"session '{request.session}' has not begun: call reset(session, seed) before the first plan")
        left = request.prefix if request.prefix is not None and len(request.prefix) else None
        if request.samples != 1:
            raise UserError("a policy of lerobot draws one chunk from an observation; ask with samples=1, in several sessions if need be")
        if left is not None and not self.guides:
            kind = self.policy.config.type
            raise UserError(f"lerobot's {kind} does no real-time chunking, so it takes no prefix; leave it out and execute whole chunks")
        missing = [name for name in self.contract.camera_names if name not in request.observation.images]
        if missing:
            there = ", ".join(request.observation.images) or "none"
            raise UserError(f"the policy needs camera '{missing[0]}', the observation has {there}; map your cameras to its names")
        seen = self.before(self._batch(request.observation))
        how = {} if left is None else self._going_on(left, request)
        seed, step = self.sessions[request.session]
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1))
            self.policy.reset()
            chunk = self.policy.predict_action_chunk(seen, **how)
        actions = self.after(chunk)[0].float().cpu().numpy()
        milliseconds = 1e3 * (time.perf_counter() - began)
        return Plan(ActionChunk(actions, self.contract.rate or 0.0, request.observation.timestamp), timing={"model": milliseconds})

    def _going_on(self, left: ActionChunk, request: Request) -> dict[str, Any]:
        """What is left of the chunk before as lerobot's policies take it: as their network sees actions, with the delay.

        Raises:
            UserError: the processors do not bring actions there and back, or they have other dimensions.
        """
        actions = torch.from_numpy(left.actions[: self.contract.chunk])[None]
        if actions.shape[2] != self.contract.action.size:
            raise UserError(f"the prefix has actions of {actions.shape[2]} numbers, the policy's have {self.contract.action.size}")
        inward = self.before(self._batch(request.observation) | {"action": actions})["action"]
        back = self.after(inward.clone()).float().cpu()
        if back.shape != actions.shape or not torch.allclose(back, actions, atol=1e-4, rtol=1e-4):
            kind = self.policy.config.type
            raise UserError(
                f"the processors of this {kind} do not bring actions into its network's units and back; ask it without a prefix"
            )
        return {"prev_chunk_left_over": inward, "inference_delay": min(request.delay, actions.shape[1])}

    def _batch(self, observation: Observation) -> dict[str, Any]:
        """One observation in lerobot's words: images (1, 3, Y, X) from 0 to 1."""
        seen = {
            f"observation.images.{name}": torch.tensor(observation.images[name]).permute(2, 0, 1)[None].float() / 255
            for name in self.contract.camera_names
        }
        return seen | {"observation.state": torch.tensor(observation.state)[None], "task": [observation.instruction]}


def _enable_guidance(policy: Any) -> None:
    """Let a policy of lerobot take what is left of the chunk before; without it, it answers as ever."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    config = policy.config
    config.rtc_config = replace(config.rtc_config or RTCConfig(execution_horizon=config.chunk_size), enabled=True)
    policy.init_rtc_processor()


def read_contract(config: Any, before: Any) -> Contract:
    """What lerobot's configuration and preprocessor say of a policy; names that they do not know are numbered."""
    renamed = {new: old for step in before.steps for old, new in getattr(step, "rename_map", {}).items()}
    cameras = []
    for key, feature in config.image_features.items():
        name = renamed.get(key, key)
        if not name.startswith("observation.images."):
            raise UserError(f"the policy's camera '{name}' is not named observation.images.<camera>; rename it in lerobot's rename_map")
        _, height, width = feature.shape
        cameras.append(Camera(name=name.removeprefix("observation.images."), height=height, width=width, flip=None))
    names = getattr(config, "action_feature_names", None)
    sizes = {"state": config.robot_state_feature, "action": config.action_feature}
    parts = {part: tuple(f"{part}_{i}" for i in range(feature.shape[0] if feature else 0)) for part, feature in sizes.items()}
    if names and len(names) == len(parts["action"]):
        parts["action"] = tuple(names)
    return Contract(
        cameras=tuple(cameras),
        state=Vector(names=parts["state"]),
        action=Vector(names=parts["action"]),
        chunk=getattr(config, "chunk_size", None),
        executed=getattr(config, "n_action_steps", None),
    )


def load_lerobot(folder: Path) -> LeRobotPolicy:
    """The policy in a folder that lerobot's ``save_pretrained`` wrote, on a GPU when one is present.

    Raises:
        UserError: lerobot is not installed, or knows no such policy.
    """
    config, before, after = _open(folder)
    from lerobot.policies.factory import get_policy_class

    policy: Any = get_policy_class(config.type).from_pretrained(folder, config=config)
    return LeRobotPolicy(policy.to(config.device), before, after)


def lerobot_contract(folder: Path) -> Contract:
    """What such a folder says of its policy, whose weights are not read.

    Raises:
        UserError: as ``load_lerobot``.
    """
    config, before, _ = _open(folder)
    return read_contract(config, before)


def _open(folder: Path) -> tuple[Any, Any, Any]:
    """The configuration of lerobot's policy, and its processors."""
    try:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise UserError(f"{folder} holds a policy of lerobot, which is not here ({error}): pip install 'triune-vla[lerobot]'") from None
    register_third_party_plugins()
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("type")
    if kind not in PreTrainedConfig.get_known_choices():
        raise UserError(f"{folder / 'config.json'} names a policy '{kind}' that lerobot does not know; install the plugin that brings it")
    config: Any = PreTrainedConfig.from_pretrained(folder)
    overrides = {"device_processor": {"device": config.device}}
    return (config, *make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides))

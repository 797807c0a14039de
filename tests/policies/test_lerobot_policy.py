"""Policies of lerobot behind our contract: its networks and processors, our sessions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from triune_client import Client

from triune import UserError
from triune.data import ActionChunk, Observation
from triune.policies import Request, find_checkpoint, open_policy, read_checkpoint
from triune.policies.lerobot import LeRobotPolicy, is_lerobot, load_lerobot
from triune.policies.serve import Source
from triune.policies.serve.local import serving

from ..lerobot_peers import smol_config, smol_fill, smol_folder

SIDE, STATE, ACTION = 32, 4, 3
STATS = {
    "observation.state": {"mean": np.float32([0.5, 0, 1, 2]), "std": np.float32([1, 2, 3, 4])},
    "action": {"mean": np.float32([1, 2, 3]), "std": np.float32([4, 5, 6])},
}


def features(names: tuple[str, ...]) -> dict[str, Any]:
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature

    seen = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for name in names}
    modes = {"VISUAL": NormalizationMode.IDENTITY, "STATE": NormalizationMode.MEAN_STD, "ACTION": NormalizationMode.MEAN_STD}
    return {
        "input_features": seen | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        "normalization_mapping": modes,
    }


def act(folder: Path) -> Any:
    from lerobot.policies.act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    sizes = {"dim_model": 16, "n_heads": 2, "dim_feedforward": 16, "n_encoder_layers": 1, "n_vae_encoder_layers": 1, "latent_dim": 4}
    steps = {"chunk_size": 5, "n_action_steps": 2, "pretrained_backbone_weights": None, "device": "cpu"}
    return ACTPolicy(ACTConfig(**sizes, **steps, **features(("agentview", "wrist"))))


def smolvla(folder: Path) -> Any:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    smol_folder(folder / "vlm")
    config = smol_config(folder / "vlm", resize_imgs_with_padding=(SIDE, SIDE), load_vlm_weights=False, **features(("camera1", "camera2")))
    policy = SmolVLAPolicy(config)
    smol_fill(policy.model)
    return policy


@pytest.fixture(scope="session", params=["act", "smolvla"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """A folder that lerobot saved, and the policy and the processors that it was saved from. SmolVLA has names of its own for cameras."""
    from lerobot.policies.factory import make_pre_post_processors

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    policy = {"act": act, "smolvla": smolvla}[request.param](folder).eval()
    before, after = make_pre_post_processors(policy.config, dataset_stats=STATS)
    if request.param == "smolvla":
        before.steps[0].rename_map = {
            f"observation.images.{a}": f"observation.images.{b}" for a, b in (("agentview", "camera1"), ("wrist", "camera2"))
        }
    for part in (policy, before, after):
        part.save_pretrained(folder / "policy")
    return folder / "policy", policy, before, after


def observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for name in ("wrist", "agentview")}
    return Observation(images, rng.normal(size=STATE), "close it", 0.5)


def test_actions_are_lerobots_own(saved: tuple[Path, Any, Any, Any]) -> None:
    folder, policy, before, after = saved
    ours = load_lerobot(folder)
    assert (ours.contract.camera_names, ours.contract.chunk) == (("agentview", "wrist"), 5)
    assert ours.contract.executed == policy.config.n_action_steps
    for number in range(2):
        ours.reset(str(number), seed=number)
    requests = [Request(str(number), observation(number)) for number in (0, 1)]
    plans = ours.plan(requests)
    for number, plan in enumerate(plans):
        seen = observation(number)
        batch: dict[str, Any] = {
            f"observation.images.{n}": torch.from_numpy(x).permute(2, 0, 1).float() / 255 for n, x in seen.images.items()
        }
        torch.manual_seed(int(np.random.SeedSequence([number, 0]).generate_state(1, np.uint64)[0] >> 1))
        with torch.no_grad():
            chunk = policy.predict_action_chunk(
                before(batch | {"observation.state": torch.from_numpy(seen.state), "task": seen.instruction})
            )
        np.testing.assert_array_equal(plan.chunk.actions, after(chunk)[0].numpy())
        assert plan.chunk.actions.shape == (5, ACTION) and plan.chunk.time == 0.5
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ours.act(requests[0])
    assert torch.equal(torch.rand(1), expected), "torch's global generator is left as it was"


def test_noise_follows_from_seed_and_step(saved: tuple[Path, Any, Any, Any]) -> None:
    folder, policy, _, _ = saved
    ours = load_lerobot(folder)
    answers = []
    for seed in (3, 3, 4):
        ours.reset("s", seed)
        answers.append([ours.act(Request("s", observation(0))).chunk.actions for _ in range(2)])
    np.testing.assert_array_equal(answers[0], answers[1])
    draws = policy.config.type == "smolvla"  # ACT answers without noise
    assert np.array_equal(answers[0][0], answers[0][1]) != draws
    assert np.array_equal(answers[0][0], answers[2][0]) != draws
    ours.reset("s", 3)
    with pytest.raises(UserError, match="samples=1"):  # the whole call fails, so it counts for neither
        ours.plan([Request("s", observation(0)), Request("s", observation(0), samples=2)])
    np.testing.assert_array_equal(ours.act(Request("s", observation(0))).chunk.actions, answers[0][0])


def test_requests_that_do_not_fit_are_refused(saved: tuple[Path, Any, Any, Any]) -> None:
    ours = load_lerobot(saved[0])
    with pytest.raises(UserError, match="call reset"):
        ours.act(Request("never", observation(0)))
    ours.reset("s", 0)
    with pytest.raises(UserError, match="needs camera 'wrist', the observation has agentview"):
        ours.act(Request("s", Observation({"agentview": observation(0).images["agentview"]}, np.zeros(STATE), "go")))
    with pytest.raises(UserError, match="draws one chunk from an observation"):
        ours.act(Request("s", observation(0), samples=2))
    if ours.policy.config.type == "act":
        with pytest.raises(UserError, match="lerobot's act does no real-time chunking"):
            ours.act(Request("s", observation(0), prefix=ActionChunk(np.zeros((1, ACTION)), 10.0)))
    ours.close("s")
    assert ours.sessions == {}


def test_what_is_left_guides_as_in_lerobot(saved: tuple[Path, Any, Any, Any]) -> None:
    """Its own guidance from actions in the units of its network, here those of mean and deviation."""
    folder, policy, _, after = saved
    ours = load_lerobot(folder)
    assert ours.realtime == {"prefix": 0, "guided": policy.config.type == "smolvla"}
    if not ours.guides:
        return
    left = np.random.default_rng(0).normal(size=(3, ACTION)).astype(np.float32) * 4 + 2
    answers = []
    for prefix, delay in ((None, 0), (ActionChunk(np.zeros((0, ACTION)), 10.0), 2), (ActionChunk(left, 10.0), 2)):
        ours.reset("s", 3)
        answers.append(ours.act(Request("s", observation(0), prefix, delay)).chunk.actions)
    np.testing.assert_array_equal(answers[0], answers[1])
    network = torch.from_numpy((left - STATS["action"]["mean"]) / STATS["action"]["std"])[None]
    with torch.no_grad():
        torch.manual_seed(int(np.random.SeedSequence([3, 0]).generate_state(1, np.uint64)[0] >> 1))
        seen = ours.before(ours._batch(observation(0)))
        expected = after(ours.policy.predict_action_chunk(seen, prev_chunk_left_over=network, inference_delay=2))[0]
    np.testing.assert_allclose(answers[2], expected.numpy(), atol=1e-4)
    assert np.abs(answers[2] - left[[0, 1, 2, 2, 2]])[:2].mean() < 0.5 * np.abs(answers[0] - left[[0, 1, 2, 2, 2]])[:2].mean()


def test_a_folder_of_lerobot_is_told_from_a_checkpoint(saved: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    folder = saved[0]
    assert is_lerobot(folder) and find_checkpoint(folder) == folder.resolve()
    with pytest.raises(UserError, match="vla model convert"):
        read_checkpoint(folder)
    (tmp_path / "config.json").write_text(json.dumps({"type": "unheard of"}))
    with pytest.raises(UserError, match="'unheard of' that lerobot does not know"):
        load_lerobot(tmp_path)


def test_policies_that_look_back_are_refused() -> None:
    from lerobot.policies.diffusion import DiffusionConfig

    policy = type("Fake", (), {"config": DiffusionConfig(device="cpu")})
    with pytest.raises(UserError, match="looks at 2 observations"):
        LeRobotPolicy(policy, None, None)


@pytest.mark.parametrize("saved", ["act"], indirect=True)
def test_a_server_serves_it_as_it_is(saved: tuple[Path, Any, Any, Any]) -> None:
    folder = saved[0]
    ours = load_lerobot(folder)
    ours.reset("s", 3)
    seen = observation(0)
    with serving(Source("triune.policies:open_policy", {"path": str(folder)}), "act") as server, Client(server.url) as client:
        client.reset(seed=3)
        plan = client.infer({"images": seen.images, "state": seen.state, "instruction": seen.instruction, "timestamp": 0.0})
    np.testing.assert_array_equal(plan.actions, ours.act(Request("s", seen)).chunk.actions)
    with pytest.raises(UserError, match="no edges to cut and its own precision"):
        open_policy(folder, precision="bf16")

"""lerobot's own pi0, pi0.5 and SmolVLA at tiny sizes with random weights: what ours are compared with."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triune.policies.train.vlm_model import Tower, VlmConfig, build_model, build_processor

WIDTH, EXPERT, HEADS, DIM, DEPTH = 32, 24, 8, 8, 3
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
SIDE, CHUNK, ACTION, VOCABULARY = 28, 5, 6, 1000
SMOL_SIDE, SMOL_GRID = 32, 4  # pixels a side, tokens of an image


def pi_classes(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """lerobot's modules of ``pi0`` or ``pi05``: the package with its config, and the one with its networks, which from now on have a
    small tower and small Gemmas: they read these sizes from module globals."""
    from transformers import GemmaConfig, PaliGemmaConfig

    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    vision = {**TOWER, "image_size": SIDE, "projection_dim": WIDTH, "model_type": "siglip_vision_model", "vision_use_head": False}

    def paligemma() -> Any:
        text = GemmaConfig(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
        return PaliGemmaConfig(text_config=text, vision_config=vision)

    monkeypatch.setattr(module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": GemmaConfig})
    variants = {"gemma_2b": (WIDTH, DEPTH, 40), "gemma_300m": (EXPERT, DEPTH, 36)}
    monkeypatch.setattr(module, "get_gemma_config", lambda name: module.GemmaConfig(*variants[name], HEADS, 1, DIM))
    return importlib.import_module(f"lerobot.policies.{kind}"), module


def pi_config(package: Any, **changes: Any) -> Any:
    """The package's configuration at our sizes, in fp32 on the CPU."""
    config = package.PI0Config if hasattr(package, "PI0Config") else package.PI05Config
    sizes = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "max_action_dim": ACTION, "max_state_dim": ACTION}
    return config(**sizes, image_resolution=(SIDE, SIDE), dtype="float32", device="cpu", **changes)


def pi_fill(network: Any) -> None:
    """Make what lerobot writes as numbers small too, and draw all weights."""
    body, expert = network.paligemma_with_expert.paligemma, network.paligemma_with_expert.gemma_expert
    body.config.projection_dim = body.config.vision_config.projection_dim = WIDTH  # lerobot writes 2048 whatever the width is
    body.model.multi_modal_projector.linear = torch.nn.Linear(TOWER["hidden_size"], WIDTH)
    body.resize_token_embeddings(VOCABULARY)
    expert.lm_head = torch.nn.Linear(EXPERT, VOCABULARY, bias=False)
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.2)


def smol_folder(folder: Path) -> None:
    """A SmolVLM of five layers with its processor, as transformers saves them."""
    tower = {"width": 32, "layers": 2, "heads": 4, "ffn": 48}
    vlm = VlmConfig(image_size=SMOL_SIDE, patch=8, shuffle=2, vision=Tower(**tower), text=Tower(**tower | {"layers": 5}, kv_heads=2))
    build_model(vlm, seed=7).save_pretrained(folder)
    build_processor(vlm).save_pretrained(folder)


def smol_config(folder: Path, **changes: Any) -> Any:
    """SmolVLA's configuration on the first four layers of that VLM."""
    from lerobot.policies.smolvla import SmolVLAConfig

    sizes = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "max_action_dim": ACTION, "max_state_dim": ACTION, "num_steps": 10}
    return SmolVLAConfig(vlm_model_name=str(folder), num_vlm_layers=4, prefix_length=0, device="cpu", **sizes, **changes)


def smol_fill(network: Any) -> None:
    """Draw all weights."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def record_frames(folder: Path, use_videos: bool, side: int = 32, episodes: int = 3, length: int = 9) -> Path:
    """A dataset of noise that lerobot's own recorder writes: cameras and joints with names of its own, two instructions."""
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "video" if use_videos else "image", "shape": (side, side, 3), "names": ["height", "width", "channel"]}
    features = {
        "observation.images.top": image,
        "observation.images.hand": image,
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["pan", "lift", "elbow", "jaw"]},
        "action": {"dtype": "float32", "shape": (2,), "names": {"motors": ["pan", "lift"]}},
    }
    dataset = LeRobotDataset.create("local/theirs", 10, features, root=folder, use_videos=use_videos, video_backend="pyav")
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        for _ in range(length):
            row: dict[str, Any] = {
                f"observation.images.{name}": rng.integers(0, 256, (side, side, 3), np.uint8) for name in ("top", "hand")
            }
            row["observation.state"] = rng.normal(episode, 1, 4).astype(np.float32)
            row["action"] = rng.normal(0, 2, 2).astype(np.float32)
            dataset.add_frame(row | {"task": ("fold it", "open it")[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return folder

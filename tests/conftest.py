"""Settings of every test: one thread per process, software rendering, shapes and types checked in triune.vla.

Tiny models with random weights are made once per run: nothing is downloaded, nothing depends on trained assets.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("triune.vla", "beartype.beartype")

from pathlib import Path  # noqa: E402  # after the hook, which must see triune.vla imported for the first time

import pytest  # noqa: E402
import torch  # noqa: E402

from triune.config import merge, parse  # noqa: E402
from triune.vla import Spec  # noqa: E402


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References to a 2-layer SmolVLM (grouped-query attention) and a small autoencoder with random weights."""
    from diffusers import AutoencoderTiny

    from triune.policies.train.vlm_model import Tower, VlmConfig, build_model, build_processor

    folder: Path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 2, "heads": 4, "ffn": 48}
    config = VlmConfig(image_size=32, patch=8, shuffle=2, vision=Tower(**tower), text=Tower(**tower, kv_heads=2))
    build_model(config, seed=7).save_pretrained(folder / "vlm")
    build_processor(config).save_pretrained(folder / "vlm")
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    autoencoder = AutoencoderTiny(**widths, **blocks)
    autoencoder.register_to_config(latents_mean=[0.1] * 4, latents_std=[0.5] * 4)
    autoencoder.save_pretrained(folder / "ae")
    return {"vlm": f"path:{folder / 'vlm'}", "autoencoder": f"path:{folder / 'ae'}"}


TREE = {
    "name": "probe",
    "about": "every word of the vocabulary at the smallest size",
    "space": {"heads": 4, "kv_heads": 2, "head_dim": 8},
    "experts": {
        "und": {"kind": "pretrained", "frozen": True},
        "gen": {"kind": "decoder", "width": 24, "depth": 2, "ffn": 32},
        "act": {"kind": "decoder", "width": 16, "depth": 2, "ffn": 32, "time": "adaptive_norm"},
    },
    "streams": {
        "obs": {"expert": "und", "tokens": "prompt", "length": 16},
        "future": {"expert": "gen", "tokens": "queries", "length": 8, "block": 4},
        "state": {"expert": "act", "tokens": "state", "length": 1, "positions": "restart"},
        "action": {"expert": "act", "tokens": "actions", "length": 6, "block": 2},
    },
    "edges": {
        "obs": {"obs": "causal"},
        "future": {"obs": "full", "future": "full"},
        "state": {"state": "full"},
        "action": {"obs": "full", "future": "full", "state": "full", "action": "full"},
    },
    "heads": {
        "future": {"kind": "latent", "cameras": ["agentview", "wrist"], "image_size": 32, "patch": 2, "horizon": 4},
        "action": {"kind": "flow", "action_dim": 3},
    },
    "state_dim": 5,
    "cameras": ["agentview", "wrist"],
}


@pytest.fixture(scope="session")
def tiny_tree(tiny_weights: dict[str, str]) -> dict:
    """The probe spec as a YAML tree."""
    weights = {"experts": {"und": {"weights": tiny_weights["vlm"]}}, "heads": {"future": {"autoencoder": tiny_weights["autoencoder"]}}}
    return merge(TREE, weights)


@pytest.fixture
def make_spec(tiny_tree: dict):
    """Builds the probe spec with changes merged in."""
    return lambda **changes: parse(Spec, merge(tiny_tree, changes), "probe")

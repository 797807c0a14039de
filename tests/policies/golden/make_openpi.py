"""Makes ``openpi.json``: what openpi's own code answers with tiny random weights. Tests read that file; this one needs openpi itself.

It runs ``PI0Pytorch`` with its data transforms, its normalisation and its ``Policy``. Sizes that openpi writes as numbers are made
small from outside; its tokenizer's vocabulary, which has to be downloaded, is one token a byte. Packages for JAX training alone are
stood in for by empty ones. With openpi at COMMIT, transformers 4.53.2 with ``models_pytorch/transformers_replace`` copied over it,
jax, flax, einops and sentencepiece on PYTHONPATH:

    python tests/policies/golden/make_openpi.py <openpi's commit>
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

FILE = Path(__file__).with_name("openpi.json")
SEED = 20261123
WIDTH, EXPERT, HEADS, DIM, DEPTH = 32, 24, 8, 8, 3
TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
SIDE, CHUNK, VOCABULARY = 28, 5, 1000
_SMALL = {"action_dim": 10, "state": 8, "statistics": 8, "delta": False}
_ALOHA = {"action_dim": 16, "state": 14, "statistics": 16, "delta": True}
KINDS: dict[str, dict[str, Any]] = {
    "pi0": {"pi05": False, "words": 48, "discrete": False, "actions": 14, **_ALOHA},
    "pi05": {"pi05": True, "words": 120, "discrete": True, "actions": 8, **_SMALL},
    "pi05_plain": {"pi05": True, "words": 40, "discrete": False, "actions": 7, **_SMALL},
}
"""Name -> network and robot: Aloha without its joint flips and with deltas, DROID, LIBERO."""
STANDINS = ("flax.nnx", "flax.nnx.traversals", "flax.linen", "optax", "orbax", "orbax.checkpoint", "augmax", "numpydantic") + (
    *(f"openpi.models.{name}" for name in ("lora", "utils", "utils.fsq_tokenizer")),
    *(f"openpi.{name}" for name in ("shared.download", "shared.nnx_utils", "shared.normalize", "training", "training.sharding")),
)
"""Modules that are imported and not needed here."""
CASES: tuple[tuple[str, dict[str, tuple[int, int]]], ...] = (
    ("pick up the cube", {"base": (48, 64), "left": (31, 20), "right": (90, 40)}),
    (" put_the cup\non the plate\n", {"base": (SIDE, SIDE), "left": (29, 28), "right": (28, 29)}),
    ("close it", {"base": (50, 17), "left": (SIDE, SIDE)}),
    ("push " + "the very " * 12 + "long thing", {"base": (33, 57), "left": (64, 64), "right": (7, 9)}),
)
"""Instruction and the sizes (height, width) of the pictures that there are."""


def draw(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights: a function of their place among the sorted names."""
    out = {}
    for number, name in enumerate(sorted(shapes)):
        rng = np.random.default_rng([SEED, number])
        std = 0.02 if "embed_tokens" in name or "paligemma.lm_head" in name else 0.2
        out[name] = (std * rng.standard_normal(shapes[name])).astype(np.float32)
    return out


def case(kind: str, number: int) -> tuple[str, np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Instruction, state (S,), pictures (H, W, 3) and noise (C, A) of a case."""
    config = KINDS[kind]
    rng = np.random.default_rng([SEED, 1000, number])
    text, sizes = CASES[number]
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in sizes.items()}
    state = rng.uniform(-1, 1, config["state"]).astype(np.float32)
    known = statistics(kind)["state"]
    state[0], state[1], state[2] = known["q01"][0], 9.0, known["mean"][2]  # at an end of its range, beyond one, where it always is
    return text, state, images, rng.standard_normal((CHUNK, config["action_dim"])).astype(np.float32)


def statistics(kind: str) -> dict[str, dict[str, list[float]]]:
    """``norm_stats`` of a kind; the third dimension does not vary."""
    rng = np.random.default_rng([SEED, 2000])
    size = KINDS[kind]["statistics"]
    found = {}
    for key in ("state", "actions"):
        mean, std = rng.uniform(-1, 1, size), rng.uniform(0.1, 2, size)
        std[2] = 0
        found[key] = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2.5 * std}
    return {key: {name: [float(np.float32(x)) for x in row] for name, row in rows.items()} for key, rows in found.items()}


class Bytes:
    """openpi's sentencepiece processor, with one token a byte."""

    def __init__(self) -> None:
        from tokenizers import pre_tokenizers

        special = 7
        self.ids = {letter: special + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        self.split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        letters = "".join(part for part, _ in self.split.pre_tokenize_str(text))
        return [2] * add_bos + [self.ids[letter] for letter in letters]


def network(config: dict[str, Any]) -> Any:
    """openpi's network at our sizes."""
    import openpi.models.gemma as gemma
    import openpi.models_pytorch.gemma_pytorch as towers
    import torch
    from openpi.models_pytorch import pi0_pytorch
    from transformers import GemmaConfig, PaliGemmaConfig

    variants = {"gemma_2b": (WIDTH, DEPTH, 40), "gemma_300m": (EXPERT, DEPTH, 36)}
    gemma.get_config = lambda name: gemma.Config(*variants[name], HEADS, 1, DIM)
    vision = {**TOWER, "image_size": SIDE, "projection_dim": WIDTH, "model_type": "siglip_vision_model", "vision_use_head": False}
    paligemma = lambda: PaliGemmaConfig(text_config=GemmaConfig().to_dict(), vision_config=vision)  # noqa: E731
    towers.CONFIG_MAPPING = {"paligemma": paligemma, "gemma": GemmaConfig}
    sizes = {"action_dim": config["action_dim"], "action_horizon": CHUNK, "max_token_len": config["words"], "dtype": "float32"}
    variant = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "pytorch_compile_mode": None}
    torch.manual_seed(0)
    made = pi0_pytorch.PI0Pytorch(SimpleNamespace(pi05=config["pi05"], **sizes, **variant))
    torch.set_float32_matmul_precision("highest")
    body, expert = made.paligemma_with_expert.paligemma, made.paligemma_with_expert.gemma_expert
    body.config.projection_dim = body.config.vision_config.projection_dim = WIDTH  # written there as 2048
    body.model.multi_modal_projector.linear = torch.nn.Linear(TOWER["hidden_size"], WIDTH)
    body.resize_token_embeddings(VOCABULARY)
    expert.lm_head = torch.nn.Linear(EXPERT, VOCABULARY, bias=False)
    return made.eval()


def full_size(pi05: bool) -> dict[str, list[Any]]:
    """Names and shapes of the published network, built without memory: name with * for layers -> how many there are, shape."""
    import torch
    from openpi.models_pytorch import pi0_pytorch

    sizes = {"action_dim": 32, "action_horizon": 50, "dtype": "float32", "pytorch_compile_mode": None}
    variant = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    with torch.device("meta"):
        made = pi0_pytorch.PI0Pytorch(SimpleNamespace(pi05=pi05, **sizes, **variant))
    found: dict[str, list[Any]] = {}
    for name, tensor in made.state_dict().items():
        found.setdefault(re.sub(r"layers\.\d+", "layers.*", name), [0, list(tensor.shape)])[0] += 1
    return found


def policy(kind: str, made: Any) -> Any:
    """openpi's ``Policy``: transforms in the order of its ``create_trained_policy``."""
    import openpi.models.tokenizer as tokenizing
    from openpi import transforms
    from openpi.models.model import ModelType
    from openpi.policies import aloha_policy, droid_policy, libero_policy
    from openpi.policies import policy as policies

    config = KINDS[kind]
    tokenizer = tokenizing.PaligemmaTokenizer.__new__(tokenizing.PaligemmaTokenizer)
    tokenizer._max_len, tokenizer._tokenizer = config["words"], Bytes()
    model_type = ModelType.PI05 if config["pi05"] else ModelType.PI0
    inputs, outputs = {
        "pi0": lambda: (aloha_policy.AlohaInputs(adapt_to_pi=False), aloha_policy.AlohaOutputs(adapt_to_pi=False)),
        "pi05": lambda: (droid_policy.DroidInputs(model_type), droid_policy.DroidOutputs()),
        "pi05_plain": lambda: (libero_policy.LiberoInputs(model_type), libero_policy.LiberoOutputs()),
    }[kind]()
    mask = transforms.make_bool_mask(6, -1, 6, -1) if config["delta"] else None
    stats = {key: SimpleNamespace(**{name: np.array(row) for name, row in rows.items()}) for key, rows in statistics(kind).items()}
    return policies.Policy(
        made,
        transforms=[
            inputs,
            transforms.DeltaActions(mask),
            transforms.Normalize(stats, use_quantiles=config["pi05"]),
            transforms.ResizeImages(SIDE, SIDE),
            transforms.TokenizePrompt(tokenizer, discrete_state_input=config["discrete"]),
            transforms.PadStatesAndActions(config["action_dim"]),
        ],
        output_transforms=[transforms.Unnormalize(stats, use_quantiles=config["pi05"]), transforms.AbsoluteActions(mask), outputs],
        is_pytorch=True,
    )


def observed(kind: str, text: str, state: np.ndarray, images: dict[str, np.ndarray]) -> dict[str, Any]:
    """An observation under the names of the robot's own transform."""
    if kind == "pi0":
        names = {"base": "cam_high", "left": "cam_left_wrist", "right": "cam_right_wrist"}
        return {"state": state, "images": {names[n]: i.transpose(2, 0, 1) for n, i in images.items()}, "prompt": text}
    if kind == "pi05":
        views = {"observation/exterior_image_1_left": images["base"], "observation/wrist_image_left": images["left"]}
        return views | {"observation/joint_position": state[:7], "observation/gripper_position": state[7:], "prompt": text}
    views = {"observation/image": images["base"], "observation/wrist_image": images["left"]}
    return views | {"observation/state": state, "prompt": text}


def main(commit: str) -> None:
    for name in STANDINS:
        sys.modules[name] = MagicMock()
    sys.modules["openpi.shared.array_typing"] = MagicMock(typecheck=lambda function: function)  # shapes are not checked
    import flax
    import torch
    from safetensors.torch import load_file, load_model, save_file, save_model

    flax.nnx = sys.modules["flax.nnx"]
    flax.nnx.Module = type("Module", (), {})
    import openpi.models_pytorch.preprocessing_pytorch as preprocessing

    preprocessing.preprocess_observation_pytorch.__kwdefaults__["image_resolution"] = (SIDE, SIDE)
    full = {"pi0": full_size(False), "pi05": full_size(True)}  # before sizes are made small
    kinds = {}
    for kind, config in KINDS.items():
        made = network(config)
        scratch = Path(tempfile.mkdtemp()) / "model.safetensors"
        save_model(made, scratch)
        shapes = {name: list(tensor.shape) for name, tensor in load_file(scratch).items()}
        save_file({name: torch.from_numpy(x) for name, x in draw(shapes).items()}, scratch)
        load_model(made, scratch)
        scratch.unlink()
        ask = policy(kind, made)
        answers = []
        for number in range(len(CASES)):
            text, state, images, noise = case(kind, number)
            actions = ask.infer(observed(kind, text, state.copy(), images), noise=noise)["actions"]
            answers.append([[float(np.float32(x)) for x in row] for row in actions])
        kinds[kind] = {"tensors": shapes, "answers": answers}
    about = {"source": "Physical-Intelligence/openpi", "commit": commit, "licence": "Apache-2.0"}
    about |= {"command": f"python tests/policies/golden/make_openpi.py {commit}", "seed": SEED}
    FILE.write_text(json.dumps(about | {"full": full, "kinds": kinds}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Makes ``groot15.json``: what NVIDIA's own code of GR00T N1.5 answers with tiny random weights. Tests read it; this one needs theirs.

It runs ``Gr00tPolicy`` on a folder that ``save_pretrained`` wrote, with their transforms and their Eagle with its chat template; the
tokenizer is one token a byte. Not loaded: their rotations (pytorch3d), RADIO (timm) and films (decord), which no robot here needs. In
``tests/policies``, with ``gr00t`` (of NVIDIA/Isaac-GR00T, or of the history of NVIDIA-Medtech/GR00T-H), transformers 4.51.3,
albumentations 2.0.8, numpydantic and dm-tree on PYTHONPATH:

    python -m golden.make_groot15 <commit>
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from .make_groot import HORIZON, NUMBERS, SEED, blocks, dit, draw, tokenizer
from .make_groot16 import SPECIAL

FILE = Path(__file__).with_name("groot15.json")
VLM = "lerobot/eagle2hg-processor-groot-n1p5"
SIDE, REGISTERS, RATE = 56, 3, 20.0
TEXTS = ("Pick up the cube!", "put it, gently, on the plate", "close")
KINDS: dict[str, dict[str, Any]] = {
    "new_embodiment": {
        "size": (50, 110),
        "state": {"hand": 2, "arm": 3, "turn": 3},
        "action": {"arm": 3, "grip": 1},
        "config": {
            "cameras": ["front", "wrist"],
            "state": {"hand": "min_max", "arm": "mean_std", "turn": "none"},
            "action": {"arm": "mean_std", "grip": "min_max"},
            "chunk": 8,
        },
    },
    "agibot_genie1": {
        "size": (64, 47),
        "state": {"x": 3, "gripper": 1},
        "action": {"x": 3, "wheels": 2, "gripper": 1},
        "config": {
            "cameras": ["top"],
            "state": {"x": "q99", "gripper": "q99"},
            "action": {"x": "q99", "wheels": "none", "gripper": "min_max"},
            "chunk": 6,
        },
    },
    "gr1": {
        "size": (40, 60),
        "state": {"arm": 3, "waist": 2, "hand": 2},
        "action": {"arm": 3, "hand": 2},
        "config": {
            "cameras": ["ego", "left", "right"],
            "state": {"arm": "sin_cos", "waist": "q99", "hand": "sin_cos"},
            "action": {"arm": "min_max", "hand": "min_max"},
            "chunk": 8,
        },
    },
}
"""Tag of a robot -> height and width of its pictures, its numbers, and what its transforms do in our words. The second plans fewer steps
than the network was saved with."""


def case(kind: dict[str, Any], number: int) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Instruction, state by key, pictures (H, W, 3) and noise (T, A) of a robot's case; a number of the state is far beyond its range."""
    rng = np.random.default_rng([SEED, 1500, number])
    rows, columns = kind["size"]
    images = {name: rng.integers(0, 256, (rows, columns, 3), np.uint8) for name in kind["config"]["cameras"]}
    state = {key: rng.uniform(-1, 1, size).astype(np.float32) for key, size in kind["state"].items()}
    next(iter(state.values()))[0] = 9.0
    return TEXTS[number], state, images, (0.4 * rng.standard_normal((kind["config"]["chunk"], NUMBERS))).astype(np.float32)


def metadata(tag: str) -> dict[str, Any]:
    """``experiment_cfg/metadata.json``; the last number of each group of two or more does not vary."""
    kind, rng = KINDS[tag], np.random.default_rng([SEED, 2500])

    def rows(size: int) -> dict[str, list[float]]:
        mean, std = rng.uniform(-1, 1, size), rng.uniform(0.1, 1, size)
        std[1:] *= np.arange(size)[1:] < size - 1
        found = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3 * std, "q01": mean - 2 * std, "q99": mean + 2.5 * std}
        return {name: np.float32(row).astype(float).tolist() for name, row in found.items()}

    numbers = {"absolute": True, "rotation_type": None, "continuous": True}
    video = {"resolution": list(kind["size"][::-1]), "channels": 3, "fps": RATE}
    parts = {part: kind[part].items() for part in ("state", "action")}
    modalities: dict[str, Any] = {part: {key: numbers | {"shape": [size]} for key, size in groups} for part, groups in parts.items()}
    statistics = {part: {key: rows(size) for key, size in groups} for part, groups in parts.items()}
    modalities["video"] = dict.fromkeys(kind["config"]["cameras"], video)
    return {tag: {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}}


def stub(name: str, **parts: Any) -> None:
    made = sys.modules[name] = ModuleType(name)
    for key, value in parts.items():
        setattr(made, key, value)


def network(tiny: bool) -> Any:
    """Theirs, of a tiny size or as released."""
    import gr00t.model.backbone.eagle_backbone as backbones
    import gr00t.model.gr00t_n1 as networks
    from gr00t.model.backbone.eagle2_hg_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
    from gr00t.model.backbone.eagle2_hg_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
    from transformers import Qwen3ForCausalLM, SiglipVisionModel

    tree = json.loads(Path(backbones.DEFAULT_EAGLE_PATH, "config.json").read_text())
    if tiny:
        own = json.loads((Path(__file__).parents[3] / "vla/assets/architectures/siglip_qwen3_tiny/config.json").read_text())
        own["text_config"]["rope_theta"] = own["text_config"].pop("rope_parameters")["rope_theta"]
        for part in ("vision_config", "text_config"):
            tree[part] |= {key: value for key, value in own[part].items() if key != "vision_use_head"}
        tree |= {"image_token_index": own["image_token_index"], "force_image_size": SIDE}
    config = Eagle2_5_VLConfig(**tree)
    config._attn_implementation_internal = config.vision_config._attn_implementation_internal = "eager"
    config.text_config._attn_implementation_internal = "sdpa"

    def made(*_: Any, **__: Any) -> Any:
        parts = {"vision_model": SiglipVisionModel(config.vision_config), "language_model": Qwen3ForCausalLM(config.text_config)}
        return Eagle2_5_VLForConditionalGeneration(config, **parts)

    backbones.AutoConfig = SimpleNamespace(from_pretrained=lambda *_, **__: config)
    backbones.AutoModel = SimpleNamespace(from_config=made)
    numbers, horizon = (NUMBERS, HORIZON) if tiny else (32, 16)
    width, inner = (32, 16) if tiny else (1536, 1024)
    stack = dit(4, 8, 4, inner) if tiny else dit(32, 48, 16, inner)
    words = tree["text_config"]["hidden_size"]
    head = {
        "diffusion_model_cfg": stack | {"cross_attention_dim": words},
        "vl_self_attention_cfg": blocks(4, 8, 2) if tiny else blocks(32, 64, 4),
        "action_dim": numbers,
        "action_horizon": horizon,
        "max_action_dim": numbers,
        "max_state_dim": numbers if tiny else 64,
        "hidden_size": inner,
        "input_embedding_dim": width,
        "backbone_embedding_dim": words,
        "num_inference_timesteps": 4,
        "num_target_vision_tokens": REGISTERS if tiny else 32,
        "max_seq_len": 20 if tiny else 1024,
    }
    seen = {"select_layer": 2 if tiny else 12, "project_to_dim": None}
    config15 = networks.GR00T_N1_5_Config(backbone_cfg=seen, action_head_cfg=head, action_horizon=horizon, action_dim=numbers)
    return networks.GR00T_N1_5(config15, local_model_path="")


def full_size() -> dict[str, list[Any]]:
    """Names and shapes of the released network, built without memory: name with * for layers -> how many there are, shape."""
    import gr00t.model.action_head.flow_matching_action_head as heads
    import torch
    from transformers.modeling_utils import no_init_weights

    beta, heads.Beta = heads.Beta, lambda *_: None
    with torch.device("meta"), no_init_weights():
        made = network(tiny=False)
    heads.Beta = beta
    found: dict[str, list[Any]] = {}
    for name, tensor in made.state_dict().items():
        pattern = re.sub(r"(layers|blocks)\.\d+", r"\1.*", name)
        pattern = name if [*tensor.shape] != found.get(pattern, [0, [*tensor.shape]])[1] else pattern
        found.setdefault(pattern, [0, list(tensor.shape)])[0] += 1
    return found


def policy(tag: str, folder: Path) -> Any:
    """NVIDIA's, for a robot: its transforms are those of their data configs, with pictures of our tiny size."""
    import gr00t.model.policy as policies
    import torch
    from gr00t.data.dataset import ModalityConfig
    from gr00t.data.transform import base, concat, state_action, video
    from gr00t.model.backbone.eagle_backbone import DEFAULT_EAGLE_PATH
    from gr00t.model.transforms import GR00TTransform, build_eagle_processor
    from transformers import Qwen2TokenizerFast

    kind = KINDS[tag]["config"]
    keys = {"video": [f"video.{name}" for name in kind["cameras"]]} | {p: [f"{p}.{key}" for key in kind[p]] for p in ("state", "action")}
    eagle = build_eagle_processor(DEFAULT_EAGLE_PATH)
    marks = {"unk_token": None, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    eagle.tokenizer = Qwen2TokenizerFast(tokenizer_object=tokenizer(SPECIAL), **marks)
    eagle.tokens_per_tile, eagle.image_processor.size = (SIDE // 14) ** 2, {"height": SIDE, "width": SIDE}
    ways = {p: {f"{p}.{key}": way for key, way in kind[p].items() if way not in ("none", "sin_cos")} for p in ("state", "action")}
    transforms = [
        video.VideoToTensor(apply_to=keys["video"]),
        video.VideoCrop(apply_to=keys["video"], scale=0.95),
        video.VideoResize(apply_to=keys["video"], height=SIDE, width=SIDE, interpolation="linear"),
        video.VideoColorJitter(apply_to=keys["video"], brightness=0.3, contrast=0.4, saturation=0.5, hue=0.08),
        video.VideoToNumpy(apply_to=keys["video"]),
    ]
    for part in ("state", "action"):
        transforms += [
            state_action.StateActionToTensor(apply_to=keys[part]),
            state_action.StateActionTransform(apply_to=keys[part], normalization_modes=ways[part]),
        ]
    transforms.append(
        state_action.StateActionSinCosTransform(apply_to=[f"state.{k}" for k, way in kind["state"].items() if way == "sin_cos"])
    )
    orders = {f"{part}_concat_order": names for part, names in keys.items()}
    sizes = {"max_state_dim": NUMBERS, "max_action_dim": NUMBERS, "state_horizon": 1, "action_horizon": kind["chunk"]}
    transforms += [concat.ConcatTransform(**orders), GR00TTransform(eagle_processor=eagle, **sizes)]
    steps = {part: list(range(kind["chunk"])) if part == "action" else [0] for part in keys}
    policies.COMPUTE_DTYPE = torch.float32
    made = policies.Gr00tPolicy(
        model_path=str(folder),
        embodiment_tag=tag,
        modality_config={part: ModalityConfig(delta_indices=steps[part], modality_keys=names) for part, names in keys.items()},
        modality_transform=base.ComposedModalityTransform(transforms=transforms),
        device="cpu",
    )
    made.model.eval()  # a head made anew for fewer steps still drops channels out, as in training
    return made


def answer(tag: str, made: Any, number: int) -> list[list[float]]:
    """The chunk of a case, its groups side by side."""
    import torch

    text, state, images, noise = case(KINDS[tag], number)
    seen: dict[str, Any] = {f"video.{name}": image[None] for name, image in images.items()}
    seen |= {f"state.{key}": row[None] for key, row in state.items()} | {"annotation.human.task_description": np.array(text)}
    randn, torch.randn = torch.randn, lambda *_, **__: torch.from_numpy(noise)[None].clone()
    groups = made.get_action(seen)
    torch.randn = randn
    rows = np.concatenate([groups[f"action.{key}"] for key in KINDS[tag]["action"]], axis=-1)
    return [[float(np.float32(x)) for x in row] for row in rows]


def main(commit: str) -> None:
    stub("pytorch3d")
    stub("pytorch3d.transforms")
    sys.modules["pytorch3d"].transforms = sys.modules["pytorch3d.transforms"]  # type: ignore[attr-defined]
    stub("gr00t.model.backbone.eagle2_hg_model.radio_model", RADIOModel=None, RADIOConfig=None)
    import torch
    from safetensors.torch import save_file

    full = full_size()
    stub("decord")
    os.chdir(tempfile.mkdtemp())
    made = network(tiny=True).float().eval()
    folder = Path("saved").resolve()
    made.save_pretrained(folder)
    shapes = {name: list(tensor.shape) for name, tensor in made.state_dict().items() if not name.endswith("lm_head.weight")}
    drawn = {name: torch.from_numpy(x) for name, x in draw(shapes).items()}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "experiment_cfg").mkdir()
    answers = {}
    for tag in KINDS:
        (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata(tag)))
        robot = policy(tag, folder)
        loaded = robot.model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in drawn.items())
        answers[tag] = {i: answer(tag, robot, i) for i in range(len(TEXTS))}
    about = {"source": "NVIDIA/Isaac-GR00T, the last commit of N1.5", "commit": commit, "licence": "Apache-2.0", "seed": SEED}
    about |= {"command": f"python -m golden.make_groot15 {commit}", "config": json.loads((folder / "config.json").read_text())}
    about |= {"full": full, "tensors": shapes, "kinds": {tag: {"answers": found} for tag, found in answers.items()}}
    FILE.write_text(json.dumps(about, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

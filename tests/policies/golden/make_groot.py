"""Makes ``groot.json``: what NVIDIA's own code of GR00T N1.7 answers with tiny random weights. Tests read that file; this one needs theirs.

It runs ``Gr00tN1d7`` with ``Gr00tN1d7Processor``, whose tokenizer is one token a byte and whose chat template is ours, since theirs have
to be downloaded. With ``gr00t`` (of NVIDIA-Medtech/GR00T-H, the commit "GR00T N1.7 Release"), transformers 4.57.3, albumentations 2.0.8,
tyro and dm-tree on PYTHONPATH:

    python tests/policies/golden/make_groot.py <commit>
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("groot.json")
SEED = 20261123
SIDE, HORIZON, NUMBERS, ROBOTS = 64, 8, 12, 26
VLM = "Qwen/Qwen3-VL-tiny"
SPECIAL = {
    "<|im_start|>": 500,
    "<|im_end|>": 501,
    "<|vision_end|>": 508,
    "<|vision_start|>": 509,
    "<|video_pad|>": 510,
    "<|image_pad|>": 511,
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "libero_sim": {
        "state": {"x": 1, "rotation": 3, "gripper": 1},
        "action": {"x": 1, "rotation": 3, "gripper": 1},
        "relative": (),
        "chunk": 8,
        "processor": {
            "use_percentiles": True,
            "image_crop_size": [57, 57],
            "shortest_image_edge": None,
            "crop_fraction": None,
            "letter_box_transform": True,
        },  # fmt: skip
    },
    "new_embodiment": {
        "state": {"hand": 2, "arm": 3},
        "action": {"arm": 3, "grip": 1},
        "relative": ("arm",),
        "chunk": 6,
        "processor": {"use_percentiles": False, "use_relative_action": True, "shortest_image_edge": SIDE, "crop_fraction": 0.9},
    },
    "oxe_droid_relative_eef_relative_joint": {
        "state": {"grip": 1, "eef": 9},
        "action": {"eef": 9, "grip": 1},
        "relative": ("eef",),
        "chunk": 7,
        "processor": {"use_percentiles": True, "use_relative_action": True, "shortest_image_edge": SIDE, "crop_fraction": 0.9},
    },
}
"""Tag of a robot -> its numbers. The second has joints relative to the state, the third the hand's poses, each with statistics of
their own for every step."""
CAMERAS = ("front", "wrist")
CASES: tuple[tuple[str, tuple[tuple[int, int], tuple[int, int]]], ...] = (
    ("Pick up the cube!", ((64, 64), (64, 64))),
    ("put it, gently, on the plate", ((128, 128), (70, 70))),
    ("close", ((96, 96), (33, 33))),
    ("open the 2nd drawer", ((48, 100), (90, 40))),
)
"""Instruction and (height, width) of each picture; only the first robot takes the last, whose pictures are not
square: this commit pads them whatever its processor says."""


def draw(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights: a function of their place among the sorted names."""
    out = {}
    for number, name in enumerate(sorted(shapes)):
        rng = np.random.default_rng([SEED, number])
        std = 0.05 if "action_decoder" in name else 0.2  # so that few actions are beyond their range
        out[name] = (std * rng.standard_normal(shapes[name])).astype(np.float32)
    return out


def case(kind: dict[str, Any], number: int) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Instruction, state by key, pictures (H, W, 3) and noise (T, A) of a robot's case; a number of the state is far beyond its range."""
    rng = np.random.default_rng([SEED, 1000, number])
    text, sizes = CASES[number]
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in zip(CAMERAS, sizes, strict=True)}
    state = {key: rng.uniform(-1, 1, size).astype(np.float32) for key, size in kind["state"].items()}
    next(iter(state.values()))[0] = 9.0
    return text, state, images, (0.4 * rng.standard_normal((HORIZON, NUMBERS))).astype(np.float32)


def statistics(kind: dict[str, Any]) -> dict[str, Any]:
    """Of a robot; the last number of its first state does not vary, nor does the last of its actions."""
    rng = np.random.default_rng([SEED, 2000])

    def rows(*shape: int) -> dict[str, Any]:
        mean, std = rng.uniform(-1, 1, shape), rng.uniform(0.1, 1, shape)
        found = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3 * std, "q01": mean - 2 * std, "q99": mean + 2.5 * std}
        return {name: np.float32(row) for name, row in found.items()}

    found = {part: {key: rows(size) for key, size in kind[part].items()} for part in ("state", "action")}
    for same in (next(iter(found["state"].values())), list(found["action"].values())[-1]):
        for name in ("max", "q99"):
            same[name][-1] = same[{"max": "min", "q99": "q01"}[name]][-1]
    found["relative_action"] = {key: rows(kind["chunk"], kind["action"][key]) for key in kind["relative"]}
    return {part: {k: {n: r.tolist() for n, r in v.items()} for k, v in groups.items()} for part, groups in found.items() if groups}


def tokenizer(special: dict[str, int] = SPECIAL) -> Any:
    """One token a byte, and ``special`` marks: Qwen's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    free = {f"<unused{i}>": i for i in range(len(letters), 512) if i not in special.values()}
    made = Tokenizer(models.BPE(vocab=letters | special | free, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    return made


def vlm_folder(folder: Path) -> None:
    """A Qwen3-VL of our tiny architecture with its processor, as transformers saves them."""
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLImageProcessorFast,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**architecture("qwen3_vl_tiny"))).save_pretrained(folder)
    words = Qwen2TokenizerFast(tokenizer_object=tokenizer(), unk_token=None, eos_token="<|im_end|>", pad_token="<|im_end|>")
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels = Qwen2VLImageProcessorFast(**half, size={"shortest_edge": 32 * 32, "longest_edge": 10**6})
    Qwen3VLProcessor(pixels, words, Qwen3VLVideoProcessor(), chat_template=CHAT).save_pretrained(folder)


def architecture(name: str) -> dict[str, Any]:
    """A configuration that is in the package, in the words of transformers 4."""
    root = Path(__file__).parents[3] / "vla" / "assets" / "architectures"
    config = json.loads((root / name / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return config


def network_config(**changes: Any) -> Any:
    """A configuration of the network; what it leaves out is theirs."""
    from gr00t.configs.model.gr00t_n1d7 import Gr00tN1d7Config

    plain = {"load_bf16": False, "use_flash_attention": False, "model_dtype": "float32"}
    return Gr00tN1d7Config(**plain, **changes)


def blocks(heads: int, head_dim: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers,
        "positional_embeddings": None, "dropout": 0.2, "final_dropout": True,
    }  # fmt: skip


def dit(heads: int, head_dim: int, layers: int, out: int) -> dict[str, Any]:
    return blocks(heads, head_dim, layers) | {"norm_type": "ada_norm", "output_dim": out, "interleave_self_attention": True}


def full_size() -> dict[str, list[Any]]:
    """Names and shapes of the released network (layers as in lerobot's GR00T_N1_7_DEFAULTS), built without memory: name with * for
    layers -> how many there are, shape."""
    import gr00t.model.modules.qwen3_backbone as towers
    import torch
    from gr00t.model.gr00t_n1d7 import gr00t_n1d7 as networks
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = network_config(select_layer=16, diffusion_model_cfg=dit(32, 48, 32, 1024), vl_self_attention_cfg=blocks(32, 64, 4))
    theirs = towers.Qwen3VLForConditionalGeneration
    sketched = lambda *_, **__: Qwen3VLForConditionalGeneration(Qwen3VLConfig(**architecture("qwen3_vl_2b")))  # noqa: E731
    towers.Qwen3VLForConditionalGeneration = type("Sketch", (), {"from_pretrained": staticmethod(sketched)})
    with torch.device("meta"):
        made = torch.nn.Module()
        made.backbone = towers.Qwen3Backbone("Qwen/Qwen3-VL", select_layer=16)
        beta, networks.Beta = networks.Beta, lambda *_: None
        made.action_head = networks.Gr00tN1d7ActionHead(config)
    networks.Beta, towers.Qwen3VLForConditionalGeneration = beta, theirs
    found: dict[str, list[Any]] = {}
    for name, tensor in made.state_dict().items():
        pattern = re.sub(r"(layers|blocks|deepstack_merger_list)\.\d+", r"\1.*", name)
        pattern = name if [*tensor.shape] != found.get(pattern, [0, [*tensor.shape]])[1] else pattern
        found.setdefault(pattern, [0, list(tensor.shape)])[0] += 1
    return found


def processor(tag: str) -> Any:
    """NVIDIA's, for a robot."""
    from gr00t.data.types import ModalityConfig
    from gr00t.model.gr00t_n1d7.processing_gr00t_n1d7 import Gr00tN1d7Processor

    kind = KINDS[tag]
    meant = {"eef": {"type": "EEF", "format": "XYZ_ROT6D"}}
    plain = {"type": "NON_EEF", "format": "DEFAULT"}
    rep = [{"rep": "RELATIVE" if key in kind["relative"] else "ABSOLUTE"} | meant.get(key, plain) for key in kind["action"]]
    parts = {
        "video": ModalityConfig(delta_indices=[0], modality_keys=list(CAMERAS)),
        "state": ModalityConfig(delta_indices=[0], modality_keys=list(kind["state"])),
        "action": ModalityConfig(delta_indices=list(range(kind["chunk"])), modality_keys=list(kind["action"]), action_configs=rep),
        "language": ModalityConfig(delta_indices=[0], modality_keys=["annotation.human.task_description"]),
    }
    sizes = {"max_state_dim": NUMBERS, "max_action_dim": NUMBERS, "max_action_horizon": HORIZON, "image_target_size": [SIDE, SIDE]}
    more = {"statistics": {tag: statistics(kind)}, "model_name": VLM, "use_albumentations": True, "formalize_language": True}
    made = Gr00tN1d7Processor({tag: parts}, **sizes, **more, **kind["processor"])
    made.eval()
    return made


def answer(tag: str, network: Any, process: Any, number: int) -> list[list[float]]:
    """The chunk of a case, its groups side by side."""
    import torch
    from gr00t.data.embodiment_tags import EmbodimentTag
    from gr00t.data.types import VLAStepData

    text, state, images, noise = case(KINDS[tag], number)
    states, robot = {key: row[None] for key, row in state.items()}, EmbodimentTag(tag)
    step = VLAStepData(images={n: [i] for n, i in images.items()}, states=states, actions={}, text=text, embodiment=robot)
    inputs = process.collator([process([{"content": step}])])["inputs"]
    randn, torch.randn = torch.randn, lambda *_, **__: torch.from_numpy(noise)[None].clone()
    found = network.get_action(inputs)["action_pred"].numpy()
    torch.randn = randn
    groups = process.decode_action(found, robot, state={key: row[None] for key, row in states.items()})
    return [[float(np.float32(x)) for x in row] for row in np.concatenate([groups[key][0] for key in KINDS[tag]["action"]], axis=-1)]


def main(commit: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    full = full_size()
    os.chdir(tempfile.mkdtemp())
    vlm_folder(Path(VLM))
    from gr00t.model.gr00t_n1d7.gr00t_n1d7 import Gr00tN1d7

    sizes = {"max_state_dim": NUMBERS, "max_action_dim": NUMBERS, "action_horizon": HORIZON, "hidden_size": 16, "max_seq_len": 20}
    width = {"input_embedding_dim": 32, "backbone_embedding_dim": 32, "max_num_embodiments": ROBOTS, "select_layer": 2}
    stacks = {"diffusion_model_cfg": dit(4, 8, 4, 16), "vl_self_attention_cfg": blocks(4, 8, 2)}
    network = Gr00tN1d7(network_config(model_name=VLM, **sizes, **width, **stacks)).float().eval()
    network.save_pretrained("saved")
    shapes = {name: list(tensor.shape) for name, tensor in load_file("saved/model.safetensors").items()}
    drawn = {name: torch.from_numpy(x) for name, x in draw(shapes).items()}
    save_file(drawn, "saved/model.safetensors")
    missing, extra = network.load_state_dict(drawn, strict=False)
    assert not extra and all("lm_head" in name for name in missing), (missing, extra)
    kinds = {}
    for tag in KINDS:
        process = processor(tag)
        process.save_pretrained(f"robot-{tag}")
        files = {name: json.loads(Path(f"robot-{tag}", f"{name}.json").read_text()) for name in ("processor_config", "embodiment_id")}
        cases = [i for i, (_, sizes) in enumerate(CASES) if tag == "libero_sim" or all(y == x for y, x in sizes)]
        kinds[tag] = {"files": files, "answers": {i: answer(tag, network, process, i) for i in cases}}
    about = {"source": "NVIDIA-Medtech/GR00T-H, commit 'GR00T N1.7 Release'", "commit": commit, "licence": "Apache-2.0", "seed": SEED}
    about |= {
        "command": f"python tests/policies/golden/make_groot.py {commit}",
        "config": json.loads(Path("saved/config.json").read_text()),
    }
    FILE.write_text(json.dumps(about | {"full": full, "tensors": shapes, "kinds": kinds}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Makes ``groot16.json``: what NVIDIA's own code of GR00T N1.6 answers with tiny random weights. Tests read it; this one needs theirs.

It runs ``Gr00tN1d6`` with ``Gr00tN1d6Processor`` and their Eagle with its chat template; the tokenizer is one token a byte. Flash
attention, which needs a GPU, is computed by torch. In ``tests/policies``, with ``gr00t`` (of NVIDIA-Medtech/GR00T-H, the commit "GR00T
N1.6 Release"), transformers 4.51.3, albumentations 2.0.8, tyro and dm-tree on PYTHONPATH:

    python -m golden.make_groot16 <commit>
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

from .make_groot import CAMERAS, CASES, HORIZON, NUMBERS, SEED, SIDE, case, dit, draw, statistics, tokenizer
from .make_groot import KINDS as KINDS17

FILE = Path(__file__).with_name("groot16.json")
ROBOTS = 26
VLM = "nvidia/Eagle-Block2A-2B-v2"
SPECIAL = {"<|im_start|>": 500, "<|im_end|>": 501, "<img>": 502, "</img>": 503, "<IMG_CONTEXT>": 511}
EDGE = {"image_target_size": [SIDE, SIDE], "crop_fraction": 0.9}
KINDS: dict[str, dict[str, Any]] = {
    "libero_panda": KINDS17["libero_sim"]
    | {
        "processor": {
            "use_percentiles": True,
            "image_target_size": [SIDE, SIDE],
            "image_crop_size": [57, 57],
            "shortest_image_edge": None,
            "crop_fraction": None,
        }
    },
    "new_embodiment": KINDS17["new_embodiment"] | {"processor": EDGE | {"use_relative_action": True, "shortest_image_edge": 84}},
    "gr1": {
        "state": {"arm": 3, "waist": 2, "hand": 2},
        "action": {"arm": 3, "hand": 2},
        "relative": (),
        "turned": ["arm"],
        "by_deviation": ["hand"],
        "chunk": 8,
        "processor": EDGE | {"use_percentiles": True, "apply_sincos_state_encoding": True, "shortest_image_edge": 84},
    },
    "robocasa_panda_omron": KINDS17["oxe_droid_relative_eef_relative_joint"]
    | {"processor": EDGE | {"use_percentiles": True, "use_relative_action": True, "shortest_image_edge": SIDE}},
}
"""Tag of a robot -> its numbers. Pictures of 64 become 56 before the network, those of 84 are a multiple of 28."""
SQUARE = [number for number, (_, sizes) in enumerate(CASES) if all(rows == columns for rows, columns in sizes)]


def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, softmax_scale: float, **_: Any) -> Any:
    """Flash attention within each run of tokens (T, N, H), by torch."""
    import torch

    out = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        parts = [part[start:end].transpose(0, 1)[None] for part in (q, k, v)]
        out.append(torch.nn.functional.scaled_dot_product_attention(*parts, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(out)


def folder() -> Path:
    """Their Eagle: code, configuration and chat template."""
    import gr00t.model.modules as modules

    return Path(modules.__path__[0]) / VLM


def eagle(name: str) -> Any:
    """A class of their Eagle."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    sys.modules.setdefault("lmdb", ModuleType("lmdb"))  # imported for data sets alone
    return get_class_from_dynamic_module(name, str(folder()))


def network(tiny: bool, **changes: Any) -> Any:
    """Theirs, of a tiny size or as released."""
    import gr00t.model.gr00t_n1d6.gr00t_n1d6 as networks
    import gr00t.model.modules.eagle_backbone as backbones
    from transformers import Qwen3ForCausalLM
    from transformers.modeling_utils import no_init_weights

    tree = json.loads((folder() / "config.json").read_text())
    if tiny:
        own = json.loads((Path(__file__).parents[3] / "vla/assets/architectures/siglip2_qwen3_tiny/config.json").read_text())
        own["text_config"]["rope_theta"] = own["text_config"].pop("rope_parameters")["rope_theta"]
        for part in ("vision_config", "text_config"):
            tree[part] |= {key: value for key, value in own[part].items() if key != "vision_use_head"}
        tree["image_token_index"] = own["image_token_id"]
    config = eagle("configuration_eagle3_vl.Eagle3_VLConfig")(**tree)
    config._attn_implementation_internal = "eager"
    config.text_config._attn_implementation_internal = "sdpa"
    config.vision_config._attn_implementation_internal = "eager"
    whole = eagle("modeling_eagle3_vl.Eagle3_VLForConditionalGeneration")
    towers = sys.modules[whole.__module__].Siglip2VisionModel

    def made(*_: Any, **__: Any) -> Any:
        vision, text = towers(config.vision_config), Qwen3ForCausalLM(config.text_config)
        made = whole(config, vision_model=vision, language_model=text)
        code = sys.modules[towers.__module__]
        code.flash_attn_varlen_func, code._flash_supports_window_size = varlen, False  # type: ignore[attr-defined]
        vision.config._attn_implementation_internal = "flash_attention_2"
        return made

    backbones.AutoConfig = SimpleNamespace(from_pretrained=lambda *_, **__: config)
    backbones.AutoModel = SimpleNamespace(from_config=made)
    with no_init_weights():
        return networks.Gr00tN1d6(networks.Gr00tN1d6Config(model_name=VLM, model_dtype="float32", **changes))


def full_size() -> dict[str, list[Any]]:
    """Names and shapes of the released network (128 numbers, 50 steps), built without memory: name with * for layers -> how many there
    are, shape."""
    import gr00t.model.gr00t_n1d6.gr00t_n1d6 as networks
    import torch

    beta, networks.Beta = networks.Beta, lambda *_: None
    with torch.device("meta"):
        made = network(tiny=False, max_state_dim=128, max_action_dim=128, action_horizon=50)
    networks.Beta = beta
    found: dict[str, list[Any]] = {}
    for name, tensor in made.state_dict().items():
        pattern = re.sub(r"(layers|blocks)\.\d+", r"\1.*", name)
        pattern = name if [*tensor.shape] != found.get(pattern, [0, [*tensor.shape]])[1] else pattern
        found.setdefault(pattern, [0, list(tensor.shape)])[0] += 1
    return found


def vlm_processor(*_: Any) -> Any:
    """Their Eagle's, with our tokenizer."""
    from transformers import Qwen2TokenizerFast

    def told(name: str) -> dict[str, Any]:
        return {k: v for k, v in json.loads((folder() / name).read_text()).items() if k not in ("auto_map", "processor_class")}

    pixels = eagle("image_processing_eagle3_vl_fast.Eagle3_VLImageProcessorFast")(**told("preprocessor_config.json"))
    words = Qwen2TokenizerFast(tokenizer_object=tokenizer(SPECIAL), unk_token=None, eos_token="<|im_end|>", pad_token="<|im_end|>")
    chat = told("chat_template.json")["chat_template"]
    return eagle("processing_eagle3_vl.Eagle3_VLProcessor")(pixels, words, chat_template=chat, **told("processor_config.json"))


def processor(tag: str) -> Any:
    """NVIDIA's, for a robot."""
    from gr00t.data.types import ModalityConfig
    from gr00t.model.gr00t_n1d6.processing_gr00t_n1d6 import Gr00tN1d6Processor

    kind = KINDS[tag]
    meant = {"eef": {"type": "EEF", "format": "XYZ_ROT6D"}}
    plain = {"type": "NON_EEF", "format": "DEFAULT"}
    rep = [{"rep": "RELATIVE" if key in kind["relative"] else "ABSOLUTE"} | meant.get(key, plain) for key in kind["action"]]
    parts = {
        "video": ModalityConfig(delta_indices=[0], modality_keys=list(CAMERAS)),
        "state": ModalityConfig(
            delta_indices=[0],
            modality_keys=list(kind["state"]),
            sin_cos_embedding_keys=kind.get("turned"),
            mean_std_embedding_keys=kind.get("by_deviation"),
        ),
        "action": ModalityConfig(delta_indices=list(range(kind["chunk"])), modality_keys=list(kind["action"]), action_configs=rep),
        "language": ModalityConfig(delta_indices=[0], modality_keys=["annotation.human.task_description"]),
    }
    sizes = {"max_state_dim": NUMBERS, "max_action_dim": NUMBERS, "max_action_horizon": HORIZON}
    more = {"statistics": {tag: statistics(kind)}, "model_name": VLM, "use_albumentations": True, "formalize_language": True}
    made = Gr00tN1d6Processor({tag: parts}, **sizes, **more, **kind["processor"])
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
    with torch.no_grad():
        found = network.get_action(inputs)["action_pred"].numpy()
    torch.randn = randn
    groups = process.decode_action(found, robot, state={key: row[None] for key, row in states.items()})
    return [[float(np.float32(x)) for x in row] for row in np.concatenate([groups[key][0] for key in KINDS[tag]["action"]], axis=-1)]


def main(commit: str) -> None:
    import gr00t.model.gr00t_n1d6.processing_gr00t_n1d6 as processing
    import torch

    processing.build_processor = vlm_processor
    full = full_size()
    os.chdir(tempfile.mkdtemp())
    sizes = {"max_state_dim": NUMBERS, "max_action_dim": NUMBERS, "action_horizon": HORIZON, "hidden_size": 16, "max_seq_len": 20}
    width = {"input_embedding_dim": 32, "backbone_embedding_dim": 32, "max_num_embodiments": ROBOTS, "select_layer": 2}
    made = network(tiny=True, diffusion_model_cfg=dit(4, 8, 4, 16), state_dropout_prob=0.1, **sizes, **width).float().eval()
    shapes = {name: list(tensor.shape) for name, tensor in made.state_dict().items()}
    made.load_state_dict({name: torch.from_numpy(x) for name, x in draw(shapes).items()})
    made.config.save_pretrained("saved")
    kinds = {}
    for tag in KINDS:
        process = processor(tag)
        process.save_pretrained(Path(f"robot-{tag}"))
        files = {name: json.loads(Path(f"robot-{tag}", f"{name}.json").read_text()) for name in ("processor_config", "embodiment_id")}
        kinds[tag] = {"files": files, "answers": {i: answer(tag, made, process, i) for i in SQUARE}}
    about = {"source": "NVIDIA-Medtech/GR00T-H, commit 'GR00T N1.6 Release'", "commit": commit, "licence": "Apache-2.0", "seed": SEED}
    about |= {"command": f"python -m golden.make_groot16 {commit}", "config": json.loads(Path("saved/config.json").read_text())}
    resize = sys.modules[eagle("processing_eagle3_vl.Eagle3_VLProcessor").__module__].smart_resize
    sides = {side: resize(side, side) for side in (30, 56, 70, 98, 126, 224, 256, 480, 512, 1800, 3000)}
    found = {"full": full, "tensors": shapes, "sides": sides, "kinds": kinds}
    FILE.write_text(json.dumps(about | found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

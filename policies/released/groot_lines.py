"""What the lines of Isaac GR00T differ in: what their ``config.json`` says, their VLM, its prompt, where a robot's conventions stand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from ...errors import UserError
from . import groot_processor, groot_transforms
from .groot_robot import Asked, Robot

MULTIPLE = 28  # of pixels, which N1.6 makes its pictures as high and as wide as


class Stack(BaseModel):
    """``diffusion_model_cfg`` or ``vl_self_attention_cfg``."""

    num_attention_heads: PositiveInt
    attention_head_dim: PositiveInt
    num_layers: PositiveInt
    positional_embeddings: None = None
    interleave_self_attention: bool = False

    @property
    def space(self) -> dict[str, int]:
        """In the words of a spec."""
        return {"heads": self.num_attention_heads, "kv_heads": self.num_attention_heads, "head_dim": self.attention_head_dim}


class Network(BaseModel):
    """What matters here of ``config.json``."""

    model_name: str
    diffusion_model_cfg: Stack
    vl_self_attention_cfg: Stack | None = None
    use_alternate_vl_dit: bool = True
    attend_text_every_n_blocks: PositiveInt = 2
    max_state_dim: PositiveInt
    max_action_dim: PositiveInt
    action_horizon: PositiveInt
    hidden_size: PositiveInt = 1024
    num_inference_timesteps: PositiveInt = 4


class Network17(Network):
    """What is left out has the value of ``Gr00tN1d7Config``."""

    model_name: str = "nvidia/Cosmos-Reason2-2B"
    vl_self_attention_cfg: Stack
    max_state_dim: PositiveInt = 132
    max_action_dim: PositiveInt = 132
    action_horizon: PositiveInt = 40


class Network15(Network):
    """Of two parts (``head15``). The VLM that they name is in no repository; its tokenizer is in the one that is named here."""

    model_name: str = "lerobot/eagle2hg-processor-groot-n1p5"
    vl_self_attention_cfg: Stack
    use_alternate_vl_dit: bool = False


class Network16(Network):
    """What is left out has the value of ``Gr00tN1d6Config``."""

    model_name: str = "nvidia/Eagle-Block2A-2B-v2"
    diffusion_model_cfg: Stack = Stack(num_attention_heads=32, attention_head_dim=48, num_layers=32, interleave_self_attention=True)
    max_state_dim: PositiveInt = 29
    max_action_dim: PositiveInt = 29
    action_horizon: PositiveInt = 16


def chat_prompt(words: Any, views: int, image: str) -> str:
    """What the tokenizer's chat makes of ``views`` pictures, each told by the token ``image``, and an instruction."""
    if not words.chat_template:
        raise UserError(f"the tokenizer {words.name_or_path} has no chat template; give the VLM's own folder: --tokenizer FOLDER")
    said = [{"type": "image"}] * views + [{"type": "text", "text": "{instruction}"}]
    prompt = str(words.apply_chat_template([{"role": "user", "content": said}], tokenize=False, add_generation_prompt=False))
    if prompt.count(image) != views or prompt.count("{instruction}") != 1:
        raise UserError(f"the chat template of {words.name_or_path} does not show {views} pictures and a text; give the VLM's own folder")
    return prompt


def eagle_prompt(words: Any, views: int, image: str) -> str:
    """What Eagle's processor makes of an instruction and ``views`` pictures after it; its chat template is not the tokenizer's."""
    return _eagle(words, "{instruction}" + _pictures(views, image), image)


def eagle25_prompt(words: Any, views: int, image: str) -> str:
    """What Eagle 2.5's makes of ``views`` pictures and an instruction after them, to be answered."""
    return _eagle(words, _pictures(views, image) + "{instruction}", image) + "<|im_start|>assistant\n"


def _pictures(views: int, image: str) -> str:
    return "".join(f"<image {view + 1}><img>{image}</img>" for view in range(views))


def _eagle(words: Any, said: str, image: str) -> str:
    if image != "<IMG_CONTEXT>":
        raise UserError(f"the tokenizer {words.name_or_path} has no <IMG_CONTEXT>; give Eagle's own folder: --tokenizer FOLDER")
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n"


def head15(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What N1.5's ``config.json`` says in two parts, as the others say it."""
    backbone, head = tree.get("backbone_cfg"), tree.get("action_head_cfg")
    if not isinstance(backbone, dict) or not isinstance(head, dict):
        raise UserError("config.json has no backbone_cfg and action_head_cfg, as that of a GR00T N1.5 has; copy the folder again")
    return backbone | head | {"max_action_dim": head.get("action_dim")}


@dataclass(frozen=True)
class Line:
    """What folders of one ``model_type`` have in common.

    Attributes:
        name: as NVIDIA calls it; spec: ours; network: what its ``config.json`` says; told: where in it.
        robot: (folder, what was asked, steps that the network plans) -> the robot.
        vlms: ``model_name`` in it -> the architecture in ``vla/assets/architectures``; layers: where those of its text transformer are.
        patch: (transformers config of the VLM) -> the side in pixels of an image token.
        prompt: (tokenizer, pictures, image token) -> the prompt.
    """

    name: str
    spec: str
    network: type[Network]
    robot: Callable[[Path, Asked, int], Robot]
    vlms: Mapping[str, str]
    layers: str
    patch: Callable[[Mapping[str, Any]], int]
    prompt: Callable[[Any, int, str], str]
    told: Callable[[dict[str, Any]], dict[str, Any]] = dict


LINES: Mapping[str, Line] = {
    "Gr00tN1d7": Line(
        name="N1.7",
        spec="groot_n17",
        network=Network17,
        robot=groot_processor.read_robot,
        vlms={"nvidia/Cosmos-Reason2-2B": "qwen3_vl_2b", "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl_2b"},
        layers="backbone.model.model.language_model.layers.",
        patch=lambda vlm: vlm["vision_config"]["patch_size"] * vlm["vision_config"]["spatial_merge_size"],
        prompt=chat_prompt,
    ),
    "Gr00tN1d6": Line(
        name="N1.6",
        spec="groot_n16",
        network=Network16,
        robot=partial(groot_processor.read_robot, multiple=MULTIPLE),
        vlms={"nvidia/Eagle-Block2A-2B-v2": "siglip2_qwen3_2b"},
        layers="backbone.model.language_model.model.layers.",
        patch=lambda vlm: vlm["vision_config"]["patch_size"] * vlm["downsample_factor"],
        prompt=eagle_prompt,
    ),
    "gr00t_n1_5": Line(
        name="N1.5",
        spec="groot_n15",
        network=Network15,
        robot=groot_transforms.read_robot,
        vlms={"lerobot/eagle2hg-processor-groot-n1p5": "siglip_qwen3_2b"},
        layers="backbone.eagle_model.language_model.model.layers.",
        patch=lambda vlm: vlm["vision_config"]["patch_size"],
        prompt=eagle25_prompt,
        told=head15,
    ),
}
"""``model_type`` in ``config.json`` -> its line."""

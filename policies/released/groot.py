"""A folder of NVIDIA's Isaac GR00T N1.6 or N1.7, for one of its robots.

``config.json``, ``model*.safetensors``    of ``gr00t/model/gr00t_n1d7/gr00t_n1d7.py`` or ``gr00t_n1d6/gr00t_n1d6.py``
``processor_config.json``                  its robots: cameras, state and action groups, what happens to pictures and words
``statistics.json``, ``embodiment_id.json``  of every robot; which of the network's encoders is its own

What happens to states, actions, pictures and words is that of ``processing_gr00t_n1d7.py``, ``image_augmentations.py`` (evaluation) and
``data/state_action/state_action_processor.py`` (NVIDIA-Medtech/GR00T-H, commit 23ace64f, "GR00T N1.7 Release", and for N1.6 commit
4e62473d, "GR00T N1.6 Release", with ``modules/nvidia/Eagle-Block2A-2B-v2``). What the two do differently is in ``LINES``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt
from torch import Tensor

from ...config import find, load_tree, merge, parse
from ...data import Camera, Contract
from ...errors import UserError
from ...vla import Spec
from ...vla.weights.groot import groot_weights
from ...vla.weights.references import resolve_weights
from ...vla.weights.released import Shapes
from ..inputs import Settings, Words
from .base import VLM, Release, load_tokenizer, read_json, read_origin, read_weights
from .groot_robot import Processor, check_robot, read_action, read_resize, read_state

WORDS = 128  # tokens of an instruction; GR00T has no limit
WAY_OUT = "give a folder that Isaac-GR00T N1.6 or N1.7 saved"
PLAIN: Mapping[str, Any] = {
    "state_history_length": 1,
    "add_pos_embed": True,
    "use_vlln": True,
    "num_timestep_buckets": 1000,
    "exclude_state": False,
    "use_tactile": False,
    "reproject_vision": False,
    "use_mean_std": False,
    "clip_outliers": True,
    "use_albumentations": True,
}
"""Keys of ``config.json`` and of the processor that can be converted with one value alone."""


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
    if image != "<IMG_CONTEXT>":
        raise UserError(f"the tokenizer {words.name_or_path} has no <IMG_CONTEXT>; give Eagle's own folder: --tokenizer FOLDER")
    shown = "".join(f"<image {view + 1}><img>{image}</img>" for view in range(views))
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{{instruction}}{shown}<|im_end|>\n"


@dataclass(frozen=True)
class Line:
    """What folders of one ``model_type`` have in common.

    Attributes:
        name: as NVIDIA calls it; spec: ours; network: what its ``config.json`` says.
        vlms: ``model_name`` in it -> the architecture in ``vla/assets/architectures``; layers: where those of its text transformer are.
        patch: (transformers config of the VLM) -> the side in pixels of an image token.
        multiple: the multiple of pixels that pictures are made as high and as wide as, where they are.
        prompt: (tokenizer, pictures, image token) -> the prompt.
    """

    name: str
    spec: str
    network: type[Network]
    vlms: Mapping[str, str]
    layers: str
    patch: Callable[[Mapping[str, Any]], int]
    multiple: int | None
    prompt: Callable[[Any, int, str], str]


LINES: Mapping[str, Line] = {
    "Gr00tN1d7": Line(
        name="N1.7",
        spec="groot_n17",
        network=Network17,
        vlms={"nvidia/Cosmos-Reason2-2B": "qwen3_vl_2b", "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl_2b"},
        layers="backbone.model.model.language_model.layers.",
        patch=lambda vlm: vlm["vision_config"]["patch_size"] * vlm["vision_config"]["spatial_merge_size"],
        multiple=None,
        prompt=chat_prompt,
    ),
    "Gr00tN1d6": Line(
        name="N1.6",
        spec="groot_n16",
        network=Network16,
        vlms={"nvidia/Eagle-Block2A-2B-v2": "siglip2_qwen3_2b"},
        layers="backbone.model.language_model.model.layers.",
        patch=lambda vlm: vlm["vision_config"]["patch_size"] * vlm["downsample_factor"],
        multiple=28,
        prompt=eagle_prompt,
    ),
}
"""``model_type`` in ``config.json`` -> its line."""


def wrote(source: Path) -> bool:
    """Whether the folder ``source`` is of a GR00T."""
    told = read_json(source / "config.json", WAY_OUT) if (source / "config.json").is_file() else {}
    return "gr00t" in f"{told.get('model_type')} {told.get('architectures')}".lower()


def read(source: Path, tokenizer: Path | None, embodiment: str | None) -> Release:
    """The policy in ``source`` for the robot ``embodiment``, a tag of the processor.

    Args:
        tokenizer: a folder with the VLM's tokenizer and chat template, where the local hub cache does not hold them.

    Raises:
        UserError: a GR00T of another line; no such robot; a file is missing or damaged; a robot's state or actions are treated in a way
            that a checkpoint has no words for.
    """
    tree = read_json(source / "config.json", WAY_OUT)
    line = LINES.get(str(tree.get("model_type")))
    if line is None:
        known = " and ".join(sorted(line.name for line in LINES.values()))
        why = "not N1.5, whose transforms are Python that its folder does not hold"
        raise UserError(f"{source} holds a '{tree.get('model_type')}'; of GR00T only {known} can be converted, {why}")
    network = parse(line.network, _plain(tree, source / "config.json"), source / "config.json")
    kwargs = read_json(source / "processor_config.json", WAY_OUT).get("processor_kwargs", {})
    processor = parse(Processor, _plain(kwargs, source / "processor_config.json"), source / "processor_config.json")
    statistics, ids = (read_json(source / f"{name}.json", WAY_OUT) for name in ("statistics", "embodiment_id"))
    tags = [tag for tag in processor.modality_configs if tag in statistics and tag in ids]
    if embodiment not in tags:
        raise UserError(f"{source} is of several robots; choose one by --embodiment TAG: {', '.join(tags) or 'none has statistics'}")
    robot, known = processor.modality_configs[embodiment], statistics[embodiment]
    check_robot(embodiment, robot, processor, network.action_horizon)
    if 1000 % network.num_inference_timesteps:
        raise UserError(f"{network.num_inference_timesteps} steps do not divide the 1000 flow times of the network; set a number that does")
    if not network.diffusion_model_cfg.interleave_self_attention:
        raise UserError(
            f"{source / 'config.json'} has no layers that read state and actions; only networks that have them can be converted"
        )
    state, felt, places = read_state(robot["state"], known, processor)
    action, done, relative, poses = read_action(robot["action"], known, processor, places)
    resize, words = read_resize(source, processor, line.multiple), load_tokenizer(network.model_name, source / "config.json", tokenizer)
    file, tensors = read_weights(source)
    vlm = _vlm(line, network, tensors, file)
    views = tuple(robot["video"].modality_keys)
    image = str(words.convert_ids_to_tokens(vlm["image_token_id"]))
    prompt = line.prompt(words, len(views), image)
    cell = line.patch(vlm)
    if resize.height % cell or resize.width % cell:
        raise UserError(
            f"{source}: pictures of {resize.height}x{resize.width} are no whole number of cells of {cell}; correct its processor"
        )
    shown = prompt.replace(image, image * (resize.height // cell * (resize.width // cell)))
    length = len(words(shown.replace("{instruction}", ""))["input_ids"]) + WORDS
    try:
        weights = groot_weights(
            {n: t if n.startswith("backbone.") else t.float() for n, t in tensors.items()}, ids[embodiment], network.action_horizon
        )
    except KeyError as error:
        raise UserError(f"{file}: the tensor '{error.args[0]}' is missing or too many for a GR00T {line.name}; {WAY_OUT}") from None
    return Release(
        spec=_spec(line, network, Shapes({n: tuple(t.shape) for n, t in tensors.items()}, file), length, views),
        vlm=vlm,
        weights=weights,
        contract=Contract(
            cameras=tuple(Camera(name=name, flip=None) for name in views),
            state=state,
            action=action,
            chunk=len(robot["action"].delta_indices),
            executed=len(robot["action"].delta_indices),
            prompt=prompt,
        ),
        state=felt,
        action=done,
        settings=Settings(
            resize=resize,
            words=Words(lower=True, edits=((r"[^\w\s]", ""),), image=image) if processor.formalize_language else Words(image=image),
            relative=relative,
            poses=poses,
        ),
        tokenizer=words,
        origin=read_origin(source, format="Isaac-GR00T", type=line.name, embodiment=embodiment),
        file=file,
        way_out=WAY_OUT,
    )


def _plain(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, value in PLAIN.items():
        if tree.get(key, value) != value:
            raise UserError(f"{file} sets {key} to {tree[key]!r}; only {value!r} can be converted")
    return tree


def _vlm(line: Line, network: Network, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The transformers config of the layers that there are."""
    if network.model_name not in line.vlms:
        raise UserError(f"{file.parent} stands on '{network.model_name}'; known VLMs are {', '.join(line.vlms)}")
    config = json.loads((resolve_weights(f"config:{line.vlms[network.model_name]}", "vlm") / "config.json").read_text())
    shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, file)
    return merge(config, {"text_config": {"num_hidden_layers": shapes.layers(line.layers)}})


def _spec(line: Line, network: Network, shapes: Shapes, length: int, views: tuple[str, ...]) -> Spec:
    head, refine = network.diffusion_model_cfg, network.vl_self_attention_cfg
    turns = ["words", *["images"] * (network.attend_text_every_n_blocks - 1)] if network.use_alternate_vl_dit else ["all"]

    def stack(part: Stack, name: str) -> dict[str, Any]:
        width = part.num_attention_heads * part.attention_head_dim
        ffn = shapes[f"action_head.{name}.transformer_blocks.0.ff.net.0.proj.weight"][0]
        return {"width": width, "depth": part.num_layers, "ffn": ffn, "space": part.space}

    refined = {} if refine is None else {"vl": stack(refine, "vl_self_attention")}
    changes = {
        "space": head.space,
        "experts": {
            "vlm": {"weights": f"path:{VLM}", "layers": None},
            **refined,
            "act": stack(head, "model") | {"cross": {"turns": turns}},
        },
        "streams": {
            "obs": {"length": length},
            **({"seen": {"length": length}} if refined else {}),
            "state": {"inner": network.hidden_size},
            "action": {"length": network.action_horizon},
        },
        "heads": {"action": {"action_dim": network.max_action_dim, "inner": network.hidden_size}},
        "schedule": {"act": {"steps": network.num_inference_timesteps}},
    }
    path = find(line.spec, "model")
    return parse(Spec, merge(load_tree(path), changes) | {"state_dim": network.max_state_dim, "cameras": views}, path)

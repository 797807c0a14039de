"""A folder of NVIDIA's Isaac GR00T N1.7, for one of its robots.

``config.json``, ``model*.safetensors``    of ``gr00t/model/gr00t_n1d7/gr00t_n1d7.py``
``processor_config.json``                  its robots: cameras, state and action groups, what happens to pictures and words
``statistics.json``, ``embodiment_id.json``  of every robot; which of the network's encoders is its own

What happens to states, actions, pictures and words is that of ``processing_gr00t_n1d7.py``, ``image_augmentations.py`` (evaluation) and
``data/state_action/state_action_processor.py`` (NVIDIA-Medtech/GR00T-H, commit 23ace64f, "GR00T N1.7 Release").
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, PositiveInt
from torch import Tensor

from ...config import find, load_tree, merge, parse
from ...data import Camera, Contract, Vector
from ...data.transforms import Affine, Relative
from ...errors import UserError
from ...vla import Spec
from ...vla.weights.groot import groot_weights
from ...vla.weights.references import resolve_weights
from ...vla.weights.released import Shapes
from ..inputs import Resize, Settings, Words
from .base import VLM, Release, load_tokenizer, read_json, read_origin, read_weights

ARCHITECTURES = {"nvidia/Cosmos-Reason2-2B": "qwen3_vl_2b", "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl_2b"}
"""``model_name`` in ``config.json`` -> its architecture in ``vla/assets/architectures``."""
WORDS = 128  # tokens of an instruction; GR00T has no limit
WAY_OUT = "give a folder that Isaac-GR00T N1.7 saved"
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
    """What matters here of ``config.json``; what is left out there has the value of ``Gr00tN1d7Config``."""

    model_name: str = "nvidia/Cosmos-Reason2-2B"
    diffusion_model_cfg: Stack
    vl_self_attention_cfg: Stack
    use_alternate_vl_dit: bool = True
    attend_text_every_n_blocks: PositiveInt = 2
    max_state_dim: PositiveInt = 132
    max_action_dim: PositiveInt = 132
    action_horizon: PositiveInt = 40
    hidden_size: PositiveInt = 1024
    num_inference_timesteps: PositiveInt = 4


class Group(BaseModel):
    """How a group of actions is meant."""

    rep: Literal["RELATIVE", "ABSOLUTE", "DELTA"]
    type: Literal["EEF", "NON_EEF"]
    state_key: str | None = None


class Part(BaseModel):
    """Cameras, state, actions or words of a robot."""

    delta_indices: list[int]
    modality_keys: list[str]
    sin_cos_embedding_keys: list[str] | None = None
    mean_std_embedding_keys: list[str] | None = None
    action_configs: list[Group] | None = None


class Processor(BaseModel):
    """``processor_kwargs`` of ``processor_config.json``."""

    modality_configs: dict[str, dict[str, Part]]
    image_crop_size: tuple[PositiveInt, PositiveInt] | None = None
    image_target_size: tuple[PositiveInt, PositiveInt] | None = None
    shortest_image_edge: PositiveInt | None = 256
    crop_fraction: float | None = 0.95
    letter_box_transform: bool = False
    formalize_language: bool = True
    use_percentiles: bool = False
    apply_sincos_state_encoding: bool = False
    use_relative_action: bool = False


def wrote(source: Path) -> bool:
    """Whether the folder ``source`` is of a GR00T."""
    told = read_json(source / "config.json", WAY_OUT) if (source / "config.json").is_file() else {}
    return "gr00t" in f"{told.get('model_type')} {told.get('architectures')}".lower()


def read(source: Path, tokenizer: Path | None, embodiment: str | None) -> Release:
    """The policy in ``source`` for the robot ``embodiment``, a tag of the processor.

    Args:
        tokenizer: a folder with the VLM's tokenizer and chat template, where the local hub cache does not hold them.

    Raises:
        UserError: another GR00T than N1.7; no such robot; a file is missing or damaged; a robot's state or actions are treated in a way
            that a checkpoint has no words for.
    """
    tree = read_json(source / "config.json", WAY_OUT)
    if tree.get("model_type") != "Gr00tN1d7":
        why = "their VLM (Eagle) is in no transformers release"
        raise UserError(f"{source} holds a '{tree.get('model_type')}'; of GR00T only N1.7 can be converted, not N1.5 and N1.6, since {why}")
    network = parse(Network, _plain(tree, source / "config.json"), source / "config.json")
    kwargs = read_json(source / "processor_config.json", WAY_OUT).get("processor_kwargs", {})
    processor = parse(Processor, _plain(kwargs, source / "processor_config.json"), source / "processor_config.json")
    statistics, ids = (read_json(source / f"{name}.json", WAY_OUT) for name in ("statistics", "embodiment_id"))
    tags = [tag for tag in processor.modality_configs if tag in statistics and tag in ids]
    if embodiment not in tags:
        raise UserError(f"{source} is of several robots; choose one by --embodiment TAG: {', '.join(tags) or 'none has statistics'}")
    robot, known = processor.modality_configs[embodiment], statistics[embodiment]
    _check(embodiment, robot, processor, network)
    state, felt, places = _state(robot["state"], known, processor)
    action, done, relative = _action(robot["action"], known, processor, places)
    resize, words = _resize(source, processor), load_tokenizer(network.model_name, source / "config.json", tokenizer)
    file, tensors = read_weights(source)
    vlm = _vlm(network, tensors, file)
    views = tuple(robot["video"].modality_keys)
    image = str(words.convert_ids_to_tokens(vlm["image_token_id"]))
    prompt = _prompt(words, len(views), image)
    cell = vlm["vision_config"]["patch_size"] * vlm["vision_config"]["spatial_merge_size"]
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
        raise UserError(f"{file}: the tensor '{error.args[0]}' is missing or too many for a GR00T N1.7; {WAY_OUT}") from None
    return Release(
        spec=_spec(network, Shapes({n: tuple(t.shape) for n, t in tensors.items()}, file), length, views),
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
        ),
        tokenizer=words,
        origin=read_origin(source, format="Isaac-GR00T", type="N1.7", embodiment=embodiment),
        file=file,
        way_out=WAY_OUT,
    )


def _plain(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, value in PLAIN.items():
        if tree.get(key, value) != value:
            raise UserError(f"{file} sets {key} to {tree[key]!r}; only {value!r} can be converted")
    return tree


def _check(tag: str, robot: Mapping[str, Part], processor: Processor, network: Network) -> None:
    """Refuse what a robot does and a checkpoint has no words for."""
    for name in ("video", "state"):
        if robot[name].delta_indices != [0]:
            raise UserError(f"{tag} looks at {name} of steps {robot[name].delta_indices}; only the present one can be converted")
    if processor.apply_sincos_state_encoding and robot["state"].sin_cos_embedding_keys:
        keys = ", ".join(robot["state"].sin_cos_embedding_keys)
        raise UserError(f"{tag} gives the state's {keys} as sine and cosine, for which a checkpoint has no words; choose another robot")
    for name in ("state", "action"):
        if robot[name].mean_std_embedding_keys:
            keys = ", ".join(robot[name].mean_std_embedding_keys or ())
            raise UserError(f"{tag} normalises the {name}'s {keys} by mean and deviation and others by range; only ranges can be converted")
    for key, group in zip(robot["action"].modality_keys, robot["action"].action_configs or (), strict=False):
        if processor.use_relative_action and group.rep == "RELATIVE" and group.type == "EEF":
            raise UserError(
                f"{tag} counts the poses of '{key}' from the hand's own frame, for which a checkpoint has no words; choose another"
            )
    if 1000 % network.num_inference_timesteps:
        raise UserError(f"{network.num_inference_timesteps} steps do not divide the 1000 flow times of the network; set a number that does")
    if len(robot["action"].delta_indices) > network.action_horizon:
        raise UserError(
            f"{tag} has {len(robot['action'].delta_indices)} steps a chunk, the network {network.action_horizon}; correct the one"
        )


def _names(key: str, size: int) -> list[str]:
    return [key] if size == 1 else [f"{key}_{i}" for i in range(size)]


def _state(part: Part, known: Mapping[str, Any], processor: Processor) -> tuple[Vector, Affine, dict[str, int]]:
    """Names, normalisation, and where each group begins. A number that never varies becomes 0 whatever it is."""
    ends = ("q01", "q99") if processor.use_percentiles else ("min", "max")
    names: list[str] = []
    places: dict[str, int] = {}
    rows: list[np.ndarray] = []
    for key in part.modality_keys:
        low, high = (np.array(known["state"][key][end]) for end in ends)
        places[key] = len(names)
        names += _names(key, len(low))
        rows.append(np.stack([low, np.where(np.isclose(high, low), 0.0, high - low) / 2]))
    low, half = np.concatenate(rows, axis=1)
    kind: Literal["quantile", "min_max"] = "quantile" if processor.use_percentiles else "min_max"
    affine = Affine(shift=tuple(low.tolist()), scale=tuple(half.tolist()), bias=-1.0, clip=True)
    return Vector(names=tuple(names), normalisation=kind), affine, places


def _action(
    part: Part, known: Mapping[str, Any], processor: Processor, places: Mapping[str, int]
) -> tuple[Vector, Affine, Relative | None]:
    """Names, normalisation (with a row for each step where relative groups have one), and what is relative to the state."""
    ends, chunk = ("q01", "q99") if processor.use_percentiles else ("min", "max"), len(part.delta_indices)
    names: list[str] = []
    origin: list[int | None] = []
    lows, highs = [], []
    for key, group in zip(part.modality_keys, part.action_configs or [None] * len(part.modality_keys), strict=True):
        relative = processor.use_relative_action and group is not None and group.rep == "RELATIVE"
        row = known["relative_action"][key] if relative else known["action"][key]
        low, high = (np.array(row[end]) for end in (("min", "max") if relative else ends))
        size, first = low.shape[-1], places.get((group.state_key if group else None) or key)
        if relative and first is None:
            raise UserError(f"the actions '{key}' are relative to a state that the robot does not have; choose another robot")
        names += _names(key, size)
        origin += [first + i if relative and first is not None else None for i in range(size)]
        lows.append(np.broadcast_to(low, (chunk, size)))
        highs.append(np.broadcast_to(high, (chunk, size)))
    low, half = np.concatenate(lows, axis=1), (np.concatenate(highs, axis=1) - np.concatenate(lows, axis=1)) / 2
    moved = any(i is not None for i in origin)
    affine = Affine(shift=_rows(low), scale=_rows(half), bias=-1.0, clip=True)
    kind: Literal["quantile", "min_max"] = "quantile" if processor.use_percentiles else "min_max"
    vector = Vector(names=tuple(names), mode="absolute" if moved else None, normalisation=None if moved else kind)
    return vector, affine, Relative(state_of=tuple(origin)) if moved else None


def _rows(values: np.ndarray) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
    """One row where all steps have the same."""
    return tuple(values[0].tolist()) if (values == values[0]).all() else tuple(tuple(row) for row in values.tolist())


def _resize(source: Path, processor: Processor) -> Resize:
    """Pictures are scaled by area, cut and scaled again. Those that are not square the release padded to squares whatever the folder says,
    later versions only where it says so, so without that word they are refused."""
    target, cut = processor.image_target_size, processor.image_crop_size
    side = processor.shortest_image_edge or (target[0] if target and target[0] == target[1] else None)
    crop = processor.crop_fraction or (cut[0] / target[0] if cut and target else None)
    if side is None or crop is None:
        raise UserError(f"{source / 'processor_config.json'} does not tell the one size of its pictures and what is cut off; {WAY_OUT}")
    return Resize(height=side, width=side, shape="padded" if processor.letter_box_transform else "square", filter="area", crop=crop)


def _vlm(network: Network, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The transformers config of the layers that there are."""
    if network.model_name not in ARCHITECTURES:
        raise UserError(f"{file.parent} stands on '{network.model_name}'; known VLMs are {', '.join(ARCHITECTURES)}")
    config = json.loads((resolve_weights(f"config:{ARCHITECTURES[network.model_name]}", "vlm") / "config.json").read_text())
    shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, file)
    layers = shapes.layers("backbone.model.model.language_model.layers.")
    return merge(config, {"text_config": {"num_hidden_layers": layers}})


def _prompt(words: Any, views: int, image: str) -> str:
    """What the tokenizer's chat makes of pictures and an instruction."""
    if not words.chat_template:
        raise UserError(f"the tokenizer {words.name_or_path} has no chat template; give the VLM's own folder: --tokenizer FOLDER")
    said = [{"type": "image"}] * views + [{"type": "text", "text": "{instruction}"}]
    prompt = str(words.apply_chat_template([{"role": "user", "content": said}], tokenize=False, add_generation_prompt=False))
    if prompt.count(image) != views or prompt.count("{instruction}") != 1:
        raise UserError(f"the chat template of {words.name_or_path} does not show {views} pictures and a text; give the VLM's own folder")
    return prompt


def _spec(network: Network, shapes: Shapes, length: int, views: tuple[str, ...]) -> Spec:
    head, refine = network.diffusion_model_cfg, network.vl_self_attention_cfg
    turns = ["words", *["images"] * (network.attend_text_every_n_blocks - 1)] if network.use_alternate_vl_dit else ["all"]

    def stack(part: Stack, name: str) -> dict[str, Any]:
        width = part.num_attention_heads * part.attention_head_dim
        ffn = shapes[f"action_head.{name}.transformer_blocks.0.ff.net.0.proj.weight"][0]
        return {"width": width, "depth": part.num_layers, "ffn": ffn, "space": part.space}

    changes = {
        "space": head.space,
        "experts": {
            "vlm": {"weights": f"path:{VLM}", "layers": None},
            "vl": stack(refine, "vl_self_attention"),
            "act": stack(head, "model") | {"cross": {"turns": turns}},
        },
        "streams": {
            "obs": {"length": length},
            "seen": {"length": length},
            "state": {"inner": network.hidden_size},
            "action": {"length": network.action_horizon},
        },
        "heads": {"action": {"action_dim": network.max_action_dim, "inner": network.hidden_size}},
        "schedule": {"act": {"steps": network.num_inference_timesteps}},
    }
    path = find("groot_n17", "model")
    return parse(Spec, merge(load_tree(path), changes) | {"state_dim": network.max_state_dim, "cameras": views}, path)

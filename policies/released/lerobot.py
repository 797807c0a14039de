"""What a policy folder of lerobot says about itself (version 0.6.1): its configuration and its saved processors, in our words."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, PositiveInt
from torch import Tensor

from ...config import parse
from ...data import Camera, Contract, Vector
from ...data.transforms import Affine, Kind
from ...errors import UserError
from ...vla.weights.released import LAYOUTS
from ..inputs import Resize, Settings, Words
from .base import Release, Sizes, by_layout, load_tokenizer, read_json, read_origin, read_tensors, read_weights

WRITTEN = "give a folder that lerobot's save_pretrained wrote"

ALONE: Mapping[str, Any] = {
    "n_obs_steps": 1,
    "use_peft": False,
    "use_relative_actions": False,
    "adapt_to_pi_aloha": False,
    "add_image_special_tokens": False,
    "attention_mode": "cross_attn",
    "self_attn_every_n_layers": 2,
    "min_period": 4e-3,
    "max_period": 4.0,
}
"""Keys of ``config.json`` that can be converted with one value alone."""
STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
KINDS: Mapping[str, Kind] = {"MEAN_STD": "mean_std", "MIN_MAX": "min_max", "QUANTILES": "quantile", "IDENTITY": "none"}
LINE = ("{instruction}\n", Words(edits=((r"\n\Z", ""),), truncate=True))
STATE = (
    "Task: {instruction}, State: {state};\nAction: ",
    Words(edits=((r"\A\s+|\s+\Z", ""), (r"[_\n]", " ")), state_bins=256, truncate=True),
)
PROMPTS = {"pi0_new_line_processor": LINE, "smolvla_new_line_processor": LINE, "pi05_prepare_state_tokenizer_processor_step": STATE}
"""Step that writes the prompt -> its template, and how words get into it."""
KNOWN = {"to_batch_processor", "device_processor", "rename_observations_processor"}
NEEDED = {"policy_preprocessor": ("tokenizer_processor", "normalizer_processor"), "policy_postprocessor": ("unnormalizer_processor",)}
STILL = ("relative_actions_processor", "absolute_actions_processor")  # only where they are switched off


class Feature(BaseModel):
    """An entry of ``input_features`` or ``output_features``."""

    type: str
    shape: tuple[int, ...]


class Released(BaseModel):
    """What matters here of lerobot's ``config.json``; what is left out there has lerobot's own value."""

    type: Literal["pi0", "pi05", "smolvla"]
    input_features: dict[str, Feature]
    output_features: dict[str, Feature]
    chunk_size: PositiveInt = 50
    n_action_steps: PositiveInt = 50
    max_state_dim: PositiveInt = 32
    max_action_dim: PositiveInt = 32
    image_resolution: tuple[PositiveInt, PositiveInt] = (224, 224)
    resize_imgs_with_padding: tuple[PositiveInt, PositiveInt] | None = (512, 512)
    num_inference_steps: PositiveInt = 10
    num_steps: PositiveInt = 10
    action_feature_names: list[str] | None = None
    vlm_model_name: str | None = None
    repo_id: str | None = None


@dataclass(frozen=True)
class Step:
    """One step of a saved processor: its configuration and tensors."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def read(source: Path, tokenizer: Path | None = None) -> Release:
    """The policy in ``source``: ``config.json``, weights, ``policy_preprocessor.json`` and ``policy_postprocessor.json``.

    Args:
        tokenizer: a folder with the tokenizer, where the one that the preprocessor names is not in the local hub cache.

    Raises:
        UserError: a file is missing or damaged; the policy does what a spec has no words for.
    """
    config = read_config(source)
    before, after = read_steps(source, "policy_preprocessor"), read_steps(source, "policy_postprocessor")
    state, felt = read_vector(source, config, before["normalizer_processor"], "observation.state")
    action, done = read_vector(source, config, after["unnormalizer_processor"], "action")
    contract = Contract(
        cameras=read_cameras(source, config, before),
        state=state,
        action=action,
        chunk=config.chunk_size,
        executed=config.n_action_steps,
        prompt=next((PROMPTS[step][0] for step in before if step in PROMPTS), "{instruction}"),
    )
    resize = read_resize(source, config)
    text = before["tokenizer_processor"].config
    words = load_tokenizer(text.get("tokenizer_name") or config.vlm_model_name, source / "policy_preprocessor.json", tokenizer)
    file, tensors = read_weights(source)
    sizes = Sizes(
        image=(resize.height, resize.width),
        words=text.get("max_length", 512),
        chunk=config.chunk_size,
        steps=config.num_steps if config.type == "smolvla" else config.num_inference_steps,
        state=config.max_state_dim,
        cameras=contract.camera_names,
    )
    return Release(
        **by_layout(LAYOUTS[config.type], tensors, file, sizes, "give a folder that lerobot 0.6.1 wrote"),
        contract=contract,
        state=felt,
        action=done,
        settings=Settings(resize=resize, words=read_words(source, before)),
        tokenizer=words,
        origin=read_origin(source, format="lerobot", type=config.type, repository=config.repo_id),
    )


def read_config(source: Path) -> Released:
    """``config.json`` of the folder ``source``.

    Raises:
        UserError: it cannot be read, is of another type, or sets what a spec has no words for.
    """
    tree = read_json(source / "config.json", WRITTEN)
    config = parse(Released, tree, source / "config.json")
    for key, value in ALONE.items():
        if tree.get(key, value) != value:
            raise UserError(f"{source / 'config.json'} sets {key} to {tree[key]!r}; only policies with {value!r} can be converted")
    return config


def read_steps(source: Path, name: str) -> dict[str, Step]:
    """The steps of a saved processor by their registered names.

    Raises:
        UserError: there is no such file (older policies keep their statistics among the weights), or a step does what is not known.
    """
    if not (source / f"{name}.json").is_file():
        way_out = "bring it up to date with lerobot's migrate_policy_normalization.py and convert what that writes"
        raise UserError(f"{source} has no {name}.json, so it is of a lerobot before 0.4; {way_out}")
    found: dict[str, Step] = {}
    for entry in read_json(source / f"{name}.json", WRITTEN).get("steps", []):
        registered, config = str(entry.get("registry_name") or entry.get("class")), dict(entry.get("config") or {})
        still = registered in STILL and not config.get("enabled")
        if not still and registered not in KNOWN | PROMPTS.keys() | set(NEEDED[name]):
            raise UserError(f"{source / name}.json has a step '{registered}' that cannot be converted; take it out or keep to lerobot")
        found[registered] = Step(config, read_tensors(source / entry["state_file"]) if entry.get("state_file") else {})
    for needed in NEEDED[name]:
        if needed not in found:
            raise UserError(f"{source / name}.json has no step '{needed}'; save the policy anew with lerobot 0.6.1")
    return found


def read_cameras(source: Path, config: Released, steps: dict[str, Step]) -> tuple[Camera, ...]:
    """In lerobot's order and under the names that observations have; it does without any of them but the last that is left."""
    normaliser, renaming = steps["normalizer_processor"], steps.get("rename_observations_processor", Step({}, {}))
    outer = {new: old for old, new in renaming.config.get("rename_map", {}).items()}
    seen = [key for key, feature in config.input_features.items() if feature.type == "VISUAL"]
    scaled = [key for key in seen if any(name.startswith(f"{key}.") for name in normaliser.state)]
    if not seen:
        raise UserError(f"{source / 'config.json'} names no camera in input_features; only policies that see can be converted")
    if scaled and normaliser.config.get("norm_map", {}).get("VISUAL", "IDENTITY") != "IDENTITY":
        raise UserError(f"{source / 'policy_preprocessor.json'} normalises {scaled[0]} by statistics; only plain images can be converted")
    names = [outer.get(key, key).removeprefix("observation.").removeprefix("images.") for key in seen]
    return tuple(Camera(name=name, flip=None, optional=True) for name in names)


def read_resize(source: Path, config: Released) -> Resize:
    """How images are fitted: pi0 and pi0.5 put them into the centre, SmolVLA to the bottom right."""
    if config.type != "smolvla":
        return Resize(height=config.image_resolution[0], width=config.image_resolution[1], at="centre")
    if config.resize_imgs_with_padding is None:
        raise UserError(f"{source / 'config.json'} takes images as they are; set resize_imgs_with_padding to [width, height]")
    return Resize(height=config.resize_imgs_with_padding[1], width=config.resize_imgs_with_padding[0], at="bottom_right")


def read_words(source: Path, steps: dict[str, Step]) -> Words:
    """How instructions become text and tokens."""
    text = steps["tokenizer_processor"].config
    if text.get("padding_side", "right") != "right":
        raise UserError(f"{source / 'policy_preprocessor.json'} pads texts on the left; only padding on the right can be converted")
    words = next((PROMPTS[step][1] for step in steps if step in PROMPTS), Words())
    return words.model_copy(update={"truncate": text.get("truncation", True)})


def read_vector(source: Path, config: Released, step: Step, key: str) -> tuple[Vector, Affine]:
    """The dimensions of ``key``, and its normalisation: as a step makes states, or as it undoes actions.

    lerobot divides by std + eps and multiplies by std, and takes eps for the width of a range without any.
    """
    acts = key == "action"
    feature, most = (config.input_features | config.output_features).get(key), config.max_action_dim if acts else config.max_state_dim
    size = feature.shape[0] if feature else most
    if size > most:
        raise UserError(f"{source / 'config.json'}: {key} has {size} dimensions, the network {most}; correct the one or the other")
    names = config.action_feature_names if acts else None
    names = names if names and len(names) == size else [f"{key.rpartition('.')[2]}_{i}" for i in range(size)]
    found = {name.removeprefix(f"{key}."): row for name, row in step.state.items() if name.startswith(f"{key}.")}
    mode = step.config.get("norm_map", {}).get("ACTION" if acts else "STATE", "IDENTITY")
    meant = acts or key in (step.config.get("normalize_observation_keys") or step.config.get("features", {}))
    if mode == "IDENTITY" or not found or not meant:
        return Vector(names=tuple(names), normalisation="none"), Affine(shift=(0.0,) * size, scale=(1.0,) * size)
    missing = [name for name in STATISTICS[mode] if name not in found or found[name].shape != (size,)]
    if missing:
        raise UserError(f"{source}: a processor has no {missing[0]} of {size} numbers for {key}, which {mode} needs; save it anew")
    low, high = (found[name].float() for name in STATISTICS[mode])
    eps = step.config.get("eps", 1e-8)
    if mode == "MEAN_STD":
        scale, bias = high if acts else high + eps, 0.0
    else:
        width = high - low
        scale, bias = torch.where(width == 0, torch.tensor(eps), width) / 2, -1.0
    affine = Affine(shift=tuple(low.tolist()), scale=tuple(scale.tolist()), bias=bias)
    return Vector(names=tuple(names), normalisation=KINDS.get(mode)), affine

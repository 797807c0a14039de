"""A policy folder of lerobot (pi0, pi0.5, SmolVLA; version 0.6.1) as a checkpoint that acts the same.

What its processors do becomes settings and statistics, so that the policy needs no word of where it came from. lerobot itself
is not needed: its folder is JSON and safetensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import dump, find, load_tree, merge, parse
from ..data import Camera, Contract, Observation, Vector
from ..data.files import atomic_folder
from ..data.transforms import Affine, Kind
from ..errors import UserError
from ..vla import Spec
from ..vla.graph import Graph
from ..vla.model import Model, sketch
from ..vla.weights import Reference, digest
from ..vla.weights.released import LAYOUTS, Layout, Shapes, spec_changes, vlm_config
from .checkpoint import read_checkpoint, write_checkpoint, write_golden
from .inputs import Resize, Settings, Words
from .triune import anchored, from_checkpoint

VLM = "vlm"  # the folder in the checkpoint that holds what the VLM needs
UND = "mot.experts.und.model."
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
TEXT = "Task: stack_it, State: -1 0 255;\nAction: "  # a tokenizer must say the same of it after saving
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


def convert(source: Path, out: Path, tokenizer: Path | None = None) -> Contract:
    """Write the checkpoint ``out``; it appears whole or not at all.

    Args:
        source: folder with ``config.json``, ``model.safetensors``, ``policy_preprocessor.json`` and ``policy_postprocessor.json``.
        tokenizer: a folder with the tokenizer, where the one that the preprocessor names is not in the local hub cache.

    Returns:
        the checkpoint's contract.

    Raises:
        UserError: ``out`` is there already; a file is missing or damaged; the policy does what a spec has no words for.
    """
    if out.exists():
        raise UserError(f"{out} is there already; give a new folder, or remove it first")
    tree = _json(source / "config.json")
    config = parse(Released, tree, source / "config.json")
    for key, value in ALONE.items():
        if tree.get(key, value) != value:
            raise UserError(f"{source / 'config.json'} sets {key} to {tree[key]!r}; only policies with {value!r} can be converted")
    layout = LAYOUTS[config.type]
    before, after = _steps(source, "policy_preprocessor"), _steps(source, "policy_postprocessor")
    state, felt = _vector(source, config, before["normalizer_processor"], "observation.state")
    action, done = _vector(source, config, after["unnormalizer_processor"], "action")
    contract = Contract(
        cameras=_cameras(source, config, before),
        state=state,
        action=action,
        chunk=config.chunk_size,
        executed=config.n_action_steps,
        prompt=next((PROMPTS[step][0] for step in before if step in PROMPTS), "{instruction}"),
    )
    resize = _resize(source, config)
    text = before["tokenizer_processor"].config
    words = _tokenizer(source, text.get("tokenizer_name") or config.vlm_model_name, tokenizer)
    shapes, tensors = _tensors(source / "model.safetensors", layout)
    vlm = vlm_config(layout, shapes)
    changes = spec_changes(layout, shapes, vlm, (resize.height, resize.width), text.get("max_length", 512), len(contract.cameras))
    spec = _spec(layout, changes, config, contract.camera_names)
    with atomic_folder(out) as folder:
        (folder / VLM).mkdir()
        (folder / VLM / "config.json").write_text(json.dumps(vlm, indent=2))
        words.save_pretrained(folder / VLM)
        weights = _renamed(layout, tensors, sketch(anchored(spec, folder)), shapes.file)
        if spec.experts["und"].frozen:  # transformers reads them under its own names
            own = {name.removeprefix(UND): weights.pop(name) for name in list(weights) if name.startswith(UND)}
            save_file(own, folder / VLM / "model.safetensors", metadata={"format": "pt"})
        write_checkpoint(
            folder,
            spec=dump(spec),
            contract=contract,
            statistics={"observation.state": felt.model_dump(mode="json"), "action": done.model_dump(mode="json")},
            weights=weights,
            references={"und": Reference(kind="vlm", ref=f"path:{VLM}", sha256=digest(folder / VLM))},
            settings=Settings(resize=resize, words=_words(source, before)).model_dump(mode="json"),
            source=_origin(source, config),
        )
        policy = from_checkpoint(read_checkpoint(folder))
        if policy.prompts([TEXT], 0)[0][0].tolist()[: len(ids := words(TEXT)["input_ids"])] != ids:
            raise UserError(f"the tokenizer {words.name_or_path} gives other tokens once it is saved; give another as --tokenizer FOLDER")
        write_golden(folder, policy, _observations(contract, felt))
    return contract


# what the folder says ------------------------------------------------------------------------------------------------


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a folder that lerobot's save_pretrained wrote") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(tree).__name__}; give a folder that lerobot's save_pretrained wrote")
    return tree


def _steps(source: Path, name: str) -> dict[str, Step]:
    """The steps of a saved processor by their registered names.

    Raises:
        UserError: there is no such file (older policies keep their statistics among the weights), or a step does what is not known.
    """
    if not (source / f"{name}.json").is_file():
        way_out = "bring it up to date with lerobot's migrate_policy_normalization.py and convert what that writes"
        raise UserError(f"{source} has no {name}.json, so it is of a lerobot before 0.4; {way_out}")
    found: dict[str, Step] = {}
    for entry in _json(source / f"{name}.json").get("steps", []):
        registered, config = str(entry.get("registry_name") or entry.get("class")), dict(entry.get("config") or {})
        still = registered in STILL and not config.get("enabled")
        if not still and registered not in KNOWN | PROMPTS.keys() | set(NEEDED[name]):
            raise UserError(f"{source / name}.json has a step '{registered}' that cannot be converted; take it out or keep to lerobot")
        found[registered] = Step(config, _load(source / entry["state_file"]) if entry.get("state_file") else {})
    for needed in NEEDED[name]:
        if needed not in found:
            raise UserError(f"{source / name}.json has no step '{needed}'; save the policy anew with lerobot 0.6.1")
    return found


def _cameras(source: Path, config: Released, steps: dict[str, Step]) -> tuple[Camera, ...]:
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


def _resize(source: Path, config: Released) -> Resize:
    if config.type != "smolvla":
        return Resize(height=config.image_resolution[0], width=config.image_resolution[1], at="centre")
    if config.resize_imgs_with_padding is None:
        raise UserError(f"{source / 'config.json'} takes images as they are; set resize_imgs_with_padding to [width, height]")
    return Resize(height=config.resize_imgs_with_padding[1], width=config.resize_imgs_with_padding[0], at="bottom_right")


def _words(source: Path, steps: dict[str, Step]) -> Words:
    text = steps["tokenizer_processor"].config
    if text.get("padding_side", "right") != "right":
        raise UserError(f"{source / 'policy_preprocessor.json'} pads texts on the left; only padding on the right can be converted")
    words = next((PROMPTS[step][1] for step in steps if step in PROMPTS), Words())
    return words.model_copy(update={"truncate": text.get("truncation", True)})


def _vector(source: Path, config: Released, step: Step, key: str) -> tuple[Vector, Affine]:
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


def _tokenizer(source: Path, name: str | None, given: Path | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given or name, local_files_only=True)
    except (OSError, ValueError) as error:
        if given is not None:
            raise UserError(f"--tokenizer {given} holds no tokenizer ({str(error).splitlines()[0]}); give a folder with one") from None
        raise UserError(
            f"the tokenizer '{name}' that {source / 'policy_preprocessor.json'} names is not on this machine; download it "
            f"(hf download {name}) or give a folder that holds it: --tokenizer FOLDER"
        ) from None


def _origin(source: Path, config: Released) -> dict[str, str]:
    """Where the policy comes from, as far as the folder tells: a snapshot of the hub's cache names repository and revision."""
    folder, card = source.resolve(), source / "README.md"
    cached = folder.parent.name == "snapshots"
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    licence = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    facts = {
        "format": "lerobot",
        "type": config.type,
        "repository": folder.parent.parent.name.removeprefix("models--").replace("--", "/") if cached else config.repo_id,
        "revision": folder.name if cached else None,
        "licence": licence[1] if licence else None,
    }
    return {key: str(value) for key, value in facts.items() if value}


# what is written -----------------------------------------------------------------------------------------------------


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or download it again") from None


def _tensors(file: Path, layout: Layout) -> tuple[Shapes, dict[str, Tensor]]:
    """Names without lerobot's ``model.``; tensors are read from the disk when they are used. All but the VLM's are fp32, since
    renaming computes with them."""
    raw = {name.removeprefix("model."): tensor for name, tensor in _load(file).items()}
    tensors = {name: tensor if name.startswith(layout.vlm) else tensor.float() for name, tensor in raw.items()}
    return Shapes({name: tuple(tensor.shape) for name, tensor in raw.items()}, file), tensors


def _spec(layout: Layout, changes: dict[str, Any], config: Released, views: tuple[str, ...]) -> Spec:
    path = find(layout.spec, "model")
    tree = merge(load_tree(path), changes)
    und = tree["experts"]["und"]
    und["weights"] = f"path:{VLM}" if und["frozen"] else f"random:path:{VLM}"
    tree["streams"]["action"]["length"] = config.chunk_size
    spec = parse(Spec, tree | {"state_dim": config.max_state_dim, "cameras": views}, path)
    steps = config.num_steps if config.type == "smolvla" else config.num_inference_steps
    phases = {name: phase.model_copy(update={"steps": phase.steps and steps}) for name, phase in Graph(spec).phases.items()}
    return spec.model_copy(update={"schedule": phases})


def _renamed(layout: Layout, tensors: dict[str, Tensor], model: Model, file: Path) -> dict[str, Tensor]:
    """The tensors in the names of ``model``, a sketch of the spec.

    Raises:
        UserError: naming the first tensor that is missing, too many or of another shape.
    """
    way_out = "give a folder that lerobot 0.6.1 wrote"
    try:
        found = layout.rename(tensors)
    except KeyError as error:
        raise UserError(f"{file} has a tensor '{error.args[0]}' that a {layout.spec} has not; {way_out}") from None
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    words, head = UND + layout.text + "embed_tokens.weight", f"{UND}lm_head.weight"
    if head not in wanted and head in found:  # one tensor, under either name
        found[words] = found.get(words, found.pop(head))
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{file}: {name} is {'missing' if name in wanted else 'too many'} for a {layout.spec} of its sizes; {way_out}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise UserError(f"{file}: {name} has shape {tuple(found[name].shape)} instead of {tuple(shape)}; {way_out}")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _observations(contract: Contract, state: Affine) -> list[Observation]:
    """Golden ones: coarse noise, states over their range, and where there are several cameras one that sees with the first alone."""
    rng = np.random.default_rng(0)
    found = []
    for number, text in enumerate(("pick up the cube", "open the drawer", "put the cup on the plate", "close it", "push the block")):
        names = contract.camera_names[:1] if number == 4 else contract.camera_names
        images = {name: np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for name in names}
        found.append(Observation(images, state.unnormalise(rng.uniform(-1, 1, contract.state.size)), text))
    return found

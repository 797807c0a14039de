"""A policy folder of lerobot (pi0, pi0.5, SmolVLA; version 0.6.1) as a checkpoint that acts the same.

What its processors do becomes settings and statistics, so that the policy needs no word of where it came from. lerobot itself
is not needed: its folder is JSON and safetensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
NEEDED = {"policy_preprocessor": ("tokenizer_processor", "normalizer_processor"), "policy_postprocessor": ("unnormalizer_processor",)}
STILL = ("relative_actions_processor", "absolute_actions_processor")  # only where they are switched off


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
    config = _json(source / "config.json")
    layout = LAYOUTS.get(str(config.get("type")))
    if layout is None:
        raise UserError(f"{source / 'config.json'} is of type '{config.get('type')}'; {', '.join(LAYOUTS)} can be converted")
    for key, value in ALONE.items():
        if config.get(key, value) != value:
            raise UserError(f"{source / 'config.json'} sets {key} to {config[key]!r}; only policies with {value!r} can be converted")
    before, after = _steps(source, "policy_preprocessor"), _steps(source, "policy_postprocessor")
    contract, settings = _contract(source, config, before)
    statistics = {
        "observation.state": _affine(source, before["normalizer_processor"], "observation.state", contract.state.size),
        "action": _affine(source, after["unnormalizer_processor"], "action", contract.action.size),
    }
    size = settings.resize
    assert size is not None
    text = before["tokenizer_processor"].config
    words = _tokenizer(source, text.get("tokenizer_name") or config.get("vlm_model_name"), tokenizer)
    shapes, tensors = _tensors(source / "model.safetensors", layout)
    vlm = vlm_config(layout, shapes)
    changes = spec_changes(layout, shapes, vlm, (size.height, size.width), text["max_length"], len(contract.cameras))
    spec = _spec(layout, changes, config, contract)
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
            statistics={key: entry.model_dump(mode="json") for key, entry in statistics.items()},
            weights=weights,
            references={"und": Reference(kind="vlm", ref=f"path:{VLM}", sha256=digest(folder / VLM))},
            settings=settings.model_dump(mode="json"),
            source=_origin(source, config),
        )
        policy = from_checkpoint(read_checkpoint(folder))
        write_golden(folder, policy, _observations(contract, statistics["observation.state"]))
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


def _contract(source: Path, config: dict[str, Any], steps: dict[str, Step]) -> tuple[Contract, Settings]:
    """What the policy sees and answers, and how that becomes its inputs. lerobot does without any camera but the last."""
    features: dict[str, Any] = config["input_features"] | config["output_features"]
    renamed = {new: old for old, new in steps.get("rename_observations_processor", Step({}, {})).config.get("rename_map", {}).items()}
    seen = [key for key, feature in features.items() if feature["type"] == "VISUAL"]
    normaliser = steps["normalizer_processor"]
    scaled = [key for key in seen if any(name.startswith(f"{key}.") for name in normaliser.state)]
    if scaled and normaliser.config["norm_map"].get("VISUAL", "IDENTITY") != "IDENTITY":
        raise UserError(f"{source / 'policy_preprocessor.json'} normalises {scaled[0]} by statistics; only plain images can be converted")
    names = [renamed.get(key, key).removeprefix("observation.").removeprefix("images.") for key in seen]
    template, words = next((PROMPTS[step] for step in steps if step in PROMPTS), ("{instruction}", Words()))
    text = steps["tokenizer_processor"].config
    if text.get("padding_side", "right") != "right":
        raise UserError(f"{source / 'policy_preprocessor.json'} pads texts on the left; only padding on the right can be converted")
    if "image_resolution" in config:
        resize = Resize(height=config["image_resolution"][0], width=config["image_resolution"][1], at="centre")
    elif config.get("resize_imgs_with_padding"):  # (width, height)
        resize = Resize(height=config["resize_imgs_with_padding"][1], width=config["resize_imgs_with_padding"][0], at="bottom_right")
    else:
        raise UserError(f"{source / 'config.json'} takes images as they are; set resize_imgs_with_padding to their size")

    def vector(key: str, names: list[str] | None, most: str) -> Vector:
        size = int(features[key]["shape"][0]) if key in features else config[most]
        if size > config[most]:
            raise UserError(
                f"{source / 'config.json'}: {key} has {size} dimensions and {most} is {config[most]}; correct the one or the other"
            )
        names = names if names and len(names) == size else [f"{key.rpartition('.')[2]}_{i}" for i in range(size)]
        kind = normaliser.config["norm_map"].get("ACTION" if key == "action" else "STATE", "IDENTITY")
        return Vector(names=tuple(names), normalisation=KINDS.get(kind))

    contract = Contract(
        cameras=tuple(Camera(name=name, flip=None, optional=True) for name in names),
        state=vector("observation.state", None, "max_state_dim"),
        action=vector("action", config.get("action_feature_names"), "max_action_dim"),
        chunk=config["chunk_size"],
        executed=config["n_action_steps"],
        prompt=template,
    )
    return contract, Settings(resize=resize, words=words.model_copy(update={"truncate": text.get("truncation", True)}))


def _affine(source: Path, step: Step, key: str, size: int) -> Affine:
    """A step's normalisation of ``key``: as it makes states, or as it undoes actions.

    lerobot divides by std + eps and multiplies by std, and takes eps for the width of a range without any.
    """
    config, found = step.config, {name.rpartition(".")[2]: row for name, row in step.state.items() if name.rpartition(".")[0] == key}
    mode = config["norm_map"].get("ACTION" if key == "action" else "STATE", "IDENTITY")
    keys = config.get("normalize_observation_keys")
    if mode == "IDENTITY" or not found or (key != "action" and (key not in config["features"] or (keys and key not in keys))):
        return Affine(shift=(0.0,) * size, scale=(1.0,) * size)
    missing = [name for name in STATISTICS[mode] if name not in found or found[name].shape != (size,)]
    if missing:
        raise UserError(f"{source}: the processor has no {missing[0]} of {size} numbers for {key}, which {mode} needs; save it anew")
    low, high = (found[name].float() for name in STATISTICS[mode])
    if mode == "MEAN_STD":
        shift, scale, bias = low, high if key == "action" else high + config["eps"], 0.0
    else:
        width = high - low
        shift, scale, bias = low, torch.where(width == 0, torch.tensor(config["eps"]), width) / 2, -1.0
    return Affine(shift=tuple(shift.tolist()), scale=tuple(scale.tolist()), bias=bias)


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


def _origin(source: Path, config: dict[str, Any]) -> dict[str, str]:
    """Where the policy comes from, as far as the folder tells: a snapshot of the hub's cache names repository and revision."""
    folder, card = source.resolve(), source / "README.md"
    cached = folder.parent.name == "snapshots"
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    licence = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    facts = {
        "format": "lerobot",
        "type": config["type"],
        "repository": folder.parent.parent.name.removeprefix("models--").replace("--", "/") if cached else config.get("repo_id"),
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


def _spec(layout: Layout, changes: dict[str, Any], config: dict[str, Any], contract: Contract) -> Spec:
    path = find(layout.spec, "model")
    tree = merge(load_tree(path), changes)
    und = tree["experts"]["und"]
    und["weights"] = f"path:{VLM}" if und["frozen"] else f"random:path:{VLM}"
    tree["streams"]["action"]["length"] = config["chunk_size"]
    spec = parse(Spec, tree | {"state_dim": config["max_state_dim"], "cameras": contract.camera_names}, path)
    steps = config.get("num_inference_steps", config.get("num_steps", 10))
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

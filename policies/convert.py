"""A policy folder of lerobot (pi0, pi0.5, SmolVLA; version 0.6.1) as a checkpoint that acts the same.

What its processors do becomes settings and statistics, so that the policy needs no word of where it came from. lerobot itself
is not needed: its folder is JSON and safetensors.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from ..config import dump, find, load_tree, merge, parse
from ..data import Contract, Observation
from ..data.files import atomic_folder
from ..data.transforms import Affine
from ..errors import UserError
from ..vla import Spec
from ..vla.graph import Graph
from ..vla.model import Model, sketch
from ..vla.weights import Reference, digest
from ..vla.weights.released import LAYOUTS, Layout, Shapes, spec_changes, vlm_config
from .checkpoint import read_checkpoint, write_checkpoint, write_golden
from .inputs import Settings
from .released import PROMPTS, Released, read_cameras, read_config, read_resize, read_steps, read_tensors, read_vector, read_words
from .triune import anchored, from_checkpoint, graph_info, load_model, spec_of

VLM = "vlm"  # the folder in the checkpoint that holds what the VLM needs
UND = "mot.experts.und.model."
TEXT = "Task: stack_it, State: -1 0 255;\nAction: "  # a tokenizer must say the same of it after saving


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
    config = read_config(source)
    layout = LAYOUTS[config.type]
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
            settings=Settings(resize=resize, words=read_words(source, before)).model_dump(mode="json"),
            source=_origin(source, config),
            graph=graph_info(spec),
        )
        policy = from_checkpoint(read_checkpoint(folder), precision="fp32")
        if policy.prompts([TEXT], 0)[0][0].tolist()[: len(ids := words(TEXT)["input_ids"])] != ids:
            raise UserError(f"the tokenizer {words.name_or_path} gives other tokens once it is saved; give another as --tokenizer FOLDER")
        write_golden(folder, policy, _observations(contract, felt))
    return contract


def merge_checkpoint(source: Path, out: Path) -> None:
    """Write a fine-tuned checkpoint together with what it was fine-tuned from, adapters added to their weights, as one that stands
    alone; it appears whole or not at all. Frozen weights that did not learn stay references.

    Raises:
        UserError: ``out`` is there already, or the checkpoint stands on no other.
    """
    if out.exists():
        raise UserError(f"{out} is there already; give a new folder, or remove it first")
    checkpoint = read_checkpoint(source)
    if checkpoint.info.base is None:
        raise UserError(f"{checkpoint.folder} holds all that it was trained to; there is nothing to merge")
    spec, learned = spec_of(checkpoint), {name for part in checkpoint.lineage() for name, t in part.info.experts.items() if t.lora}
    tree = spec.model_dump(mode="json")
    for name in learned:
        expert = tree["experts"][name]
        if expert["frozen"] and expert["kind"] == "pretrained":
            expert["weights"] = f"random:{expert['weights'].removeprefix('random:')}"
        expert["frozen"] = False
    whole = parse(Spec, tree, checkpoint.spec)
    frozen = tuple(f"mot.experts.{n}." for n, e in whole.experts.items() if e.frozen)
    weights = {n: p.detach().contiguous() for n, p in load_model(checkpoint, spec).named_parameters() if not n.startswith(frozen)}
    with atomic_folder(out) as folder:
        write_checkpoint(
            folder,
            spec=dump(whole),
            contract=checkpoint.contract,
            statistics=checkpoint.statistics,
            weights=weights,
            references=checkpoint.info.weights,
            settings=checkpoint.info.settings,
            source=checkpoint.info.source,
            graph=graph_info(whole),
        )
        write_golden(folder, from_checkpoint(read_checkpoint(folder), precision="fp32", device="cpu"), checkpoint.observations())


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


def _tensors(file: Path, layout: Layout) -> tuple[Shapes, dict[str, Tensor]]:
    """Names without lerobot's ``model.``; tensors are read from the disk when they are used. All but the VLM's are fp32, since
    renaming computes with them."""
    raw = {name.removeprefix("model."): tensor for name, tensor in read_tensors(file).items()}
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

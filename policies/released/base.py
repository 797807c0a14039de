"""What a released policy is in our words, and what reading one has in common whoever wrote it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...config import find, load_tree, merge, parse
from ...data import Contract
from ...data.transforms import Affine
from ...errors import UserError
from ...vla import Spec
from ...vla.graph import Graph
from ...vla.weights.released import Layout, Shapes, spec_changes, vlm_config
from ..inputs import Settings

VLM = "vlm"  # the folder in the checkpoint that holds what the VLM needs
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Release:
    """A released policy in our words.

    Attributes:
        spec: whose VLM lies in ``path:vlm``; vlm: its transformers config.
        weights: in the names of the spec's ``Model``, not yet compared with them.
        state, action: as states are normalised and actions are not.
        tokenizer: of transformers.
        origin: format, type and, as far as it is known, repository, revision and licence.
        file: where the weights were, and ``way_out``: what to do when they do not fit.
    """

    spec: Spec
    vlm: dict[str, Any]
    weights: dict[str, Tensor]
    contract: Contract
    state: Affine
    action: Affine
    settings: Settings
    tokenizer: Any
    origin: dict[str, str]
    file: Path
    way_out: str


def read_json(file: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        UserError: there is none; it ends with the ``way_out``.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {way_out}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(tree).__name__}; {way_out}")
    return tree


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; they stay on the disk until they are used."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or download it again") from None


def read_weights(source: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights of a folder, in one file or in several that an index names, and the file that errors about them should name."""
    index = source / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return source / WEIGHTS, read_tensors(source / WEIGHTS)
    again = "copy or download the folder again"
    places = read_json(index, again).get("weight_map", {})
    tensors = {name: tensor for part in sorted(set(places.values())) for name, tensor in read_tensors(source / Path(part).name).items()}
    for name in sorted(places.keys() - tensors.keys()):
        raise UserError(f"{index} says that {places[name]} holds '{name}', which it does not; {again}")
    return index, tensors


def read_origin(source: Path, **facts: str | None) -> dict[str, str]:
    """``facts`` and, as far as the folder tells, repository, revision (of a snapshot in the hub's cache) and licence (of its card)."""
    folder, card = source.resolve(), source / "README.md"
    found = {"licence": _licence(card.read_text(encoding="utf-8")) if card.is_file() else None}
    if folder.parent.name == "snapshots":
        found |= {"repository": folder.parent.parent.name.removeprefix("models--").replace("--", "/"), "revision": folder.name}
    order = {name: facts.get(name) or found.get(name) for name in (*facts, "repository", "revision", "licence")}
    return {key: value for key, value in order.items() if value}


def _licence(card: str) -> str | None:
    """As a card's front matter names it, or the link with which its section on the licence begins."""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    named = [re.search(rf"^{key}:\s*(\S+)", front[1], re.MULTILINE) if front else None for key in ("license_name", "license")]
    linked = re.search(r"^#+ *licen[cs]e.*\n+\[[^\]]*\]\(([^)?\s]+)", card, re.MULTILINE | re.IGNORECASE)
    return next((match[1] for match in (*named, linked) if match), None)


def load_tokenizer(name: str | None, named_by: Path | str, given: Path | None) -> Any:
    """The tokenizer in the folder ``given``, or the one of this hub ``name`` in the local cache.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given or name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if given is not None:
            raise UserError(f"--tokenizer {given} holds no tokenizer ({str(error).splitlines()[0]}); give a folder with one") from None
        raise UserError(
            f"the tokenizer '{name}' that {named_by} names is not on this machine; download it "
            f"(hf download {name}) or give a folder that holds it: --tokenizer FOLDER"
        ) from None


@dataclass(frozen=True)
class Sizes:
    """What a policy's tensors do not tell of its spec.

    Attributes:
        image: (Y, X) of its images; words: its text tokens; chunk: its action steps; steps: of its flow; state: numbers that it takes.
    """

    image: tuple[int, int]
    words: int
    chunk: int
    steps: int
    state: int
    cameras: tuple[str, ...]


def by_layout(layout: Layout, tensors: Mapping[str, Tensor], file: Path, sizes: Sizes, way_out: str) -> dict[str, Any]:
    """Spec, VLM and weights of a pi0, pi0.5 or SmolVLA, as keyword arguments of ``Release``.

    A ``model.`` before every name is dropped. All but the VLM's weights become fp32, since renaming computes with them.

    Raises:
        UserError: a tensor is missing or of a name that the layout has not, or the images are not of the tower's size.
    """
    raw = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    shapes = Shapes({name: tuple(tensor.shape) for name, tensor in raw.items()}, file)
    vlm = vlm_config(layout, shapes)
    changes = spec_changes(layout, shapes, vlm, sizes.image, sizes.words, len(sizes.cameras))
    try:
        weights = layout.rename({name: tensor if name.startswith(layout.vlm) else tensor.float() for name, tensor in raw.items()})
    except KeyError as error:
        raise UserError(f"{file} has a tensor '{error.args[0]}' that a {layout.spec} has not; {way_out}") from None
    path = find(layout.spec, "model")
    tree = merge(load_tree(path), changes)
    und = tree["experts"]["und"]
    und["weights"] = f"path:{VLM}" if und["frozen"] else f"random:path:{VLM}"
    tree["streams"]["action"]["length"] = sizes.chunk
    spec = parse(Spec, tree | {"state_dim": sizes.state, "cameras": sizes.cameras}, path)
    phases = {name: phase.model_copy(update={"steps": phase.steps and sizes.steps}) for name, phase in Graph(spec).phases.items()}
    return {
        "spec": spec.model_copy(update={"schedule": phases}),
        "vlm": vlm,
        "weights": weights,
        "file": file,
        "way_out": way_out,
    }

"""A released policy as a checkpoint that acts the same: of lerobot (pi0, pi0.5, SmolVLA), openpi (pi0, pi0.5) and Isaac-GR00T (N1.5, N1.6,
N1.7).

What its transforms do becomes settings and statistics, so that the policy needs no word of where it came from. The code that it was
written with is not needed: its folder is JSON and safetensors.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from ..config import dump
from ..data import Contract, Observation
from ..data.files import atomic_folder
from ..data.transforms import Affine
from ..errors import UserError
from ..vla.model import Model, sketch
from ..vla.spec import PretrainedExpert
from ..vla.weights import Reference, digest
from .checkpoint import read_checkpoint, write_checkpoint, write_golden
from .inputs import PlainPrompts
from .released import Release, groot, lerobot, openpi
from .released.base import VLM, WEIGHTS
from .released.groot_robot import Asked
from .triune import anchored, from_checkpoint, graph_info

TEXT = "Task: stack_it, State: -1 0 255;\nAction: "  # a tokenizer must say the same of it after saving


def convert(
    source: Path,
    out: Path,
    tokenizer: Path | None = None,
    config: str | None = None,
    changes: Sequence[str] | None = None,
    embodiment: str | None = None,
) -> Contract:
    """Write the checkpoint ``out``; it appears whole or not at all.

    Args:
        source: a folder that lerobot, openpi or Isaac-GR00T wrote.
        tokenizer: a folder with the tokenizer, where the local hub cache does not hold the one that the policy names.
        config: what a folder of openpi or GR00T N1.5 does not tell: a name in ``configs/openpi`` or ``configs/groot``, or a YAML file like
            those; changes: of its values.
        embodiment: the robot, of those that a GR00T folder holds.

    Returns:
        the checkpoint's contract.

    Raises:
        UserError: ``out`` is there already; a file is missing or damaged; the policy does what a spec has no words for.
    """
    if out.exists():
        raise UserError(f"{out} is there already; give a new folder, or remove it first")
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; give the folder of a released policy")
    kind = "GR00T" if groot.wrote(source) else "openpi" if openpi.wrote(source) else "lerobot"
    if kind == "lerobot" and (config is not None or changes):
        raise UserError(f"{source} is of lerobot, whose folders tell what --config and KEY=VALUE are for; leave them out")
    if kind != "GR00T" and embodiment is not None:
        raise UserError(f"{source} is of {kind} and of one robot; leave --embodiment out")
    if kind == "GR00T":
        release = groot.read(source, tokenizer, Asked(embodiment, config, tuple(changes or ())))
    elif kind == "openpi":
        release = openpi.read(source, tokenizer, config, list(changes or []))
    else:
        release = lerobot.read(source, tokenizer)
    write(release, out)
    return release.contract


def write(release: Release, out: Path) -> None:
    """Write ``release`` as the checkpoint ``out``, with golden observations.

    Raises:
        UserError: its weights are not those of its spec, or its tokenizer cannot be saved.
    """
    name = next(name for name, expert in release.spec.experts.items() if isinstance(expert, PretrainedExpert))
    words, inside = release.tokenizer, f"mot.experts.{name}.model."
    with atomic_folder(out) as folder:
        (folder / VLM).mkdir()
        (folder / VLM / "config.json").write_text(json.dumps(release.vlm, indent=2))
        words.save_pretrained(folder / VLM)
        weights = fitted(release, sketch(anchored(release.spec, folder)), inside)
        if release.spec.experts[name].frozen:  # transformers reads them under its own names
            own = {key.removeprefix(inside): weights.pop(key) for key in list(weights) if key.startswith(inside)}
            save_file(own, folder / VLM / WEIGHTS, metadata={"format": "pt"})
        write_checkpoint(
            folder,
            spec=dump(release.spec),
            contract=release.contract,
            statistics={"observation.state": release.state.model_dump(mode="json"), "action": release.action.model_dump(mode="json")},
            weights=weights,
            references={name: Reference(kind="vlm", ref=f"path:{VLM}", sha256=digest(folder / VLM))},
            settings=release.settings.model_dump(mode="json"),
            source=release.origin,
            graph=graph_info(release.spec),
        )
        policy = from_checkpoint(read_checkpoint(folder), precision="fp32")
        assert isinstance(policy.prompts, PlainPrompts)
        if policy.prompts.tokenizer(TEXT)["input_ids"] != words(TEXT)["input_ids"]:
            raise UserError(f"the tokenizer {words.name_or_path} gives other tokens once it is saved; give another as --tokenizer FOLDER")
        square = release.settings.resize is not None and release.settings.resize.shape == "square"
        write_golden(folder, policy, _observations(release.contract, release.state, (8, 8) if square else (6, 8)))


def fitted(release: Release, model: Model, inside: str) -> dict[str, Tensor]:
    """The weights for ``model``, a sketch of the spec, whose VLM's names begin with ``inside``.

    Raises:
        UserError: naming the first tensor that is missing, too many or of another shape.
    """
    found, kind = dict(release.weights), release.spec.name
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    head, words = f"{inside}lm_head.weight", next((name for name in wanted if name.endswith(".embed_tokens.weight")), "")
    if head not in wanted and head in found:  # one tensor, under either name
        found[words] = found.get(words, found.pop(head))
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "missing" if name in wanted else "too many"
        raise UserError(f"{release.file}: {name} is {what} for a {kind} of its sizes; {release.way_out}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise UserError(f"{release.file}: {name} has shape {tuple(found[name].shape)} instead of {tuple(shape)}; {release.way_out}")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _observations(contract: Contract, state: Affine, cells: tuple[int, int]) -> list[Observation]:
    """Golden ones: coarse noise of so many rows and columns, states over their range, and where cameras are optional one that sees with
    the first alone."""
    rng = np.random.default_rng(0)
    found = []
    for number, text in enumerate(("pick up the cube", "open the drawer", "put the cup on the plate", "close it", "push the block")):
        names = contract.camera_names[:1] if number == 4 and contract.cameras[-1].optional else contract.camera_names
        images = {name: np.kron(rng.integers(0, 256, (*cells, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for name in names}
        found.append(Observation(images, state.unnormalise(rng.uniform(-1, 1, contract.state.size)), text))
    return found

"""Whether datasets fit a spec: what training refuses, and ``vla doctor`` tells."""

import numpy as np
from torch import Tensor

from ...data import Contract, Dataset
from ...data.inspect import Finding
from ...data.propose import stand_ins
from ...errors import UserError
from ...vla import Model, Spec
from ...vla.experts.pretrained import PretrainedVLM, PromptEncoder
from ...vla.spec import FlowHead, LatentHead
from ..inputs import PlainPrompts, Settings
from ..triune import prompt
from .demonstrations import Demonstrations


def encode_tasks(
    vlm: PretrainedVLM,
    encoder: PromptEncoder | PlainPrompts,
    spec: Spec,
    demonstrations: Demonstrations,
    settings: Settings,
    contract: Contract,
) -> tuple[Tensor, Tensor] | None:
    """Prompt ids and presence of every task, (tasks, T); None where prompts tell the state, too.

    Raises:
        UserError: one does not fit into the prompt's stream, or holds more or fewer image tokens than the images give.
    """
    words = settings.words
    if words is not None and words.state_bins:
        return None
    template = contract.prompt or "{instruction}"
    plain = [prompt(contract, task) for task in demonstrations.tasks]
    texts = plain if words is None else [words.fill(template, task, np.zeros(0)) for task in demonstrations.tasks]
    ids, present = encoder(texts, spec.views)
    if settings.resize is None:
        height, width = demonstrations.datasets[0].source(spec.cameras[0]).size(0)
        rows, columns = vlm.grid((height, width))
        room = int((ids[0] == vlm.image_token).sum()) // spec.views
        if rows * columns != room:
            raise UserError(
                f"images are {height}x{width}, which give {rows * columns} tokens each, and {spec.name} has room for {room}; "
                f"{_made_for(vlm.side)}, or go on from a policy that scales its images (init)"
            )
    return ids, present


def check_dataset(demonstrations: Demonstrations, spec: Spec, action_key: str, settings: Settings) -> None:
    """Refuse datasets that do not fit the spec.

    Raises:
        UserError: naming the column, the camera, the sizes or the dimensions that differ.
    """
    check_spec(spec)
    for finding in misfits(demonstrations, spec, action_key, settings):
        raise UserError(f"{finding.sentence}; {finding.mend}")


def misfits(demonstrations: Demonstrations, spec: Spec, action_key: str, settings: Settings) -> list[Finding]:
    """What of the datasets does not fit a spec that passed ``check_spec``."""
    head, found = next(h for h in spec.heads.values() if isinstance(h, FlowHead)), []
    foreseen = {c: (n, h.image_size) for n, h in spec.heads.items() if isinstance(h, LatentHead) for c in h.cameras}
    for dataset in demonstrations.datasets:
        if action_key not in dataset.vectors:
            known = ", ".join(k for k in dataset.vectors if k.startswith("action"))
            found.append(Finding("column", f"{dataset.path} has no column '{action_key}'", f"set action_key to one of {known}"))
        if "observation.state" not in dataset.vectors:
            sentence = f"{dataset.path} has no column 'observation.state' (it has {', '.join(dataset.vectors)})"
            found.append(Finding("column", sentence, "say in a mapping what the state is: vla data inspect --write"))
        missing = [c for c in spec.cameras if c not in dataset.cameras]
        if missing:
            sentence = f"{dataset.path} has no camera {', '.join(missing)} (it has {', '.join(dataset.cameras)}), which {spec.name} sees"
            mend = "record it, or say by `cameras:` which of the dataset's cameras stand in for its views, in order"
            guess = stand_ins(spec.cameras, dataset.cameras)
            mend += f", such as cameras=[{','.join(guess)}]" if guess else ""
            found.append(Finding("cameras", sentence, mend))
        for camera, (name, _) in foreseen.items():
            if camera not in dataset.cameras and camera not in missing:
                sentence = f"{dataset.path} has no camera {camera} (it has {', '.join(dataset.cameras)}), which heads.{name} foresees"
                found.append(Finding("cameras", sentence, f"name cameras that it has: overrides.heads.{name}.cameras=[...]"))
        found += _size_misfits(dataset, spec, settings, foreseen)
        turned = settings.angles
        for what, most, key in (
            ("state", spec.state_dim - (turned.added if turned else 0), "observation.state"),
            ("action", head.action_dim, action_key),
        ):
            have = dataset.vectors[key].shape[1] if key in dataset.vectors else 0
            if what == "state" and turned is not None and 0 < have < turned.groups[-1][1]:
                sentence = (
                    f"{dataset.path}: '{key}' has {have} dimensions, of which the policy takes those up to {turned.groups[-1][1]} as angles"
                )
                found.append(Finding("dimensions", sentence, "map the state in the order that the policy knows"))
            if have > most:
                sentence = f"{dataset.path}: '{key}' has {have} dimensions, {spec.name} takes {most} for its {what} at most"
                found.append(Finding("dimensions", sentence, f"choose fewer in the mapping, or set the spec's {what}_dim"))
    return found


def _size_misfits(dataset: Dataset, spec: Spec, settings: Settings, foreseen: dict[str, tuple[str, int]]) -> list[Finding]:
    """Images that cannot become one batch, or not the target of the foresight ``foreseen`` (camera -> head and side)."""
    sizes = {c: dataset.source(c).size(0) for c in dict.fromkeys((*spec.cameras, *foreseen)) if c in dataset.cameras}
    said, found = {camera: f"{height}x{width}" for camera, (height, width) in sizes.items()}, []
    seen = [camera for camera in spec.cameras if camera in sizes]
    if settings.resize is None and len({sizes[camera] for camera in seen}) > 1:
        several = ", ".join(f"{camera} {said[camera]}" for camera in seen)
        sentence = f"{dataset.path} has images of several sizes, {several}, which {spec.name} does not scale"
        found.append(Finding("size", sentence, "record them at one size, or go on from a policy that scales its images (init)"))
    for camera, (name, side) in foreseen.items():
        if camera in sizes and sizes[camera] != (side, side):
            sentence = f"{dataset.path}: camera {camera} is {said[camera]}, heads.{name} foresees {side}x{side}"
            mend = f"record at that size, or set overrides.heads.{name}.image_size and the length of its stream"
            found.append(Finding("size", sentence, mend))
    return found


def own_parameters(spec: Spec, module: Model) -> dict[str, Tensor]:
    """Parameters outside the experts that the spec freezes: those whose weights no reference names."""
    frozen = tuple(f"mot.experts.{n}." for n, e in spec.experts.items() if e.frozen)
    return {n: p for n, p in module.named_parameters() if not n.startswith(frozen)}


def refuse_unlearned(spec: Spec, module: Model) -> None:
    """Refuse to begin with random weights that will not learn.

    Raises:
        UserError: naming the parts.
    """
    still = sorted({".".join(n.split(".")[1:3]) for n, p in own_parameters(spec, module).items() if not p.requires_grad})
    if still:
        raise UserError(
            f"{', '.join(still)} would stay random: what does not learn, or learns by adapters, must come from a checkpoint: name it "
            "as init, or let it learn"
        )


def _made_for(side: int | None) -> str:
    return "record at another size" if side is None else f"record at {side}x{side}"


def check_spec(spec: Spec) -> None:
    """Refuse a spec that takes what this kind of recipe does not make of a dataset.

    Raises:
        UserError: naming the stream or the head.
    """
    given = [f"streams.{n} ({s.tokens})" for n, s in spec.streams.items() if s.tokens in ("features", "words")]
    given += [f"heads.{n} (latents)" for n, h in spec.heads.items() if isinstance(h, LatentHead) and h.autoencoder is None]
    if given or not any(s.tokens == "prompt" for s in spec.streams.values()):
        what = ", ".join(given) or "no prompt"
        raise UserError(
            f"{spec.name} takes {what}, which policy recipes do not make of a dataset; they encode prompts by a pretrained VLM and "
            "frames by the head's autoencoder: use a spec with these, or call Model.losses with tensors of your own"
        )

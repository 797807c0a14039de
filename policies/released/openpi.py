"""A pi0 or pi0.5 folder of openpi's PyTorch code: what it says, and what only the training config that made it knows.

``model.safetensors``                    in the names of ``models_pytorch/pi0_pytorch.py``
``assets/<asset id>/norm_stats.json``    of ``shared/normalize.py``
``config.json``                          of ``examples/convert_jax_model_to_pytorch.py`` alone: the chunk's length

What happens to states, actions, pictures and words is that of openpi's ``transforms.py``, ``models/tokenizer.py``,
``ModelTransformFactory`` of ``training/config.py`` and ``image_tools.py`` of its client (commit 15a9616a). Its network runs in bf16,
ours in fp32.
"""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, PositiveFloat, PositiveInt

from ...config import Strict, find, load_tree, parse
from ...data import Camera, Contract, Vector
from ...data.transforms import Affine, Relative
from ...errors import UserError
from ...vla.weights.released import LAYOUTS
from ..inputs import Resize, Settings, Words
from .base import Release, Sizes, by_layout, load_tokenizer, read_json, read_origin, read_weights

Slot = Literal["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
SLOTS: tuple[Slot, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
KINDS = {"time_mlp_in.weight": "pi05", "action_time_mlp_in.weight": "pi0"}
"""A tensor -> the only kind of policy that has it."""
CLEAN = ((r"\A\s+|\s+\Z", ""), (r"[_\n]", " "))
PROMPTS = {False: "{instruction}\n", True: "Task: {instruction}, State: {state};\nAction: "}
EPS = 1e-6
TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings."
WAY_OUT = "give a folder that openpi's PyTorch training or its convert_jax_model_to_pytorch.py wrote"


class Training(Strict):
    """What a training config of openpi says and the folder that it wrote does not (``configs/openpi``). What is left out is unknown.

    Attributes:
        kind: of network, which its tensors must confirm.
        words: ``max_token_len``; chunk: ``action_horizon``, of ``config.json`` where there is one; executed: steps of it.
        normalisation: ``quantile`` where openpi has ``use_quantile_norm``.
        state_in_prompt: ``discrete_state_input``.
        asset: ``asset_id``, where the folder has several.
        cameras: which picture openpi's data transform puts into which of its three slots; slots that it fills with black are left out.
        state, action: their numbers after that transform, by name or by how many there are; by default as many as have statistics.
        relative: what its ``DeltaActions`` gave to ``make_bool_mask``: so many actions are relative to the state, minus so many are not.
        mode: what actions are after ``AbsoluteActions``; by default absolute where some are relative before.
    """

    kind: Literal["pi0", "pi05"]
    words: PositiveInt
    normalisation: Literal["mean_std", "quantile"]
    state_in_prompt: bool | None = None
    chunk: PositiveInt | None = None
    executed: PositiveInt | None = None
    steps: PositiveInt = 10
    asset: str | None = None
    cameras: dict[Slot, str] = {slot: slot for slot in SLOTS}
    state: PositiveInt | tuple[str, ...] | None = None
    action: PositiveInt | tuple[str, ...] | None = None
    relative: tuple[int, ...] | None = None
    mode: Literal["absolute", "relative"] | None = None
    rate: PositiveFloat | None = None
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None


class _Row(BaseModel):
    mean: list[float]
    std: list[float]
    q01: list[float] | None = None
    q99: list[float] | None = None


class _Statistics(BaseModel):
    norm_stats: dict[str, _Row]


def wrote(source: Path) -> bool:
    """Whether openpi wrote the folder ``source``."""
    told = read_json(source / "config.json", WAY_OUT) if (source / "config.json").is_file() else {}
    return "type" not in told and ("paligemma_variant" in told or any((source / part).is_dir() for part in ("assets", "params")))


def read(source: Path, tokenizer: Path | None, config: str | None, changes: list[str]) -> Release:
    """The policy in ``source``.

    Args:
        tokenizer: a folder with PaliGemma's tokenizer, where the local hub cache does not hold it.
        config: a name in ``configs/openpi`` or a YAML file; by default what is common to all policies of its kind. ``changes`` of it.

    Raises:
        UserError: a file is missing or damaged; something is unknown without which no action can be computed.
    """
    if (source / "params").is_dir() and not (source / "model.safetensors").is_file():
        raise UserError(
            f"{source} holds openpi's JAX weights; convert them with openpi's own examples/convert_jax_model_to_pytorch.py "
            f"(--checkpoint_dir {source} --config_name NAME --output_path FOLDER), copy {source / 'assets'} into FOLDER and give that"
        )
    file, tensors = read_weights(source)
    kind = next((kind for name, kind in KINDS.items() if name in tensors), None)
    if kind is None:
        raise UserError(f"{file} is neither a pi0 nor a pi0.5: it has none of {', '.join(KINDS)}; {WAY_OUT}")
    path = find(config or kind, "openpi")
    known = parse(Training, load_tree(path, changes), path)
    if known.kind != kind:
        raise UserError(f"{path} is of a {known.kind}, {file} holds a {kind}; give the training config that made it: --config NAME")
    told = read_json(source / "config.json", WAY_OUT) if (source / "config.json").is_file() else {}
    chunk, talks = _asked(source, known, told.get("action_horizon"))
    statistics, asset = _statistics(source, known)
    state, felt = _vector("state", known.state, statistics.norm_stats["state"], known, asset)
    action, done = _vector("action", known.action, statistics.norm_stats["actions"], known, asset)
    relative = _relative(known, state, action)
    side = isqrt(len(tensors[f"{TOWER}position_embedding.weight"])) * tensors[f"{TOWER}patch_embedding.weight"].shape[-1]
    contract = Contract(
        cameras=tuple(Camera(name=known.cameras[slot], flip=None, optional=True) for slot in SLOTS if slot in known.cameras),
        state=state,
        action=action.model_copy(update={"mode": known.mode or ("absolute" if relative else None)}),
        rate=known.rate,
        chunk=chunk,
        executed=known.executed or chunk,
        prompt=PROMPTS[talks],
    )
    network = tensors["action_in_proj.weight"].shape[1]
    sizes = Sizes((side, side), known.words, chunk, known.steps, network, contract.camera_names)
    facts = {"config": config, "repository": known.repository, "revision": known.revision, "licence": known.licence}
    return Release(
        **by_layout(LAYOUTS[kind], tensors, file, sizes, WAY_OUT),
        contract=contract,
        state=felt,
        action=done,
        settings=Settings(
            resize=Resize(height=side, width=side, at="centre", filter="pillow"),
            words=Words(edits=CLEAN, state_bins=256 if talks else None, truncate=True),
            relative=relative,
        ),
        tokenizer=load_tokenizer("google/paligemma-3b-pt-224", "openpi", tokenizer),
        origin=read_origin(source, format="openpi", type=kind, **facts),
    )


def _asked(source: Path, known: Training, horizon: int | None) -> tuple[int, bool]:
    """The chunk's length, and whether the prompt tells the state: nothing can be computed without them."""
    if horizon is not None and known.chunk not in (None, horizon):
        way_out = "correct the one or the other"
        raise UserError(f"{source / 'config.json'} says action_horizon {horizon}, the training config {known.chunk}; {way_out}")
    chunk = horizon or known.chunk
    missing = [word for word, value in (("chunk=N", chunk), ("state_in_prompt=true|false", known.state_in_prompt)) if value is None]
    if chunk is None or known.state_in_prompt is None:
        theirs = "action_horizon and discrete_state_input of its model config"
        raise UserError(f"{source} does not tell {theirs}; add {' and '.join(missing)}, or the training config: --config NAME")
    return chunk, known.state_in_prompt


def _statistics(source: Path, known: Training) -> tuple[_Statistics, Path]:
    files = {file.parent.relative_to(source / "assets").as_posix(): file for file in sorted((source / "assets").rglob("norm_stats.json"))}
    if not files:
        way_out = "copy the folder 'assets' of the checkpoint that it was made from into it"
        raise UserError(f"{source} has no assets/<asset id>/norm_stats.json, without which no state can be normalised; {way_out}")
    if known.asset not in files and (known.asset or len(files) > 1):
        wanted = f"no statistics '{known.asset}'" if known.asset else f"statistics of {len(files)} robots"
        raise UserError(f"{source / 'assets'} holds {wanted}; choose one by asset=NAME: {', '.join(files)}")
    file = files[known.asset or next(iter(files))]
    found = parse(_Statistics, read_json(file, WAY_OUT), file)
    for key in ("state", "actions"):
        if key not in found.norm_stats:
            raise UserError(f"{file} has no statistics of '{key}'; copy it again from the checkpoint that it belongs to")
    return found, file


def _vector(what: str, wanted: int | Sequence[str] | None, row: _Row, known: Training, file: Path) -> tuple[Vector, Affine]:
    """Names and normalisation of a state or action: openpi cuts off the statistics of numbers that a robot does not have."""
    ends = (row.q01, row.q99) if known.normalisation == "quantile" else (row.mean, row.std)
    size = wanted if isinstance(wanted, int) else len(wanted or row.mean)
    low, high = (np.array((end or [])[:size]) for end in ends)
    if min(len(low), len(high)) < size:
        way_out = f"correct {what}=..., or give another asset"
        raise UserError(f"{file} has no {known.normalisation} statistics of {size} numbers for {what}; {way_out}")
    scale, bias = ((high - low + EPS) / 2, -1.0) if known.normalisation == "quantile" else (high + EPS, 0.0)
    names = tuple(wanted) if isinstance(wanted, Sequence) else tuple(f"{what}_{i}" for i in range(size))
    return Vector(names=names, normalisation=known.normalisation), Affine(shift=tuple(low.tolist()), scale=tuple(scale.tolist()), bias=bias)


def _relative(known: Training, state: Vector, action: Vector) -> Relative | None:
    mask = [run > 0 for run in known.relative or () for _ in range(abs(run))]
    if not any(mask):
        return None
    if len(mask) > min(state.size, action.size):
        sizes = f"a state of {state.size} and actions of {action.size} numbers"
        raise UserError(f"relative names {len(mask)} actions, more than {sizes} have; give what DeltaActions gave to make_bool_mask")
    mask += [False] * (action.size - len(mask))
    return Relative(state_of=tuple(i if relative else None for i, relative in enumerate(mask)))

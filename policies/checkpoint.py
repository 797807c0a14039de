"""The deployable checkpoint folder: weights, conventions and proof in one place. Safetensors, JSON, YAML and PNG only.

``spec.yaml``          the model's spec, resolved
``model.safetensors``  trained weights; frozen pretrained ones are named in ``policy.json`` and not repeated
``contract.json``      cameras, state and action conventions
``statistics.json``    what normalises states and actions
``policy.json``        versions, weights references with their sha256, settings of the policy
``golden/``            observations, noise keys and the actions they gave: what is served is what was trained
``manifest.json``      sha256 of every file above
``config.json``        and ``policy_preprocessor.json``, ``policy_postprocessor.json``: lerobot opens the folder by them
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import JsonValue

from ..config import Strict, parse
from ..data import Contract, Observation
from ..data.files import sha256, write_file
from ..errors import UserError
from ..vla.weights import Reference, resolve_reference
from .base import Policy, Request
from .lerobot import BESIDE, is_lerobot, lerobot_files
from .tuning import Tuning

MANIFEST = "manifest.json"
PARTS = ("spec.yaml", "contract.json", "statistics.json", "policy.json", "model.safetensors")
LAST = (
    "checkpoints/last",
    "last",
    "checkpoints/last/pretrained_model",
    "last/pretrained_model",
    "pretrained_model",
)  # the latter lerobot's
MIN_GOLDEN = 4
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # largest difference, relative to the largest golden action
MEND = "copy the checkpoint again from where it came, or train it anew"

Dtype = Literal["float32", "bfloat16"]
T = TypeVar("T", bound=Strict)


class GraphInfo(Strict):
    """The attention graph that was trained: row -> column -> relation, and its hash."""

    hash: str
    matrix: dict[str, dict[str, str]]


class Base(Strict):
    """The checkpoint whose other weights a fine-tuned one stands on.

    Attributes:
        path: its folder.
        sha256: of its ``manifest.json``.
    """

    path: str
    sha256: str


class PolicyInfo(Strict):
    """What ``policy.json`` says.

    Attributes:
        format: version of the folder's layout.
        versions: package -> version that wrote it.
        weights: name of an expert or tokenizer -> the pretrained weights it stands on.
        settings: whatever else the policy needs to be built again.
        source: where a converted policy comes from.
        graph: the attention graph that was trained.
        base: what it was fine-tuned from, where ``model.safetensors`` holds only what learned then.
        experts: how their weights learned, where not as the spec says.
    """

    format: Literal[1] = 1
    versions: dict[str, str]
    weights: dict[str, Reference] = {}
    settings: dict[str, JsonValue] = {}
    source: dict[str, str] = {}
    graph: GraphInfo | None = None
    base: Base | None = None
    experts: dict[str, Tuning] = {}


class Manifest(Strict):
    """What ``manifest.json`` says: file name -> sha256."""

    format: Literal[1] = 1
    files: dict[str, str]


class GoldenCase(Strict):
    """One observation and the chunk it gave: ``policy.reset(session, seed)``, then one plan."""

    images: dict[str, str]
    state: list[float]
    instruction: str
    timestamp: float
    seed: int
    actions: list[list[float]]


class Golden(Strict):
    """What ``golden/golden.json`` says. ``tolerance``: dtype of the policy -> largest absolute difference of an action."""

    tolerance: dict[str, float]
    cases: list[GoldenCase]


@dataclass(frozen=True)
class GoldenRow:
    """Result of one golden observation: ``error`` is the largest absolute difference over its actions, in action units."""

    case: int
    error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose hashes were verified.

    Attributes:
        folder: where it is.
        contract: conventions.
        statistics: content of ``statistics.json``.
        info: content of ``policy.json``.
        manifest: file name -> sha256.
    """

    folder: Path
    contract: Contract
    statistics: dict[str, Any]
    info: PolicyInfo
    manifest: Manifest

    @property
    def spec(self) -> Path:
        """The spec's file."""
        return self.folder / "spec.yaml"

    @property
    def weights(self) -> Path:
        """The file of trained weights."""
        return self.folder / "model.safetensors"

    @cached_property
    def golden(self) -> Golden | None:
        """Observations with known answers; ``None`` if the checkpoint was written without."""
        name = "golden/golden.json"
        return _read(self.folder, name, Golden) if name in self.manifest.files else None

    def observations(self) -> list[Observation]:
        """The golden observations; none if it was written without."""
        found = []
        for case in self.golden.cases if self.golden else ():
            images = {camera: np.asarray(Image.open(self._listed(name)).convert("RGB")) for camera, name in case.images.items()}
            found.append(Observation(images, np.array(case.state, np.float32), case.instruction, case.timestamp))
        return found

    def _listed(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise UserError(f"{self.folder}: golden.json names '{name}', which the manifest does not list; {MEND}")
        return self.folder / name

    def reference(self, name: str, download: bool = True) -> Path:
        """The folder of the pretrained weights ``name``, its content checked.

        Raises:
            UserError: the checkpoint refers to no such weights, they are not there, or they are others.
        """
        if name not in self.info.weights:
            known = ", ".join(self.info.weights) or "none"
            raise UserError(f"{self.folder}: policy.json names no weights '{name}' (there are: {known}); {MEND}")
        return resolve_reference(self.info.weights[name], self.folder, download)

    def lineage(self) -> list["Checkpoint"]:
        """What it was fine-tuned from, the first one first, and itself.

        Raises:
            UserError: one of them is not there, or is another one.
        """
        if self.info.base is None:
            return [self]
        folder, mend = Path(self.info.base.path), "put it back, or merge the two where both are: vla model merge"
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{self.folder} was fine-tuned from the checkpoint {folder}, which is not there; {mend}")
        if sha256(folder / MANIFEST) != self.info.base.sha256:
            raise UserError(f"{self.folder} was fine-tuned from another checkpoint than the one in {folder} now; {mend}")
        return [*read_checkpoint(folder).lineage(), self]


def write_checkpoint(
    folder: Path,
    *,
    spec: str,
    contract: Contract,
    statistics: Mapping[str, Any],
    weights: Mapping[str, Any],
    references: Mapping[str, Reference],
    settings: Mapping[str, JsonValue] | None = None,
    source: Mapping[str, str] | None = None,
    graph: GraphInfo | None = None,
    base: Path | None = None,
    experts: Mapping[str, Tuning] | None = None,
) -> None:
    """Write a deployable checkpoint, without golden observations, into an existing folder.

    Args:
        spec: the resolved spec as YAML.
        statistics: JSON values.
        weights: trained tensors by name, on the CPU.
        references: pretrained weights by name, as ``vla.weights.make_reference`` gives them.
        settings: JSON values.
        source: where a converted policy comes from.
        graph: the attention graph of the spec.
        base: the checkpoint that holds the weights which did not learn; experts: how the others did.
    """
    from safetensors.torch import save_file

    versions = {name: version(name) for name in ("triune-vla", "torch", "transformers", "safetensors")}
    info = PolicyInfo(
        versions=versions,
        weights=dict(references),
        settings=dict(settings or {}),
        source=dict(source or {}),
        graph=graph,
        base=None if base is None else Base(path=str(base.resolve()), sha256=sha256(base / MANIFEST)),
        experts=dict(experts or {}),
    )
    write_file(folder / "spec.yaml", spec)
    write_file(folder / "contract.json", contract.model_dump_json(indent=2))
    write_file(folder / "statistics.json", json.dumps(dict(statistics), indent=2, allow_nan=False))
    write_file(folder / "policy.json", info.model_dump_json(indent=2))
    save_file(dict(weights), folder / "model.safetensors")
    for name, text in lerobot_files().items():
        write_file(folder / name, text)
    seal(folder)


def write_golden(folder: Path, policy: Policy, observations: Sequence[Observation], seed: int = 0) -> None:
    """Add golden observations to a checkpoint: what ``policy`` (loaded from it, in fp32) answers to each.

    Raises:
        ValueError: fewer than four observations.
    """
    if len(observations) < MIN_GOLDEN:
        raise ValueError(f"a checkpoint needs at least {MIN_GOLDEN} golden observations, got {len(observations)}")
    (folder / "golden").mkdir(exist_ok=True)
    cases = []
    for index, observation in enumerate(observations):
        images = {camera: f"golden/{index:02d}-{camera}.png" for camera in observation.images}
        for camera, name in images.items():
            Image.fromarray(observation.images[camera]).save(folder / name)
        cases.append(
            GoldenCase(
                images=images,
                state=observation.state.tolist(),
                instruction=observation.instruction,
                timestamp=observation.timestamp,
                seed=seed + index,
                actions=_answer(policy, observation, index, seed + index).tolist(),
            )
        )
    scale = max(float(np.abs(case.actions).max()) for case in cases)
    golden = Golden(tolerance={dtype: factor * max(scale, 1e-6) for dtype, factor in TOLERANCE.items()}, cases=cases)
    write_file(folder / "golden" / "golden.json", golden.model_dump_json(indent=2))
    seal(folder)


def seal(folder: Path) -> None:
    """Write ``manifest.json`` over everything in ``folder`` but the training state and what is lerobot's."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: sha256(folder / name) for name in names if name != MANIFEST and not name.startswith(("training/", *BESIDE))}
    write_file(folder / MANIFEST, Manifest(files=files).model_dump_json(indent=2))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint, or the last one of a run, with every file's hash verified.

    Raises:
        UserError: there is no checkpoint, or a file of it is missing, cut off or changed.
    """
    folder = find_checkpoint(path)
    if is_lerobot(folder):
        raise UserError(
            f"{folder} is a policy of lerobot: it acts here as it is, but for this turn it into a checkpoint by vla model convert"
        )
    manifest = _read(folder, MANIFEST, Manifest)
    for name in PARTS:
        if name not in manifest.files:
            raise UserError(f"{folder / MANIFEST} does not list {name}, so the checkpoint is incomplete; {MEND}")
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / MANIFEST} lists '{name}', which is outside the checkpoint; {MEND}")
        if not file.is_file():
            raise UserError(f"{file} is missing; {MEND}")
        if sha256(file) != expected:
            raise UserError(f"{file} is damaged or was changed: its sha256 is not the one in {MANIFEST}; {MEND}")
    statistics = json.loads((folder / "statistics.json").read_text())
    return Checkpoint(folder, _read(folder, "contract.json", Contract), statistics, _read(folder, "policy.json", PolicyInfo), manifest)


def find_checkpoint(path: str | Path) -> Path:
    """The policy checkpoint at ``path``: the folder itself, or the last one of a run folder; it may be a policy of lerobot.

    Raises:
        UserError: there is none; the message says what is there instead.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise UserError(f"there is no checkpoint {given}; give a checkpoint folder or a run folder, such as runs/<recipe>")
    if not given.is_dir():
        raise UserError(f"{given} is a file, not a checkpoint; give the folder that holds policy.json, or the run's folder")
    for folder in (given, *(given / place for place in LAST)):
        if (folder / "policy.json").is_file() or (folder / MANIFEST).is_file():
            if not (folder / MANIFEST).is_file():
                raise UserError(f"{folder} has no {MANIFEST}, so it was not copied whole; {MEND}")
            return folder.resolve()
        if is_lerobot(folder):
            return folder.resolve()
    if (given / "recipe.yaml").is_file():
        way_out = f"finish it with vla train ... --out {given} --resume, or give the run of a policy recipe"
        raise UserError(f"the run in {given} has no policy checkpoint yet; {way_out}")
    raise UserError(
        f"{given} is no policy checkpoint: it holds neither policy.json nor checkpoints/last; give the folder of a run or a checkpoint"
    )


def verify(checkpoint: Checkpoint, policy: Policy, dtype: Dtype = "float32") -> list[GoldenRow]:
    """Ask ``policy`` (loaded from ``checkpoint``, computing in ``dtype``) the golden observations and compare its actions.

    Raises:
        UserError: the checkpoint holds no golden observations.
    """
    if checkpoint.golden is None:
        raise UserError(
            f"{checkpoint.folder} holds no golden observations to verify it by; write it anew by training with the present version"
        )
    tolerance = checkpoint.golden.tolerance[dtype]
    rows = []
    for index, (case, observation) in enumerate(zip(checkpoint.golden.cases, checkpoint.observations(), strict=True)):
        found, expected = _answer(policy, observation, index, case.seed), np.array(case.actions, np.float32)
        error = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        rows.append(GoldenRow(index, error, tolerance, error <= tolerance))
    return rows


def _answer(policy: Policy, observation: Observation, index: int, seed: int) -> np.ndarray:
    session = f"golden-{index}"
    policy.reset(session, seed)
    actions = policy.act(Request(session, observation)).chunk.actions
    policy.close(session)
    return actions


def _read(folder: Path, name: str, model: type[T]) -> T:
    try:
        tree = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name} cannot be read ({error}); {MEND}") from None
    return parse(model, tree, folder / name)

"""``examine``: what of a dataset, a mapping, a recipe, a checkpoint and a world does not fit, and how to mend it.

What is refused here is what training and evaluation refuse, by the same functions; weights are not loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from ..config import parse
from ..data import ChunkSampler, Contract, Dataset, open_dataset
from ..data import inspect as inspection
from ..data.compare import compare_statistics
from ..data.contract import Difference
from ..data.propose import stand_ins
from ..data.robot import load_robot
from ..data.statistics import Sketch, sketch_actions
from ..envs import build_world, camera_names
from ..envs.base import World
from ..envs.view import DEFAULT, choose
from ..errors import UserError
from ..policies import find_checkpoint, read_checkpoint
from ..policies.checkpoint import Checkpoint
from ..policies.inputs import Settings
from ..policies.lerobot import is_lerobot, lerobot_contract
from ..policies.train.policy_recipe import Recipe
from ..policies.train.recipe import read_recipe
from ..policies.triune import read_statistics, spec_of
from . import environment
from .rehearsal import Rehearsal, rehearse

T = TypeVar("T")
Level = Literal["conflict", "unknown", "note"]
LEVELS: dict[str, Level] = dict.fromkeys(("not_finite", "decode", "size", "column", "cameras", "dimensions", "dependency"), "conflict")
LEVELS |= dict.fromkeys(("flip", "gripper", "mode", "names", "rate"), "unknown")
"""Level of what ``inspect`` and others find, by its check; a note where it is not named."""
FIRST = "do what it says and ask again: what depends on it was not compared"
MENDS = {
    "cameras": "name them alike by a mapping (`vla data inspect PATH --write`)",
    **dict.fromkeys(("height", "width"), "record at that size, or fine-tune the policy on data of this one (a recipe with `init`)"),
    **dict.fromkeys(("colour", "flip"), "say in the mapping how the frames lie (`colour:`, `flip:`); they are turned as they are read"),
    "crop": "crop the images alike before they are stored",
    "dimensions": "choose slots in a mapping (`slots:`), so that both have the same dimensions",
    "names": "put the slots of the mapping in the same order, under the same names",
    "units": "correct `unit:` in the mapping where it is wrong; it does not convert, so else record in the other unit",
    **dict.fromkeys(("frame", "rotation"), "correct the mapping where it is wrong; else the data must be brought into that form"),
    "gripper": "look at an episode and correct `gripper:` in the mapping where it is wrong; else turn the sign in the data",
    "mode": "correct `mode:` in the mapping where it is wrong; a recipe learns absolute actions as offsets by `relative:`",
    "rate": "record at that rate, or evaluate at it (`rate:` of a suite)",
    "render": "evaluate as it was recorded (`render:` of a suite), or record with that --render",
}
"""Field of a contract -> what to do where two differ in it."""
SAY = "find it out and say it in the mapping (`vla data inspect PATH --write`)"
ASK = "ask who made it, or look at an episode; nothing need be done where you know that both are alike"
MOST_ACTIONS = 2_000_000
"""Actions that are drawn for the statistics of relative ones."""


@dataclass(frozen=True)
class Finding:
    """``between``: what does not fit what, such as ``policy and world``; ``level``: ``conflict`` where it is refused or fails,
    ``unknown`` where nobody says it, ``note`` where it only costs."""

    level: Level
    between: str
    sentence: str
    mend: str


@dataclass
class Findings:
    """What was found so far."""

    rows: list[Finding] = field(default_factory=list)

    def add(self, level: Level, between: str, sentence: str, mend: str) -> None:
        """One more, once."""
        row = Finding(level, between, " ".join(sentence.split()), mend)
        self.rows += [row] if row not in self.rows else []

    def take(self, between: str, found: inspection.Finding) -> None:
        """One that others found, at the level of its check."""
        self.add(LEVELS.get(found.check, "note"), between, found.sentence, found.mend)

    @contextmanager
    def told(self, between: str) -> Iterator[None]:
        """A refusal inside is a conflict."""
        try:
            yield
        except UserError as error:
            self.add("conflict", between, str(error), FIRST)

    def attempt(self, between: str, work: Callable[[], T]) -> T | None:
        """What ``work`` gives; nothing where it is refused."""
        with self.told(between):
            return work()
        return None

    def compare(self, mine: str, own: Contract, yours: str, other: Contract, level: Level = "conflict") -> None:
        """Where two contracts differ; what only one side says is one unknown."""
        between, silent = f"{mine} and {yours}", dict[str, list[str]]()
        for found in own.compare(other, f"in the {mine}", f"in the {yours}"):
            if found.silent:
                silent.setdefault(found.silent.removeprefix("in the "), []).append(found.sentence)
            else:
                self.add(level, between, found.sentence, _mend(found, own, other))
        for side, sentences in silent.items():
            self.add("unknown", between, "; ".join(sentences), SAY if side in ("data", "recipe") else ASK)


def examine(
    *,
    data: str | None = None,
    robot: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    policy: str | None = None,
    world: str | None = None,
) -> dict[str, Any]:
    """Compare what is given, pair by pair.

    Args:
        data: a dataset, in place of the recipe's; robot: its mapping, in place of the recipe's.
        recipe: name or path of a policy recipe, with ``overrides``.
        policy: a checkpoint, ours or lerobot's.
        world: registry name.

    Returns:
        ready for JSON: ``environment``; ``contracts`` by part (``data``, ``recipe``, ``init``, ``policy``, ``world``); ``statistics``
        (of each checkpoint against the data, by feature); ``findings``; ``passed``: nothing conflicts.
    """
    found, rehearsed = Findings(), Rehearsal()
    for one in environment.findings():
        found.take("environment", one)
    mapping = None if robot is None else found.attempt("mapping", lambda: load_robot(robot))
    checkpoint = None if policy is None else found.attempt("policy", lambda: _open_policy(policy))
    learning = None if recipe is None else found.attempt("recipe", lambda: _policy_recipe(recipe, overrides, data, robot))
    if learning is not None:
        rehearsed = rehearse(learning, found.told, partial(found.take, "recipe and data"))
        for one in rehearsed.notes:
            found.take("recipe", one)
    elif data is not None and (robot is None or mapping is not None):
        opened = found.attempt("data", lambda: open_dataset(data) if mapping is None else mapping.view(open_dataset(data)))
        rehearsed.datasets += [] if opened is None else [opened]
    for dataset in rehearsed.datasets:
        for row in inspection.inspect(dataset)["findings"]:
            found.take(f"data {dataset.path}", inspection.Finding(**row))
    acting = {"policy": checkpoint, "init": rehearsed.base}
    if isinstance(checkpoint, Checkpoint) and rehearsed.base is not None and checkpoint.folder == rehearsed.base.folder:
        del acting["policy"]
    contracts = {part: known.contract if isinstance(known, Checkpoint) else known for part, known in acting.items() if known is not None}
    if rehearsed.contract is not None:
        contracts["recipe"] = rehearsed.contract
    if rehearsed.datasets:
        contracts["data"] = rehearsed.datasets[0].contract
    elif mapping is not None:
        contracts["data"] = mapping.contract
    statistics = {}
    for part, known in acting.items():
        if part in contracts and "data" in contracts:
            found.compare(part, contracts[part], "data", contracts["data"], "note" if part == "init" else "conflict")
        if isinstance(known, Checkpoint):
            _whole(found, part, known)
            if len(rehearsed.datasets) == 1:
                statistics[part] = _drift(found, part, known, rehearsed.datasets[0], learning)
    if world is not None:
        _meet(found, world, contracts, rehearsed.datasets)
    elif contracts.keys() == {"data"} and (gaps := inspection.unknown_fields(contracts["data"])):
        mend = "find them out and say them in a mapping: vla data inspect PATH --write"
        found.add("unknown", "data", f"nobody says {', '.join(gaps)}", mend)
    return {
        "environment": environment.facts(),
        "contracts": {part: contract.model_dump(mode="json") for part, contract in contracts.items()},
        "statistics": statistics,
        "findings": [asdict(row) for row in sorted(found.rows, key=lambda row: get_args(Level).index(row.level))],
        "passed": not any(row.level == "conflict" for row in found.rows),
    }


def _policy_recipe(name: str, overrides: Sequence[str], data: str | None, robot: str | None) -> Recipe:
    _, recipe = read_recipe(name, list(overrides))
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name} is a recipe of kind {recipe.kind}, which has no robot's data; give one of kind policy")
    given = {"data": data} if data is not None else {}
    return recipe.model_copy(update=given | ({"robot": robot} if robot is not None else {}))


def _open_policy(path: str) -> Checkpoint | Contract:
    folder = find_checkpoint(path)
    return lerobot_contract(folder) if is_lerobot(folder) else read_checkpoint(folder)


def _whole(found: Findings, part: str, checkpoint: Checkpoint) -> None:
    """Whether a checkpoint would load: its graph, what it was fine-tuned from, the weights it stands on, its golden observations."""
    with found.told(part):
        spec_of(checkpoint)
    with found.told(part):
        for one in checkpoint.lineage():
            for name in one.info.weights:
                with found.told(part):
                    one.reference(name, download=False)
    if checkpoint.golden is None:
        sentence = f"{checkpoint.folder} holds no golden observations, so nothing can prove that it acts as it was trained"
        found.add("note", part, sentence, "train it anew with the present version, which writes some")


def _drift(found: Findings, part: str, checkpoint: Checkpoint, dataset: Dataset, recipe: Recipe | None) -> dict[str, Any]:
    """The statistics of a checkpoint against those of the data, by feature, where both have the same dimensions."""
    own, contract, tree = read_statistics(checkpoint), dataset.contract, dict[str, Any]()
    if (contract.state.size, contract.action.size) != (checkpoint.contract.state.size, checkpoint.contract.action.size):
        return {}
    settings = parse(Settings, checkpoint.info.settings, checkpoint.folder / "policy.json")
    for key, vector in (("observation.state", contract.state), ("action", contract.action)):
        known, values = own.get(key), dataset.vectors[key]
        if known is None or not np.isfinite(values).all() or np.ndim(getattr(known, "shift", ())) > 1:
            continue
        if key == "action" and settings.counts:
            chunk = checkpoint.contract.chunk or 1
            stride = max(1, len(dataset) * chunk // MOST_ACTIONS)
            sketch = sketch_actions(ChunkSampler(dataset, chunk, 1, 0, foresight=1, stride=stride), settings.counted)
        else:
            sketch = Sketch(values.shape[1])
            sketch.add(values)
        compared = compare_statistics(known, sketch, vector.names)
        tree[key] = compared.tree()
        chosen = recipe.statistics if recipe is not None and part == "init" else None
        if compared.use == "data" and chosen != "data":
            mend = "fine-tune on this data (a recipe with `init` and `statistics: data`), or correct units and slots in the mapping"
            found.add("note", f"{part} and data", f"{key} has drifted from the checkpoint's statistics: {compared.reason}", mend)
        elif compared.use == "checkpoint" and chosen == "data":
            found.add("note", f"{part} and data", f"{key}: {compared.reason}", "`statistics: checkpoint` would keep it so")
    return tree


def _meet(found: Findings, name: str, contracts: dict[str, Contract], datasets: list[Dataset]) -> None:
    """Each part that would act in the world, or come from it, against it as it would be seen."""
    offers = found.attempt("world", lambda: camera_names(name))
    parts = [part for part in ("policy", "recipe") if part in contracts] or [part for part in ("data", "init") if part in contracts][:1]
    if offers is None:
        return
    for part in parts:
        world = _seen(found, f"{part} and world", name, contracts[part], offers)
        if world is not None:
            found.compare(part, contracts[part], "world", world.contract)
            contracts["world"] = world.contract
            tasks = {task for dataset in datasets for task in dataset.tasks}
            if tasks and world.task_description not in tasks:
                sentence = f"the world asks '{world.task_description}', which the data never says (it says {_some(sorted(tasks))})"
                found.add("note", "data and world", sentence, "evaluate in a world of the data's tasks, or record this one, too")
    if not parts:
        world = found.attempt("world", lambda: build_world(name))
        contracts |= {"world": world.contract} if world is not None else {}


def _seen(found: Findings, between: str, name: str, like: Contract, offers: tuple[str, ...]) -> World | None:
    """The world by the cameras, sizes and rate of a contract, as far as it has them."""
    cameras = tuple(camera for camera in like.cameras if camera.name in offers)
    view = found.attempt(between, lambda: choose(like=like.model_copy(update={"cameras": cameras})))
    view = DEFAULT if view is None else view
    world = found.attempt(between, lambda: build_world(name, view))
    return world if world is not None or view.rate is None else found.attempt(between, lambda: build_world(name, replace(view, rate=None)))


def _mend(found: Difference, own: Contract, other: Contract) -> str:
    mend, guess = MENDS[found.field], None
    if found.field == "cameras":
        guess = stand_ins(own.camera_names, other.camera_names)
    pairs = zip(own.camera_names, guess or (), strict=False)
    return mend + (f", perhaps {', '.join(f'{name}: {{source: {source}}}' for name, source in pairs)}" if guess else "")


def _some(words: Sequence[str]) -> str:
    return ", ".join(f"'{word}'" for word in words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")

"""The datasets of a recipe: opened, seen as one robot's, split, and what a policy must know of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import PositiveFloat

from ...config import Strict
from ...data import Contract, Dataset, Statistics, open_dataset
from ...data.mixture import Mixture, Source, split_sources
from ...data.order import Order
from ...data.robot import load_robot
from ...data.sampler import ChunkSampler
from ...data.statistics import Sketch, sketch_actions, sketch_dataset
from ...data.transforms import Relative
from ...errors import UserError


class Data(Strict):
    """One of several datasets.

    Attributes:
        path: a folder, a file or a hub id.
        weight: its share of the samples, relative to the others' weights.
        robot: its mapping, a name in ``configs/robot`` or a path; by default the recipe's.
    """

    path: str
    weight: PositiveFloat = 1.0
    robot: str | None = None


@dataclass(frozen=True)
class Demonstrations:
    """What is learned from, and what is held out.

    Attributes:
        contract: the conventions that all datasets share.
        tasks: every instruction, those of the first dataset first; ``first``: where each dataset's begin.
    """

    sources: list[Source]
    held: list[Source]
    contract: Contract
    tasks: tuple[str, ...]
    first: tuple[int, ...]

    @property
    def datasets(self) -> list[Dataset]:
        """In order."""
        return [source.dataset for source in self.sources]

    def task_of(self, which: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """The number in ``tasks`` of each of some frames (B,), of datasets ``which`` (B,)."""
        return np.array([self.first[d] + self.datasets[d].task_index[f] for d, f in zip(which, frames, strict=True)], np.int64)


def open_demonstrations(data: str | Sequence[Data], robot: str | None, hold_out: float, seed: int) -> Demonstrations:
    """Open the datasets of a recipe.

    Raises:
        UserError: one cannot be read, does not fit its mapping, or has other conventions than the first.
    """
    listed = [Data(path=data)] if isinstance(data, str) else list(data)
    sources = []
    for entry in listed:
        dataset = open_dataset(entry.path)
        name = entry.robot or robot
        sources.append(Source(dataset if name is None else load_robot(name).view(dataset), entry.weight))
    first = sources[0].dataset
    for source in sources[1:]:
        first.contract.require(source.dataset.contract, str(first.path), str(source.dataset.path))
    train, held = split_sources(sources, hold_out, seed) if hold_out else (sources, [])
    starts = np.cumsum([0, *(len(source.dataset.tasks) for source in sources)])
    tasks = tuple(task for source in sources for task in source.dataset.tasks)
    return Demonstrations(train, held, first.contract, tasks, tuple(starts[:-1].tolist()))


def make_sampler(
    sources: Sequence[Source], chunk: int, batch_size: int, seed: int, action_key: str, foresight: int, stride: int, order: Order
) -> ChunkSampler | Mixture:
    """Draws from one dataset, or from several by weight."""
    if len(sources) > 1:
        return Mixture(sources, chunk, batch_size, seed, action_key, foresight, stride, order)
    one = sources[0]
    return ChunkSampler(one.dataset, chunk, batch_size, seed, action_key, foresight, one.episodes, stride, order)


def relative_to(contract: Contract, names: Sequence[str]) -> Relative | None:
    """The actions ``names`` relative to the state dimensions of the same names, in the same units.

    Raises:
        UserError: there is no such action, or no such state.
    """
    if not names:
        return None
    for name in names:
        for part, vector in (("action", contract.action), ("state", contract.state)):
            if name not in vector.names:
                raise UserError(
                    f"relative: there is no {part} called '{name}' ({part}s: {', '.join(vector.names)}); name both alike in the mapping"
                )
    if contract.action.mode == "relative":
        raise UserError("relative: the dataset's actions are relative already; leave it out")
    return Relative(state_of=tuple(contract.state.names.index(n) if n in names else None for n in contract.action.names))


def measure(
    demonstrations: Demonstrations, chunk: int, action_key: str, counted: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
) -> dict[str, Statistics]:
    """Statistics of states and actions over all training episodes; of actions that are ``counted`` from the state, over all steps of all
    chunks."""
    states: Sketch | None = None
    actions: Sketch | None = None
    for source in demonstrations.sources:
        found = sketch_dataset(source.dataset, ["observation.state", action_key], source.episodes)
        if counted is not None:
            sampler = ChunkSampler(source.dataset, chunk, 1, 0, action_key, 1, source.episodes)
            found[action_key] = sketch_actions(sampler, counted)
        states = _joined(states, found["observation.state"])
        actions = _joined(actions, found[action_key])
    assert states is not None and actions is not None
    return {"observation.state": states.statistics(), "action": actions.statistics()}


def _joined(whole: Sketch | None, part: Sketch) -> Sketch:
    if whole is None:
        return part
    whole.merge(part)
    return whole

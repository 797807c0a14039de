"""A recipe up to where its weights would be loaded: each step of ``PolicyTask`` that may refuse, in its order."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from ..data import Contract, Dataset
from ..data.inspect import Finding
from ..data.loader import best_order
from ..policies.checkpoint import Checkpoint, read_checkpoint
from ..policies.inputs import Settings
from ..policies.train.demonstrations import Demonstrations, make_sampler, open_demonstrations
from ..policies.train.fit import check_spec, encode_tasks, misfits, refuse_unlearned
from ..policies.train.optim import resolve_device
from ..policies.train.policy_recipe import Recipe, policy_contract, recipe_settings, recipe_spec
from ..policies.triune import prompt_encoder
from ..policies.tuning import tune
from ..vla import Spec
from ..vla.model import sketch
from ..vla.spec import LatentHead, PretrainedExpert
from ..vla.weights import resolve_weights
from ..vla.weights.references import Kind

Told = Callable[[str], AbstractContextManager[None]]
"""Inside, a refusal becomes a finding about the part that is named."""


@dataclass
class Rehearsal:
    """How far it came.

    Attributes:
        datasets: as they would be learned from; base: the checkpoint to go on from; contract: of the policy that would come out.
        notes: what is allowed and perhaps not meant.
    """

    datasets: list[Dataset] = field(default_factory=list)
    base: Checkpoint | None = None
    contract: Contract | None = None
    notes: list[Finding] = field(default_factory=list)


def rehearse(recipe: Recipe, told: Told, found: Callable[[Finding], None]) -> Rehearsal:
    """Rehearse a recipe; what it would be refused for is ``told`` or ``found``."""
    done = Rehearsal()
    with told("recipe"):
        resolve_device(recipe.train.device)
    with told("recipe"):
        recipe.train.share(1)
    spec: Spec | None = None
    with told("recipe"):
        done.base = None if recipe.init is None else read_checkpoint(recipe.init)
        spec = recipe_spec(recipe, done.base)
    demonstrations: Demonstrations | None = None
    with told("recipe and data"):
        demonstrations = open_demonstrations(recipe.data, recipe.robot, recipe.hold_out, recipe.train.seed)
        done.datasets = demonstrations.datasets
    here = _weights_are_here(spec, told) if spec is not None else False
    if spec is None or demonstrations is None:
        return done
    with told("recipe and data"):
        check_spec(spec)
        settings = recipe_settings(recipe, demonstrations.contract, done.base)
        problems = misfits(demonstrations, spec, recipe.action_key, settings)
        for problem in problems:
            found(problem)
        if not problems:
            done.contract = policy_contract(demonstrations.contract, recipe, spec, done.base)
            _draw(recipe, spec, demonstrations, done.contract)
            done.notes += _notes(recipe, spec, done.contract, done.base)
            if here:
                _sketch(recipe, spec, demonstrations, settings, done)
    return done


def _weights_are_here(spec: Spec, told: Told) -> bool:
    """Whether nothing that the spec names is missing on this machine."""
    whole: list[Path] = []
    named: list[tuple[str, Kind]] = [(e.reference, "vlm") for e in spec.experts.values() if isinstance(e, PretrainedExpert)]
    named += [(h.autoencoder, "autoencoder") for h in spec.heads.values() if isinstance(h, LatentHead) and h.autoencoder]
    for reference, kind in named:
        with told("recipe"):
            whole.append(resolve_weights(reference, kind, download=False))
    return len(whole) == len(named)


def _draw(recipe: Recipe, spec: Spec, demonstrations: Demonstrations, contract: Contract) -> None:
    """Refuses where nothing is left to draw."""
    ahead = max([h.horizon for h in spec.heads.values() if isinstance(h, LatentHead)], default=0)
    order = best_order(demonstrations.datasets, spec.cameras)
    drawing = (recipe.train.seed, recipe.action_key, ahead, recipe.stride, order)
    make_sampler(demonstrations.sources, contract.chunk or 1, recipe.train.batch_size, *drawing)


def _sketch(recipe: Recipe, spec: Spec, demonstrations: Demonstrations, settings: Settings, done: Rehearsal) -> None:
    """The model without its weights: what would learn, and whether every prompt and image has room."""
    module = sketch(spec)
    tune(module, recipe.experts)
    if done.base is None:
        refuse_unlearned(spec, module)
    stream = next(name for name, s in spec.streams.items() if s.tokens == "prompt")
    vlm, expert = module.vlm(stream), spec.experts[module.graph.owner[stream]]
    assert isinstance(expert, PretrainedExpert) and done.contract is not None
    vlm.folder = Path(resolve_weights(expert.reference, "vlm", download=False))
    encode_tasks(vlm, prompt_encoder(module, settings), spec, demonstrations, settings, done.contract)


def _notes(recipe: Recipe, spec: Spec, contract: Contract, base: Checkpoint | None) -> list[Finding]:
    found = []
    chunk, executed = contract.chunk or 1, contract.executed or 1
    if executed > chunk:
        sentence = f"executed is {executed}, and a chunk has {chunk} steps, so all of each are executed"
        found.append(Finding("executed", sentence, f"set executed to {chunk} or fewer, or lengthen the action stream of {spec.name}"))
    for name, head in spec.heads.items():
        if isinstance(head, LatentHead) and head.horizon != executed:
            sentence = f"heads.{name} foresees {head.horizon} steps ahead, and {executed} of each chunk are executed"
            found.append(Finding("horizon", sentence, f"set overrides.heads.{name}.horizon={executed}, so that it shows what came"))
    if "{instruction}" not in (contract.prompt or "{instruction}"):
        sentence = f"the prompt '{contract.prompt}' leaves the instruction out"
        found.append(Finding("prompt", sentence, "put {instruction} where the words should stand"))
    if base is not None:
        before = base.contract
        changed = {
            "prompt": (before.prompt, contract.prompt),
            "executed": (before.executed, contract.executed),
            "normalisation of the state": (before.state.normalisation, contract.state.normalisation),
            "normalisation of actions": (before.action.normalisation, contract.action.normalisation),
        }
        for what, (old, new) in changed.items():
            if old is not None and old != new:
                sentence = f"{what} was {old} in {base.folder} and becomes {new}"
                found.append(Finding("changed", sentence, "leave it out of the recipe to keep it"))
    return found

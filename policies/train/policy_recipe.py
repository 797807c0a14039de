"""What a policy recipe says, and what follows from it before anything is built: spec, contract, settings, frozen weights."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from ...config import Strict, find, load_tree, merge, parse
from ...data import Contract
from ...data.augment import Augment
from ...vla import Spec
from ...vla.spec import FlowHead, LatentHead, PretrainedExpert
from ...vla.weights import Reference, make_reference
from ..checkpoint import Checkpoint
from ..inputs import Settings
from ..triune import anchored, spec_of
from ..tuning import Tuning
from .demonstrations import Data, relative_to
from .frames import Cache
from .optim import TrainConfig

Kind = Literal["mean_std", "quantile", "min_max", "none"]


class Recipe(Strict):
    """``kind: policy``.

    Attributes:
        spec: name of a model spec; or init: the checkpoint of a policy to go on from. overrides: merged into the spec.
        data: a dataset, or a list of them with weights.
        robot: the mapping of all datasets that name none of their own.
        cameras: the datasets' cameras in the order in which the spec sees them, where they have other names; fewer are fewer views.
        action_key: dataset column that is learned: ``action`` (as executed) or ``action.expert`` (the expert's noise-free label).
        executed: control steps that are executed of each chunk; the foresight looks this far by the spec's horizon.
        prompt: template of the words; ``{instruction}`` is filled in.
        normalise_state, normalise_action: how; by default as the policy of ``init`` does, or mean_std and quantile.
        statistics: of the ``data``, or those of the ``checkpoint`` to go on from (``vla data stats --against`` compares them).
        relative: names of actions that are learned as offsets from the state of the same name at the chunk's start; by default those of
            the policy of ``init``, or none.
        stride: frames between the starts of training chunks; 2 halves what has to be encoded.
        state_noise: standard deviation added to the normalised state, so that the policy looks rather than counts.
        experts: how each expert learns, where not as the spec says.
        frozen: type in which weights that do not learn lie in memory. ``auto`` is bf16 on a GPU whose products are; a VLM that is not known
            to be right in it stays in fp32.
        checkpointing: layers are computed again in the backward pass rather than kept: a third more time, much less memory.
        hold_out: share of each task's episodes that are never trained on; every ``train.validate_every`` steps the loss and the error
            of whole predicted chunks are measured on ``validation_batches`` batches of them.
        workers: threads that decode images ahead, where they do not fit into ``cache.images_gb``.
        pack: whether the samples of a batch are laid end to end, so that padding and absent cameras are not computed. The same losses;
            for a GPU and a thousand tokens or more in a batch, where attention then skips what belongs to other samples.
    """

    kind: Literal["policy"]
    spec: str | None = None
    init: str | None = None
    overrides: dict[str, Any] = {}
    data: str | tuple[Data, ...]
    robot: str | None = None
    cameras: tuple[str, ...] | None = None
    action_key: Literal["action", "action.expert"] = "action"
    executed: PositiveInt | None = None
    prompt: str | None = None
    normalise_state: Kind | None = None
    normalise_action: Kind | None = None
    statistics: Literal["data", "checkpoint"] = "data"
    relative: tuple[str, ...] | None = None
    stride: PositiveInt = 1
    state_noise: NonNegativeFloat = 0.0
    pack: bool = False
    augment: Augment | None = Augment()
    cache: Cache = Cache()
    experts: dict[str, Tuning] = {}
    frozen: Literal["fp32", "bf16", "auto"] = "auto"
    checkpointing: bool = False
    hold_out: float = Field(0.0, ge=0, lt=1)
    validation_batches: PositiveInt = 8
    workers: NonNegativeInt = 4
    train: TrainConfig

    @model_validator(mode="after")
    def _begins(self) -> "Recipe":
        if (self.spec is None) == (self.init is None):
            raise ValueError("give either spec, a model to train from its beginning, or init, the checkpoint of a policy to go on from")
        if self.init is None and self.executed is None:
            raise ValueError("'executed' is required: how many control steps of each chunk are executed")
        if self.init is None and self.statistics == "checkpoint":
            raise ValueError("statistics: checkpoint are those of init, which is not given")
        if self.statistics == "checkpoint" and (self.relative is not None or self.normalise_state or self.normalise_action):
            raise ValueError(
                "statistics: checkpoint normalise as that policy did; leave out relative, normalise_state and normalise_action"
            )
        scales = {f"mot.experts.{name}.": tuning.lr for name, tuning in self.experts.items() if tuning.lr != 1}
        if scales.items() <= self.train.lr_scale.items():
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"lr_scale": {**self.train.lr_scale, **scales}})})


def recipe_spec(recipe: Recipe, base: Checkpoint | None = None) -> Spec:
    """The recipe's spec, or that of the checkpoint it goes on from, with its overrides and cameras."""
    changes = recipe.overrides if recipe.cameras is None else merge(recipe.overrides, {"cameras": list(recipe.cameras)})
    if base is not None:
        return parse(Spec, merge(spec_of(base).model_dump(mode="json"), changes), f"the spec of {base.folder} with the recipe's overrides")
    path = find(recipe.spec or "", "model")
    spec = parse(Spec, merge(load_tree(path), changes), f"{path} with the recipe's overrides")
    return anchored(spec, Path.cwd())  # a checkpoint's own relative paths are inside its folder


def policy_contract(data: Contract, recipe: Recipe, spec: Spec, base: Checkpoint | None = None) -> Contract:
    """The dataset's conventions with what training adds: normalisation, chunk, executed steps, prompt. What the recipe does not say is
    that of the checkpoint it goes on from."""
    before = None if base is None else base.contract
    chunk = next(s.length for n, s in spec.streams.items() if isinstance(spec.heads.get(n), FlowHead))
    state = recipe.normalise_state or (before and before.state.normalisation) or "mean_std"
    action = recipe.normalise_action or (before and before.action.normalisation) or "quantile"
    cameras = {camera.name: camera for camera in data.cameras}
    return data.model_copy(
        update={
            "cameras": tuple(cameras[name] for name in spec.cameras),
            "state": data.state.model_copy(update={"normalisation": state}),
            "action": data.action.model_copy(update={"normalisation": action}),
            "chunk": chunk,
            "executed": recipe.executed or (before and before.executed) or chunk,
            "prompt": recipe.prompt or (before and before.prompt) or "{instruction}",
        }
    )


def recipe_settings(recipe: Recipe, data: Contract, base: Checkpoint | None = None) -> Settings:
    """Those of the policy to go on from, with the recipe's relative actions.

    Raises:
        UserError: ``data`` has no such action or state.
    """
    before = Settings() if base is None else parse(Settings, base.info.settings, base.folder / "policy.json")
    if recipe.relative is None:
        return before
    return before.model_copy(update={"relative": relative_to(data, recipe.relative), "poses": ()})


def references(spec: Spec) -> dict[str, Reference]:
    """The frozen weights that a checkpoint of ``spec`` stands on, with their hashes."""
    found = {n: make_reference(e.reference, "vlm") for n, e in spec.experts.items() if isinstance(e, PretrainedExpert)}
    return found | {
        n: make_reference(h.autoencoder, "autoencoder") for n, h in spec.heads.items() if isinstance(h, LatentHead) and h.autoencoder
    }

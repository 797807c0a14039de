"""Checkpoints of a run: the deployable folder, and beside it in ``training/`` all that continues the run. Safetensors and JSON only.

``checkpoints/step-000400/`` holds what the task saves, and ``training/{state.safetensors, state.json}``:
weights, moving average, optimizer moments, learned buffers; step, settings, running means and the sha256 of the tensors.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...config import parse
from ...data.files import atomic_folder, remove, replace_link, sha256
from ...errors import UserError
from .logs import Meter
from .optim import Ema, TrainConfig, learned_buffers, make_optimizer, trainable
from .team import Team, like

FREE = (
    *(f"train.{key}" for key in ("log_every", "save_every", "validate_every", "keep", "threads", "device", "parallel")),
    "checkpointing",
    "workers",
)
"""Settings that may change when a run is resumed."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """All that a run is, besides its settings and data."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: Ema | None
    meter: Meter
    step: int = 0

    @classmethod
    def create(cls, module: nn.Module, config: TrainConfig) -> "TrainState":
        parameters = trainable(module)
        ema = Ema(parameters, config.ema) if config.ema else None
        return cls(module, parameters, make_optimizer(parameters, config), ema, Meter())

    def weights(self) -> dict[str, Tensor]:
        """What is deployed, by name: trained parameters (their moving average, where there is one) and learned buffers."""
        source: dict[str, Tensor] = dict(self.ema.average) if self.ema else dict(self.parameters)
        return {**source, **learned_buffers(self.module)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, flat."""
        out: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        out |= {f"buffer.{name}": buffer for name, buffer in learned_buffers(self.module).items()}
        out |= {f"ema.{name}": average for name, average in self.ema.average.items()} if self.ema else {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})  # empty until the parameter has had a gradient
            out |= {f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``, each in one piece. Values are copied into the memory that the module already uses.

        Raises:
            UserError: the tensors are of another model.
        """
        own: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        own |= {f"buffer.{name}": buffer for name, buffer in learned_buffers(self.module).items()}
        own |= {f"ema.{name}": average for name, average in self.ema.average.items()} if self.ema else {}
        found = {name for name in tensors if name.split(".", 1)[0] in ("model", "buffer", "ema")}
        odd = sorted(found ^ set(own)) or sorted(name for name in found if own[name].shape != tensors[name].shape)
        if odd:
            raise UserError(
                f"the training state is of another model ('{odd[0]}' differs); resume with the recipe and spec that began the run"
            )
        for name, tensor in own.items():
            tensor.copy_(like(tensors[name], tensor))
        for name, parameter in self.parameters.items():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {key: like(tensors[f"{key}.{name}"].clone(), parameter) for key in _MOMENTS}


def step_folders(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first. A folder has this name only when it is whole."""
    return sorted((p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)), key=lambda p: int(p.name[5:]))


def settle(out: Path, keep: int) -> None:
    """Point ``last`` at the newest checkpoint; delete those beyond ``keep``, and what a kill left half written or half deleted."""
    for left in [*(out / "checkpoints").glob(".tmp-step-*"), *(out / "checkpoints").glob(".old-*")]:
        shutil.rmtree(left)
    saved = step_folders(out)
    if saved:
        replace_link(saved[-1].with_name("last"), saved[-1].name)
    for old in saved[:-keep]:
        remove(old)


def save_state(folder: Path, tensors: dict[str, Tensor], state: TrainState, config: TrainConfig) -> None:
    """Write ``training/`` with the state's ``tensors`` into a checkpoint folder that is being made."""
    training = folder / "training"
    training.mkdir()
    save_file(tensors, training / "state.safetensors")
    facts = {
        "step": state.step,
        "sha256": sha256(training / "state.safetensors"),
        "train": config.model_dump(mode="json"),
        "meter": {"sums": state.meter.sums, "count": state.meter.count},
        "torch": str(torch.__version__),
    }
    (training / "state.json").write_text(json.dumps(facts, indent=2))


def load_state(folder: Path, state: TrainState, config: TrainConfig) -> None:
    """Continue from a checkpoint.

    Raises:
        UserError: the training state is missing or damaged, or of other settings or another model.
    """
    path = folder / "training" / "state.safetensors"
    way_out = "delete that folder to resume from the checkpoint before it"
    try:
        facts: dict[str, Any] = json.loads((path.with_name("state.json")).read_text())
        if sha256(path) != facts["sha256"]:
            raise UserError(f"{path} is damaged (its sha256 is not the one in state.json); {way_out}")
        before = parse(type(config), facts["train"], path.with_name("state.json"))
        refuse_changes({"train": before.model_dump(mode="json")}, {"train": config.model_dump(mode="json")}, folder)
        state.restore(load_file(path))
        state.step, state.meter = facts["step"], Meter(**facts["meter"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the training state in {path.parent} cannot be read ({error}); {way_out}") from None


def refuse_changes(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    """Refuse to resume with settings that would make another run. A constant schedule may be lengthened or shortened.

    Args:
        old, new: recipes as trees, with ``train`` at their top.

    Raises:
        UserError: naming each changed key with both values.
    """
    before, after = _leaves(old), _leaves(new)
    free = set(FREE)
    if before["train.schedule"] == after["train.schedule"] == "constant":
        free.add("train.steps")
    changed = [key for key in {**before, **after} if key not in free and before.get(key) != after.get(key)]
    if changed:
        listed = ", ".join(f"{key} was {before.get(key)} and is {after.get(key)}" for key in changed)
        way_out = "give the old values, or start a new run with another --out"
        raise UserError(f"{where} cannot be resumed with other settings: {listed}; {way_out}")


def publish(out: Path, save: Callable[[Path, dict[str, Tensor]], None], state: TrainState, config: TrainConfig, team: Team) -> Path:
    """Write the checkpoint of the present step, move ``last`` to it, and delete what exceeds ``keep``. All processes must call it.

    Args:
        save: the task's ``save(folder, weights)``.
    """
    path = out / "checkpoints" / f"step-{state.step:06d}"
    weights, tensors = team.collect(state.weights()), team.collect(state.tensors())

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path) as folder:
            save(folder, weights)
            save_state(folder, tensors, state, config)
        settle(out, config.keep)

    team.first(write)
    return path


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out

"""How weights are updated: settings, parameter groups, learning rate, moving average, precision. All pure functions of the step."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...config import Strict
from ...errors import UserError
from .launch import local_rank, wants_cpu


class TrainConfig(Strict):
    """The ``train:`` section of every recipe.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per optimizer step, over all processes.
        accumulate: in how many parts each process computes its share of them, one after another: less memory, the same step.
        parallel: several processes hold all weights each (``ddp``), or a piece of each (``fsdp``, FSDP2).
        lr: peak learning rate.
        lr_scale: parameter name prefix -> factor on ``lr``; the longest that fits wins. One expert can learn slower than another.
        warmup: steps of linear rise from 0 to ``lr``.
        schedule: what follows the warm-up.
        final: last learning rate of the cosine, as a fraction of ``lr``.
        weight_decay: decoupled decay (AdamW), on parameters of two or more dimensions only.
        clip: largest global gradient norm; ``null`` for none.
        ema: decay of the weights' moving average, which is what a checkpoint deploys; 0 deploys the raw weights.
        precision: type of matrix products; trained weights stay in fp32. ``auto`` is bf16 where the hardware multiplies it natively.
        device: where the module is moved.
        threads: CPU threads of torch; ``null`` leaves them alone.
        seed: the run is a function of it.
        log_every: steps per log line (losses are means over them).
        save_every: steps per checkpoint; the last step is always saved.
        validate_every: steps between looks at the held-out episodes, where a recipe holds some out; always after the last step.
        keep: newest checkpoints that stay on disk.
    """

    steps: PositiveInt
    batch_size: PositiveInt = 32
    accumulate: PositiveInt = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    lr: PositiveFloat = 1e-3
    lr_scale: dict[str, NonNegativeFloat] = {}
    warmup: NonNegativeInt = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    final: float = Field(0.0, ge=0, le=1)
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = 1.0
    ema: float = Field(0.999, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    device: Literal["cpu", "cuda", "auto"] = "auto"
    threads: PositiveInt | None = None
    seed: int = Field(0, ge=0)
    log_every: PositiveInt = 10
    save_every: PositiveInt = 1000
    validate_every: PositiveInt = 500
    keep: PositiveInt = 2

    def share(self, processes: int) -> int:
        """Samples of one part of a step's batch.

        Raises:
            UserError: the batch cannot be shared out evenly.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise UserError(
                f"train.batch_size is {self.batch_size}, which {processes} processes cannot share evenly in {self.accumulate} parts each; "
                f"it counts the samples of all processes: make it a multiple of {parts}"
            )
        return self.batch_size // parts


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of ``step`` (0 is the first)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name.

    Raises:
        UserError: nothing is trainable.
    """
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError("there is nothing to train: every parameter of the model is frozen; unfreeze an expert in the spec")
    return found


def learned_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers outside frozen parts: a part is frozen if it holds parameters and none of them learns."""
    parameters = dict(module.named_parameters())
    holding = {prefix for name in parameters for prefix in _prefixes(name)}
    learning = {prefix for name, parameter in parameters.items() if parameter.requires_grad for prefix in _prefixes(name)}
    frozen = holding - learning
    named = dict(module.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in module.state_dict().items() if name not in named and isinstance(value, Tensor)}
    return {name: value for name, value in buffers.items() if not frozen.intersection(_prefixes(name))}


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over ``parameters`` in groups that share factor and decay; each group carries its ``scale``.

    Raises:
        UserError: a prefix in ``lr_scale`` fits no parameter.
    """
    for prefix in config.lr_scale:
        if not any(name.startswith(prefix) for name in parameters):
            roots = ", ".join(sorted({name.split(".")[0] for name in parameters}))
            raise UserError(f"train.lr_scale: no trained parameter begins with '{prefix}'; the trained parts are {roots}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        fitting = max((prefix for prefix in config.lr_scale if name.startswith(prefix)), key=len, default=None)
        scale = 1.0 if fitting is None else config.lr_scale[fitting]
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    options = [{"params": members, "scale": scale, "weight_decay": decay} for (scale, decay), members in groups.items()]
    return torch.optim.AdamW(options, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Ema:
    """Exponential moving average of parameters, warmed up so that a short run is not an average with its initial weights:
    after n updates the decay is ``min(decay, (1 + n) / (10 + n))``."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self, step: int) -> None:
        """Take in the weights after ``step`` updates (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        average([local(a) for a in self.average.values()], [local(p.detach()) for p in self.parameters.values()], None)

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average."""
        kept = {name: local(parameter.detach()).clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                local(parameter).copy_(local(self.average[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    local(parameter).copy_(kept[name])


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU when one is present, and not ``accelerate launch --cpu`` began the process.

    Raises:
        UserError: a GPU is asked for and there is none, or the launcher was told to use none.
    """
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UserError("train.device is 'cuda' but torch finds no GPU here; use train.device=cpu or auto")
    if name == "cuda" and wants_cpu():
        raise UserError("train.device is 'cuda' but accelerate launch was told to use the CPU; leave out one of the two")
    if name == "cpu" or not present or wants_cpu():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU and on CPUs that multiply it natively (AMX or AVX512-BF16), else fp32."""
    if name == "auto":
        name = "bf16" if (torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_multiplies_bf16()) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that lies in this process: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cpu_multiplies_bf16() -> bool:
    info = Path("/proc/cpuinfo")  # Linux only; elsewhere fp32 is the safe answer
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.is_file() else ""
    return bool({"amx_bf16", "avx512_bf16"} & set(flags.split()))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]

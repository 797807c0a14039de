"""The processes of a run: one, or several that share every step's batch (``torchrun``, ``accelerate launch``, ``mpirun``; any nodes).

What is saved and logged is that of the whole: any number of processes may resume what any other number began.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...vla.experts import Expert
from .launch import flag, meet, processes
from .optim import TrainConfig, resolve_device


@dataclass(frozen=True)
class Part:
    """A share of the batch of an optimizer step: a run of its rows.

    Attributes:
        step: 0 is the first.
        number: which share; of: how many there are, processes times ``train.accumulate``.
    """

    step: int
    number: int = 0
    of: int = 1

    @property
    def index(self) -> int:
        """A number that no other share of the run has."""
        return self.step * self.of + self.number

    def rows(self, batch_size: int) -> slice:
        """Its rows of the batch."""
        return slice(self.number * batch_size // self.of, (self.number + 1) * batch_size // self.of)


class Team:
    """This process among those of the run; alone where there is no launcher.

    Attributes:
        size, rank, main, device: of this process.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.size = processes()
        self.device = resolve_device(config.device)
        self.rank, self.accelerator = 0, cast(Any, None)
        if self.size > 1:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs

            meet()
            options = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[options])
            self.rank, self.device = self.accelerator.process_index, self.accelerator.device
        self.main = self.rank == 0
        self.sharded = self.size > 1 and (config.parallel == "fsdp" or flag("ACCELERATE_USE_FSDP"))

    def __str__(self) -> str:
        kind = "" if self.size == 1 else " by FSDP2" if self.sharded else " by DDP"
        return f"{self.size} process{'es' if self.size > 1 else ''}{kind} on {self.device.type}"

    def parts(self, step: int, accumulate: int) -> list[Part]:
        """The shares that this process computes in a step."""
        return [Part(step, self.rank * accumulate + micro, self.size * accumulate) for micro in range(accumulate)]

    def join(self, module: nn.Module, low: torch.dtype) -> nn.Module:
        """``module`` such that its gradients are means over all processes.

        Sharded: each linear layer of the experts is gathered when it is needed, in ``low`` precision; what is
        frozen beside them stays whole on each process, and all else is sharded together.
        """
        if self.size == 1:
            return module
        if not self.sharded:
            return cast(nn.Module, self.accelerator.prepare(module))
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        experts = [part for part in module.modules() if isinstance(part, Expert)]
        linears = dict.fromkeys(part for expert in experts for part in expert.modules() if isinstance(part, nn.Linear))
        for linear in linears:
            fully_shard(linear, mesh=mesh, mp_policy=policy)
        whole = {p for p in module.parameters() if not p.requires_grad and not isinstance(p, DTensor)}
        fully_shard(module, mesh=mesh, ignored_params=whole, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        return module

    def summing(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the backward of a share: gradients travel with the ``last`` one of a step alone."""
        if self.size == 1:
            return contextlib.nullcontext()
        if self.sharded:
            cast(Any, module).set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else cast(Any, module).no_sync()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        return values if self.size == 1 else cast(Tensor, self.accelerator.reduce(values, "mean"))

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        told = torch.tensor(value, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()

    def first(self, act: Callable[[], None]) -> None:
        """``act`` in the main process alone; the others wait. An error there ends them all."""
        if self.size == 1:
            return act()
        broken: BaseException | None = None
        if self.main:
            try:
                act()
            except BaseException as error:  # noqa: BLE001 - raised again below, once the others know
                broken = error
        failed = self.largest(int(broken is not None))
        if broken is not None:
            raise broken
        if failed:
            raise SystemExit(1)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies on the CPU in the main process, nothing in the others; all must call it."""
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if self.main:
                out[name] = full.to("cpu", copy=True).contiguous()
        return out


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a piece, in one piece; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` on the device of ``other`` and in pieces as that is."""
    moved = tensor.to(other.device)
    return (
        distribute_tensor(moved, other.device_mesh, other.placements) if isinstance(other, DTensor) and other.ndim == tensor.ndim else moved
    )

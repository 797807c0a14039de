"""What a run will take, told before it begins: parameters, memory of each process, computation, time. Nothing is trained or written.

Memory and computation are those of one part of a batch, run forward and backward over tensors without values (``imagined.py``), so
that a network of billions of parameters is judged on a laptop. What allocators and kernels take beside tensors is not counted.
"""

import contextlib
import gc
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...errors import UserError
from ...vla.experts import Expert
from .imagined import Held, Imagined, imagine
from .loop import AHEAD, Run, to_device
from .optim import TrainConfig, resolve_device, resolve_precision
from .recipe import read_recipe
from .team import Part, Team

WARM, FEWEST, MOST = 3, 3, 60
"""Steps before those that are timed, whose batches were there when they began; the fewest and the most that are timed."""
SECONDS = 12.0
"""As long steps are timed, between these numbers of them: means of fewer differ on a machine that does other things, too."""
UTILISATION = 0.4
"""Share of a peak that training is assumed to reach."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        frozen, trained: weights; moments: AdamW's two; average: the moving average.
        gradients: of all trained weights.
        activations: the most that forward and backward of one part of a batch hold beside these.
        exchange: DDP's buckets of gradients, or the weights that FSDP2 gathers at a time.
        peak: the most at one time: not all gradients are there when the activations are.
    """

    frozen: int
    trained: int
    gradients: int
    moments: int
    average: int
    activations: int
    exchange: int
    peak: int


@dataclass(frozen=True)
class Report:
    """See the module.

    Attributes:
        parameters: part of the model -> total and trained.
        memory: as the recipe says about ``checkpointing``; other: the other way, or None where the recipe has no such word.
        flops: forward and backward of a step, over all processes.
        share: samples of one part.
        samples: starts of training chunks in the data; epochs: how often each is seen. None for other kinds than policies.
        step_seconds, seconds: of a step, and of all; None where nothing is known. measured: each timed step.
        waiting_seconds: of a step, spent on waiting for data.
        preparation_seconds: until the first step, where steps were measured.
        time_from: how the time was found, or why it was not.
    """

    device: str
    precision: str
    processes: int
    parallel: str
    steps: int
    batch_size: int
    share: int
    parameters: dict[str, tuple[int, int]]
    memory: Memory
    other: Memory | None
    checkpointing: bool
    flops: int
    samples: int | None
    epochs: float | None
    step_seconds: float | None
    seconds: float | None
    time_from: str
    measured: list[float] = field(default_factory=list)
    waiting_seconds: float | None = None
    preparation_seconds: float | None = None

    def tree(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def dry_run(name: str, overrides: list[str], processes: int = 1, peak: float | None = None, utilisation: float = UTILISATION) -> Report:
    """What the recipe ``name`` would take in ``processes`` processes.

    Args:
        peak: floating-point operations a second of each process's device; the time then follows from it and ``utilisation``, rather
            than from steps that are run here.

    Raises:
        UserError: as ``recipe.run``.
    """
    module, recipe = read_recipe(name, overrides)
    config: TrainConfig = recipe.train
    share, device = config.share(processes), resolve_device(config.device)
    low = resolve_precision(config.precision, device)
    one = _of_batch(recipe, share)
    sharded = processes > 1 and config.parallel == "fsdp"
    found, checkpointing = {}, getattr(recipe, "checkpointing", None)
    task: Any = None
    for way in (False, True) if checkpointing is not None else (None,):
        task, held, flops = rehearse(module, one if way is None else one.model_copy(update={"checkpointing": way}), low, sharded)
        found[way] = memory(task.module, config, held, processes, low), flops
    mine, flops = found[checkpointing]
    samples = getattr(task, "samples", None)
    timed: Timed | None = None
    seconds: float | None
    if peak is not None:
        seconds = flops * config.accumulate / (peak * utilisation)
        source = f"computed: {peak:.3g} FLOP/s of each of {processes} devices, of which {utilisation:.0%} are assumed to be reached"
    else:
        timed, source = _timed(module, _of_batch(recipe, share * config.accumulate), mine, device)
        seconds = fmean(timed.steps) if timed else None
        if timed and processes > 1:
            source += "; one process's share, without what the processes exchange"
    return Report(
        device=device.type,
        precision=str(low).removeprefix("torch."),
        processes=processes,
        parallel=config.parallel if processes > 1 else "none",
        steps=config.steps,
        batch_size=config.batch_size,
        share=share,
        parameters=parameters(task.module),
        memory=mine,
        other=None if checkpointing is None else found[not checkpointing][0],
        checkpointing=bool(checkpointing),
        flops=flops * config.accumulate * processes,
        samples=samples,
        epochs=None if samples is None else config.steps * config.batch_size / samples,
        step_seconds=seconds,
        seconds=None if seconds is None else seconds * config.steps,
        time_from=source,
        measured=timed.steps if timed else [],
        waiting_seconds=timed.waiting if timed else None,
        preparation_seconds=timed.preparation if timed else None,
    )


def rehearse(module: Any, recipe: Any, low: torch.dtype, sharded: bool = False) -> tuple[Any, Held, int]:
    """Forward and backward of one part of a batch without values: the task, what was held, and FLOPs.

    A kind with ``sketch(recipe)`` is run by it; the others, whose networks are small, are built and run as they are.

    Args:
        sharded: linear layers of experts are gathered in ``low`` precision, so that no copies of them in it are held.
    """
    imagined = hasattr(module, "sketch")
    device = torch.device("cpu")
    task = module.sketch(recipe) if imagined else module.build(recipe, Path())
    counted = FlopCounterMode(display=False)
    held = Held()
    if not imagined:
        _forward_and_backward(task, to_device(task.batch(Part(0)), device), low, counted, held)
        return task, held, counted.get_total_flops()
    with Imagined():
        linears = [m.weight for e in task.module.modules() if isinstance(e, Expert) for m in e.modules() if isinstance(m, nn.Linear)]
        imagine(task.module, device, {id(weight): low for weight in linears} if sharded else None)
        _forward_and_backward(task, task.batch(Part(0)), low, counted, held)
    return task, held, counted.get_total_flops()


def _forward_and_backward(task: Any, batch: Any, low: torch.dtype, counted: FlopCounterMode, held: Held) -> None:
    module: nn.Module = task.module
    module.train()
    watching = held.watch(module.parameters())
    gc.collect()
    gc.freeze()  # what is there already is not looked through again
    try:
        with counted, held:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low == torch.bfloat16):
                loss = task.losses(batch)["loss"]
            torch.autograd.backward(loss)
    finally:
        gc.unfreeze()
        for hook in watching:
            hook.remove()
    module.zero_grad(set_to_none=True)


def memory(module: nn.Module, config: TrainConfig, held: Held, processes: int, low: torch.dtype) -> Memory:
    """Bytes of one of ``processes``: weights are fp32, or what the module holds them in; Adam's moments and the average are like them.

    FSDP2 cuts every tensor in ``processes`` parts along its first dimension, the linear layers of experts one by one and what else is
    trained together; what is frozen beside them stays whole.
    """
    sharded = processes > 1 and config.parallel == "fsdp"
    linears = {
        id(p)
        for e in module.modules()
        if isinstance(e, Expert)
        for m in e.modules()
        if isinstance(m, nn.Linear)
        for p in m.parameters(False)
    }
    frozen = trained = together = 0
    largest: list[int] = []
    for parameter in module.parameters():
        divided = sharded and (parameter.requires_grad or id(parameter) in linears)
        rows = parameter.shape[0] if parameter.ndim else 1
        kept = -(-rows // processes) * (parameter.numel() // max(1, rows)) if divided else parameter.numel()
        size = 4 * kept
        frozen, trained = (frozen, trained + size) if parameter.requires_grad else (frozen + size, trained)
        if divided and id(parameter) in linears:
            largest.append(low.itemsize * parameter.numel())
        elif divided:
            together += 4 * parameter.numel()
    gathered = together + sum(sorted(largest)[-2:])  # the layer that is computed, and the one that is fetched meanwhile
    exchange = gathered if sharded else trained if processes > 1 else 0
    average = trained if config.ema else 0
    still = frozen + 3 * trained + average + exchange
    once = held.peak + trained if sharded or config.accumulate > 1 or processes > 1 else max(held.together, trained)
    return Memory(frozen, trained, trained, 2 * trained, average, held.peak, exchange, still + once)


def parameters(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Part of a model -> parameters, and how many of them learn: each expert, what else there is, and ``total``."""
    out: dict[str, tuple[int, int]] = {}
    for name, parameter in module.named_parameters():
        words = name.split(".")
        part = words[2] if words[:2] == ["mot", "experts"] else words[0]
        for key in (part, "total"):
            count, learns = out.get(key, (0, 0))
            out[key] = count + parameter.numel(), learns + parameter.requires_grad * parameter.numel()
    return {key: value for key, value in out.items() if key != "total"} | {"total": out["total"]}


@dataclass(frozen=True)
class Timed:
    """Seconds: of each timed step, of them spent on waiting for data on average, and before the first step."""

    steps: list[float]
    waiting: float
    preparation: float


def measure(module: Any, recipe: Any) -> Timed:
    """Time some steps of the run itself, while batches are made ahead; nothing is kept."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        task = module.build(recipe, Path(folder))
    config: TrainConfig = recipe.train.model_copy(update={"steps": WARM + MOST + AHEAD})  # there are always more batches to make
    run = Run.begin(task, config, Team(config))
    prepared, seconds, waited = time.perf_counter() - began, list[float](), list[float]()
    with contextlib.closing(run.steps()) as steps:
        last = time.perf_counter()
        for _, _, spent in steps:
            if run.team.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - last)
            waited.append(spent["data_ms"] / 1e3)
            last, count = now, len(seconds) - WARM
            if count == MOST or (count >= FEWEST and sum(seconds[WARM:]) >= SECONDS):
                break
    return Timed(seconds[WARM:], fmean(waited[WARM:]), prepared)


def _timed(module: Any, recipe: Any, needed: Memory, device: torch.device) -> tuple[Timed | None, str]:
    """What was measured here, and how; nothing, and why not."""
    free, hint = _free(device), "; give --flops, the peak of the device that will train"
    if needed.peak > free:
        return None, f"unknown: a step needs {needed.peak / 1e9:.1f} GB and {free / 1e9:.1f} GB are free here{hint}"
    try:
        found = measure(module, recipe)
    except (UserError, OSError) as error:  # transformers' own, where a folder lacks its tokenizer
        return None, f"unknown: no step can be run here ({error}){hint}"
    timed = f"the mean of {len(found.steps)} steps on {device.type} after {WARM} others"
    return found, f"measured: {timed}, with batches made ahead as in the run"


def _free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _of_batch(recipe: Any, size: int) -> Any:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": size})})

"""The training loop: one for every kind of recipe.

A run is a function of its settings: ``batch(part)`` is a pure function, the global generator is seeded per part of a step's
batch, learning rate and moving average are functions of the step. So a run that is killed at any moment and resumed continues
as if nothing had happened: bit for bit in fp32 on the CPU. Steps and batch sizes are those of all processes together.
"""

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from .launch import fewer_than_asked
from .logs import RunLog
from .optim import TrainConfig, learning_rate, resolve_precision
from .state import TrainState, load_state, publish, settle, step_folders
from .team import Part, Team, whole

__all__ = ["Hook", "Part", "StepReport", "Task", "TrainConfig", "step_seed", "train"]


class Task(Protocol):
    """What a kind of recipe brings: a module, its data and its losses.

    Attributes:
        module: holds every parameter; those with ``requires_grad`` are trained, the others never meet the optimizer.
    """

    module: nn.Module

    def batch(self, part: Part) -> Any:
        """A part of a step's batch, a pure function of it: tensors, or dicts, lists and tuples of them, on the CPU.

        Called in a thread of its own, so it must not draw from torch's or numpy's global generators; ``step_seed`` gives seeds.
        """

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalars by name; ``loss`` is minimised, the others are logged. May draw noise from torch's global generator."""

    def validate(self) -> dict[str, Any]:
        """Numbers of what is held out, by name; nothing where nothing is. The module is in evaluation mode."""

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the deployable files into ``folder`` (new, empty; published when whole). ``weights``: the trained tensors by name."""


@dataclass(frozen=True)
class StepReport:
    """What a hook is told after a step.

    Attributes:
        step: optimizer steps done so far.
        losses: loss term -> value at this step.
        lr: learning rate of this step.
        checkpoint: the checkpoint written at this step, if one was.
    """

    step: int
    losses: dict[str, float]
    lr: float
    checkpoint: Path | None


Hook = Callable[[StepReport], None]

AHEAD = 2
"""Batches that are made ahead."""


def step_seed(seed: int, index: int) -> int:
    """A 63-bit seed for ``index`` of a run: well mixed, so that neighbours share nothing."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train(task: Task, config: TrainConfig, out: Path, resume: bool = False, hooks: Sequence[Hook] = ()) -> Path:
    """Train ``task.module`` and return the final checkpoint's folder.

    Writes ``log.jsonl``, ``tensorboard/`` and ``checkpoints/{step-000400, last}`` into ``out``. SIGTERM and Ctrl-C finish
    the step, save, and exit with code 128 + signal; a second Ctrl-C ends at once.

    Raises:
        UserError: ``out`` holds a run already and ``resume`` is not set, or the reverse; the settings are not those of the
            run to resume; a loss or the gradient is not finite (nothing is updated or saved then).
    """
    team = Team(config)
    share = config.share(team.size)
    team.first(lambda: begin(out, resume, config.keep))
    run = Run.begin(task, config, team)
    state = run.state
    saved = step_folders(out)
    if saved:
        load_state(saved[-1], state, config)
    if state.step >= config.steps:
        return saved[-1]
    checkpoint: Path | None = None
    team.wait()  # nobody writes before all have read
    with RunLog(out, config.steps, state.step, team.main) as log, contextlib.closing(run.steps()) as steps, stopping() as stop:
        log.say(f"{config.steps} steps of {config.batch_size} samples: {share} at a time in {team}")
        if fewer_than_asked():
            log.say("accelerate launch --cpu starts several processes only through MPI; see policies/README.md, Fine-tuning")
        for lr, values, seconds in steps:
            state.meter.add(values | seconds)
            if state.step % config.log_every == 0 or state.step == config.steps:
                log.write(state.step, {"lr": lr, **state.meter.take()})
            log.advance(state.step)
            if state.step % config.validate_every == 0 or state.step == config.steps:
                log.validate(state.step, run.validate())
            stopped = team.largest(stop[0] if stop else 0)  # a signal from here on is answered after the next step, with its checkpoint
            due = state.step % config.save_every == 0 or state.step == config.steps or stopped
            checkpoint = publish(out, task.save, state, config, team) if due else None
            for hook in hooks:
                hook(StepReport(state.step, values, lr, checkpoint))
            if stopped and state.step < config.steps:
                log.say(f"stopped after step {state.step}, saved as {checkpoint}; the same command with --resume continues")
                raise SystemExit(128 + stopped)
    return step_folders(out)[-1]


class Losses(nn.Module):
    """A task's losses of a batch, or without one its validation, as the ``forward`` of a module: what DDP and FSDP2 take hold of."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self.task = [task]  # out of sight: its module is a part of this one once

    def forward(self, batch: Any) -> dict[str, Any]:
        return self.task[0].validate() if batch is None else self.task[0].losses(batch)


@dataclass
class Run:
    """A task where it trains, with what its steps need.

    Attributes:
        shown: what ``Team.join`` made of the task's losses.
        dtype: of matrix products.
    """

    task: Task
    config: TrainConfig
    team: Team
    shown: nn.Module
    state: TrainState
    dtype: torch.dtype

    @classmethod
    def begin(cls, task: Task, config: TrainConfig, team: Team) -> "Run":
        """At step 0, on the team's device."""
        if config.threads:
            torch.set_num_threads(config.threads)
        dtype = resolve_precision(config.precision, team.device)
        task.module.to(team.device).train()
        shown = team.join(Losses(task), dtype)
        return cls(task, config, team, shown, TrainState.create(task.module, config), dtype)

    def steps(self) -> Generator[tuple[float, dict[str, float], dict[str, float]], None, None]:
        """The steps that are left, with batches made ahead. Each gives what ``once`` returns, after its learning rate."""
        config, team, state = self.config, self.team, self.state

        def batch(index: int) -> Any:
            return self.task.batch(team.parts(index // config.accumulate, config.accumulate)[index % config.accumulate])

        with prefetch(batch, state.step * config.accumulate, config.steps * config.accumulate) as batches:
            while state.step < config.steps:
                lr = learning_rate(config, state.step)
                yield lr, *self.once(batches, lr)

    def once(self, batches: Iterator[Any], lr: float) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer step. Returns the loss terms with ``grad_norm``, and milliseconds of waiting for data and of computing."""
        config, team, state = self.config, self.team, self.state
        waited, began = 0.0, time.perf_counter()
        sums: dict[str, Tensor] = {}
        parts = team.parts(state.step, config.accumulate)
        for part in parts:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            torch.manual_seed(step_seed(config.seed, part.index))
            with team.summing(self.shown, part is parts[-1]):
                with torch.autocast(team.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    losses = self.shown(to_device(batch, team.device))
                torch.autograd.backward(losses["loss"] / config.accumulate)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulate
        limit = float("inf") if config.clip is None else config.clip
        sums["grad_norm"] = whole(nn.utils.clip_grad_norm_(state.parameters.values(), limit)).float()
        values = dict(zip(sums, team.mean(torch.stack(list(sums.values()))).tolist(), strict=True))
        refuse_non_finite(values, state.step + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        total = time.perf_counter() - began
        return values, {"data_ms": 1e3 * waited, "compute_ms": 1e3 * (total - waited)}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """What the weights that would be deployed now make of held-out data."""
        deployed = self.state.ema.deployed() if self.state.ema else contextlib.nullcontext()
        low = torch.autocast(self.team.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        self.task.module.eval()
        with deployed, torch.random.fork_rng(devices=[]), low:
            found = cast(dict[str, Any], self.shown(None))
        self.task.module.train()
        return found


def refuse_non_finite(values: dict[str, float], step: int) -> None:
    """Stop before a broken update reaches the weights.

    Raises:
        UserError: naming the step and the terms.
    """
    broken = [f"'{name}' is {value}" for name, value in values.items() if not np.isfinite(value)]
    if broken:
        raise UserError(
            f"training stopped at step {step}: {', '.join(broken)}; nothing of this step was kept. Mend the data of that step and resume, "
            "or start a new run with a lower train.lr or train.clip, or with train.precision=fp32"
        )


def begin(out: Path, resume: bool, keep: int) -> None:
    """Make the run folder, or see that it is the one to resume, and clear what a kill left in it.

    Raises:
        UserError: ``resume`` without a run, or a run without ``resume``.
    """
    saved, begun = step_folders(out), any((out / name).exists() for name in ("recipe.yaml", "log.jsonl"))
    if resume and not begun and not saved:
        raise UserError(f"there is no run to resume in {out}; check --out, or leave out --resume to begin one")
    if saved and not resume:
        raise UserError(f"{out} already holds a run ({saved[-1].name}); pass --resume to continue it, or choose another --out")
    if not saved:
        (out / "log.jsonl").unlink(missing_ok=True)  # a run that ended before its first checkpoint begins anew
    out.mkdir(parents=True, exist_ok=True)
    settle(out, keep)


@contextlib.contextmanager
def prefetch(batch: Callable[[int], Any], start: int, end: int, depth: int = AHEAD) -> Iterator[Iterator[Any]]:
    """The batches ``start`` .. ``end - 1`` in order, made ahead by one thread. Errors come out where the batch was due.

    That thread computes alone (the setting is per thread): workers of its own, beside those of the thread that trains, made
    OpenMP yield at every barrier, and a small policy's step on two cores took 0.41 s instead of 0.24 s.
    """
    with ThreadPoolExecutor(1, "prefetch", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = deque(pool.submit(batch, index) for index in range(start, min(start + depth, end)))

        def take() -> Iterator[Any]:
            for index in range(start, end):
                if index + depth < end:
                    ahead.append(pool.submit(batch, index + depth))
                yield ahead.popleft().result()

        try:
            yield take()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C puts its signal number into; a second Ctrl-C has its usual effect. A second SIGTERM has none: a
    cluster that stops a job tells the launcher and its processes, and the launcher tells them again."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may handle signals
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor in its dicts, lists and tuples on ``device``; anything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    return batch

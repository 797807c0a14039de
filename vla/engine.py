"""Inference: the schedule of a model, phase by phase, each stream no oftener than the graph demands."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .flow import grid
from .model import GENERATES, Inputs, Model, Noisy, Outputs
from .mot import KV, Cache
from .spec import Phase


@dataclass
class Memory:
    """What slow phases left for the calls that follow: phase -> its keys and values, and when it ran.

    Attributes:
        kept: phase -> streams' keys and values, with the patches that it predicted.
        calls: phase -> calls since it ran; ran: phase -> the time in seconds at which it did.
    """

    kept: dict[str, tuple[dict[str, KV], dict[str, Tensor]]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    ran: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def infer(
    model: Model,
    inputs: Inputs,
    noise: Mapping[str, Tensor],
    cache: Cache | None = None,
    steps: int | None = None,
    mode: str | None = None,
    prefix: Float[Tensor, "B P A"] | None = None,
) -> Outputs:
    """Answer a batch of observations.

    Everything that does not change between denoise steps is computed once (``Model.observe``) and read from its cache.

    Args:
        noise: flow -> (B, T, X), the start of the flow, standard normal.
        cache: streams computed before for these very observations.
        steps: Euler steps, by default those of the schedule.
        mode: one of the spec's modes; its ``clean`` flows come in ``inputs.clean``.
        prefix: actions that are settled already; the chunk begins with them.

    Raises:
        UserError: the spec has no such mode, or was not trained with a prefix of that length.
    """
    kept, foresight = model.observe(inputs, cache, mode)
    return _finish(model, inputs, noise, kept, foresight, steps, mode, prefix)


@torch.no_grad()
def infer_again(
    model: Model, inputs: Inputs, noise: Mapping[str, Tensor], memory: Memory, now: float, steps: int | None = None, mode: str | None = None
) -> Outputs:
    """Answer the next observations of a run: phases of a longer ``period`` run when it has passed, and are read as they were between.

    Args:
        memory: of the calls before, brought up to date in place; a fresh one computes everything, as ``infer`` does.
        now: time in seconds, on any clock that does not go back.

    Raises:
        UserError: what a phase left is older than its ``stale`` limit.
    """
    kept: dict[str, KV] = dict(model.contexts(inputs))
    foresight: dict[str, Tensor] = {}
    for name, phase in model.graph.schedule(mode).items():
        if phase.kind in GENERATES:
            break
        memory.calls[name] = memory.calls.get(name, phase.period) + 1
        if name not in memory.kept or memory.calls[name] > phase.period:
            memory.kept[name], memory.calls[name], memory.ran[name] = model.fill(name, inputs, kept, mode), 1, now
        age = now - memory.ran[name]
        if phase.stale is not None and age > phase.stale:
            raise UserError(
                f"phase '{name}' of {model.spec.name} ran {age:.2f} s ago, its limit is {phase.stale:.2f} s; "
                "call at a higher rate, shorten its period or raise stale"
            )
        kept |= memory.kept[name][0]
        foresight |= memory.kept[name][1]
    return _finish(model, inputs, noise, kept, foresight, steps, mode, None)


def _finish(
    model: Model,
    inputs: Inputs,
    noise: Mapping[str, Tensor],
    kept: dict[str, KV],
    foresight: dict[str, Tensor],
    steps: int | None,
    mode: str | None,
    prefix: Tensor | None,
) -> Outputs:
    """The first phase that generates and what follows it."""
    done: dict[str, Tensor] = {}
    words: dict[str, Tensor] = {}
    phases = itertools.dropwhile(lambda item: item[1].kind not in GENERATES, model.graph.schedule(mode).items())
    for name, phase in phases:
        now = replace(inputs, clean=dict(inputs.clean) | done)
        if phase.kind == "denoise":
            done |= _denoise(model, phase, now, noise, kept, steps or phase.steps or 10, mode, prefix)
        elif phase.kind == "ar":
            inputs, words[phase.streams[0]] = _speak(model, phase.streams[0], now, kept)
            kept |= model.fill(name, inputs, kept, mode)[0]
        else:
            kv, seen = model.fill(name, now, kept, mode)
            kept |= kv
            foresight |= seen
    flows = {n: x for n, x in done.items() if n in model.foresight}
    actions = next((done.get(n, inputs.clean.get(n)) for n in model.actions), None)
    return Outputs(actions, foresight | flows, words)


def _denoise(
    model: Model,
    phase: Phase,
    inputs: Inputs,
    noise: Mapping[str, Tensor],
    kept: Cache,
    steps: int,
    mode: str | None,
    prefix: Tensor | None,
) -> dict[str, Tensor]:
    """The flows of a phase, integrated from noise to data."""
    spec = model.spec
    flows = [n for n in phase.streams if n in spec.flows]
    x = {n: inputs.clean[n] if n in phase.clean else noise[n] for n in flows}
    if prefix is not None:
        _check_prefix(model, prefix.shape[1])
        settled = model.action_stream
        x[settled] = torch.cat([prefix, x[settled][:, prefix.shape[1] :]], dim=1)
    without, bare = inputs, kept
    if phase.guidance is not None:
        rows = next(iter(x.values())).shape[0]
        gone = dict.fromkeys(phase.guidance.without, torch.ones(rows, dtype=torch.bool, device=next(iter(x.values())).device))
        without = replace(inputs, dropped=dict(inputs.dropped) | gone)
        bare, _ = model.observe(without, mode=mode)
    grids = {n: grid(steps, phase.shift or spec.flow(n).shift) for n in flows}
    for i in range(steps):
        noisy = {}
        for n in flows:
            at = 1.0 if n in phase.clean else 0.0 if n in phase.noise else grids[n][i]
            time = torch.full(x[n].shape[:2], at, dtype=x[n].dtype, device=x[n].device)
            if prefix is not None and n == model.action_stream:
                time[:, : prefix.shape[1]] = 1.0
            noisy[n] = Noisy(x[n], time)
        velocity = model.velocity(phase.streams, inputs, noisy, kept)
        if phase.guidance is not None:
            plain = model.velocity(phase.streams, without, noisy, bare)
            velocity = {n: plain[n] + phase.guidance.scale * (v - plain[n]) for n, v in velocity.items()}
        for n in flows:
            if n not in phase.clean and n not in phase.noise:
                moved = x[n] + velocity[n] / (1 / (grids[n][i + 1] - grids[n][i]))
                fixed = prefix.shape[1] if prefix is not None and n == model.action_stream else 0
                x[n] = torch.cat([x[n][:, :fixed], moved[:, fixed:]], dim=1) if fixed else moved
    return {n: x[n] for n in flows if n not in phase.noise}


def _speak(model: Model, stream: str, inputs: Inputs, kept: Cache) -> tuple[Inputs, Tensor]:
    """``inputs`` with the words of a stream said one by one, each the likeliest after those before, and their ids; those given begin."""
    assert inputs.ids is not None and inputs.present is not None, f"stream {stream} needs ids and how many of them are given"
    ids, present = inputs.ids.clone(), inputs.present.clone()
    rows = torch.arange(len(ids), device=ids.device)
    for _ in range(int((~present).sum(1).max())):
        now = replace(inputs, ids=ids, present=present)
        hidden, _kv = model.mot(model.embed([stream], now, cache=kept), kept, outputs=[stream])
        last = present.sum(1)
        said = model.speech[stream](hidden[stream][rows, (last - 1).clamp(min=0)]).argmax(-1)
        here = last < ids.shape[1]
        ids[rows[here], last[here]], present[rows[here], last[here]] = said[here], True
    return replace(inputs, ids=ids, present=present), ids


def _check_prefix(model: Model, length: int) -> None:
    head = model.spec.heads[model.action_stream]
    most = getattr(head, "prefix", 0)
    if length > most:
        raise UserError(
            f"{model.spec.name} was trained with up to {most} settled actions, {length} are given; "
            f"train with heads.{model.action_stream}.prefix={length}, or give fewer"
        )

"""Inference: the schedule of a model, phase by phase, each stream no oftener than the graph demands.

What the runs of a denoise phase share is prepared once (``Plan``), so that a run is nothing but arithmetic on tensors that are there: no
mask is made, nothing is read back to the host, no keys are copied but the live streams' own.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import UserError
from .flow import grid
from .graph import Graph
from .inputs import Inputs, Noisy, Outputs
from .model import GENERATES, Model
from .mot import KV, Cache, Clock, Pass
from .realtime import Prefix, Velocity, guided
from .spec import Phase


@dataclass(frozen=True)
class Request:
    """How an answer is wanted, where it is not as the schedule says.

    Attributes:
        steps: Euler steps.
        mode: one of the spec's modes; its ``clean`` flows come in ``Inputs.clean``.
        prefix: what is left of the chunk before, from which this one goes on; of as many rows as the noise.
    """

    steps: int | None = None
    mode: str | None = None
    prefix: Prefix | None = None

    @property
    def gradients(self) -> bool:
        """Whether the answer needs derivatives of the network."""
        return self.prefix is not None and self.prefix.guide is not None and self.prefix.guide.jacobian

    def tensors(self) -> list[Tensor]:
        """What of it a recorded call reads anew."""
        return [] if self.prefix is None else [self.prefix.actions, self.prefix.weights]


@dataclass
class Memory:
    """What slow phases left for the calls that follow.

    Attributes:
        kept: phase -> its streams' keys and values, and the patches that it predicted.
        calls: phase -> calls since it ran; ran: phase -> the time in seconds at which it did.
    """

    kept: dict[str, tuple[dict[str, KV], dict[str, Tensor]]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    ran: dict[str, float] = field(default_factory=dict)


def infer(model: Model, inputs: Inputs, noise: Mapping[str, Tensor], cache: Cache | None = None, request: Request | None = None) -> Outputs:
    """Answer a batch of observations, without gradients.

    Everything that does not change between denoise steps is computed once (``Model.observe``, ``Plan``) and read from there.

    Args:
        noise: flow -> (B, T, X), the start of the flow, standard normal. Where it has several times as many rows as the observations, each
            observation is answered as often, one after the other; what is observed is computed once.
        cache: streams computed before for these very observations.

    Raises:
        UserError: the spec has no such mode.
    """
    request = request or Request()
    with torch.no_grad() if request.gradients else torch.inference_mode():
        inputs = _as_weights(model, inputs)
        began = _now(model)
        kept, foresight = model.observe(inputs, cache, request.mode)
        observed = _now(model)
        outputs = _finish(model, inputs, noise, kept, foresight, request)
        timing = {"prefix": observed - began, "steps": _now(model) - observed}
    return _cloned(outputs, timing)


def infer_again(
    model: Model, inputs: Inputs, noise: Mapping[str, Tensor], memory: Memory, now: float, request: Request | None = None
) -> Outputs:
    """Answer the next observations of a run: phases of a longer ``period`` run when it has passed, and are read as they were between.

    Args:
        memory: of the calls before, brought up to date in place; a fresh one computes everything, as ``infer`` does.
        now: time in seconds, on any clock that does not go back.

    Raises:
        UserError: what a phase left is older than its ``stale`` limit, or as ``infer``.
    """
    request = request or Request()
    with torch.no_grad() if request.gradients else torch.inference_mode():
        inputs = _as_weights(model, inputs)
        began = _now(model)
        kept = model.contexts(inputs)
        foresight: dict[str, Tensor] = {}
        for name, phase in model.graph.schedule(request.mode).items():
            if phase.kind in GENERATES:
                break
            memory.calls[name] = memory.calls.get(name, phase.period) + 1
            if memory.calls[name] > phase.period:
                memory.kept[name], memory.calls[name], memory.ran[name] = model.fill(name, inputs, kept, request.mode), 1, now
            age = now - memory.ran[name]
            if phase.stale is not None and age > phase.stale:
                raise UserError(
                    f"phase '{name}' of {model.spec.name} ran {age:.2f} s ago, its limit is {phase.stale:.2f} s; "
                    "call at a higher rate, shorten its period or raise stale"
                )
            kept |= memory.kept[name][0]
            foresight |= memory.kept[name][1]
        observed = _now(model)
        outputs = _finish(model, inputs, noise, kept, foresight, request)
        timing = {"prefix": observed - began, "steps": _now(model) - observed}
    return _cloned(outputs, timing)


Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], object]]]
"""From a call to its outputs and what computes them again, where they lie, from the same tensors of whatever they hold by then."""


def cuda_graph(call: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
    """``Record`` by a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their plans and workspaces before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay


def unrecordable(graph: Graph) -> str | None:
    """Why no call can be recorded; None where it can."""
    for name, phase in graph.phases.items():
        if phase.kind == "ar":
            return f"phase '{name}' says words one by one, and the host waits for each"
        if phase.period > 1:
            return f"phase '{name}' runs at every call number {phase.period} only, so calls differ"
    return None


class Captured:
    """``infer`` recorded once and played from then on, for inputs of the shapes of an example: on CUDA one graph from frames to actions.

    A captured call is answered from the very tensors that it was made with, into which each call copies its own. The weights must stay
    where they are. What reads numbers back to the host runs before the graph (``Model.look``).
    The CUDA graph has not been run yet: where this was made there was none. ``tests/gpu/test_graph.py`` says what must hold;
    ``tests/vla/test_answers.py`` holds it for a recording of the same call on a CPU.

    Args:
        inputs: an example, on the device of the model.
        noise: an example.
        cache: streams computed before (frozen prefixes), which the graph reads where they lie and does not compute.
        record: what records.
        request: an example; calls may differ from it in what is left of the chunk before alone.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        noise: Mapping[str, Tensor],
        cache: Cache | None = None,
        record: Record = cuda_graph,
        request: Request | None = None,
    ) -> None:
        self.model, request = model, request or Request()
        self.inputs, self.noise = self._seen(inputs).each(torch.clone), {n: t.clone() for n, t in noise.items()}
        self.request = request if request.prefix is None else replace(request, prefix=request.prefix.each(torch.clone))
        self.outputs, self.replay = record(lambda: infer(model, self.inputs, self.noise, cache, self.request))

    def __call__(self, inputs: Inputs, noise: Mapping[str, Tensor], request: Request | None = None) -> Outputs:
        """As ``infer``."""
        given = [*self._seen(inputs).tensors(), *(noise[n] for n in self.noise), *(request or Request()).tensors()]
        for held, new in zip([*self.inputs.tensors(), *self.noise.values(), *self.request.tensors()], given, strict=True):
            assert held.shape == new.shape, f"captured for {tuple(held.shape)}, given {tuple(new.shape)}"
            held.copy_(new, non_blocking=True)
        self.replay()
        return _cloned(self.outputs)

    @torch.inference_mode()
    def _seen(self, inputs: Inputs) -> Inputs:
        return self.model.look(inputs)


class Plan:
    """All that the runs of a denoise phase over one batch of observations share (``mot.Pass``).

    Args:
        inputs: what streams that are not denoised are made of.
        cache: what was kept of earlier phases.
        x: flow -> (B, T, X), for the shapes.
        clocks: flow -> its time in each run.
    """

    def __init__(
        self, model: Model, phase: Phase, inputs: Inputs, cache: Cache, x: Mapping[str, Tensor], clocks: Mapping[str, Clock]
    ) -> None:
        self.model, self.dtype = model, next(model.mot.parameters()).dtype
        noisy = {n: Noisy(v.to(self.dtype), clocks[n].time(0, v)) for n, v in x.items()}
        tokens = model.embed(phase.streams, inputs, noisy, cache)
        runs = len(next(iter(clocks.values())).at)
        streams = model.spec.streams
        timed = {n: clocks[of].at if (of := streams[n].time_of) else (1.0,) * runs for n in phase.streams}
        alike = {n: x[n][:1] if clock.settled is None else x[n] for n, clock in clocks.items()}
        self.told = {n: [model.codec(n).told(clock.time(run, alike[n])) for run in range(runs)] for n, clock in clocks.items()}
        self.streams = {n: t.x for n, t in tokens.items()}
        self.body = Pass(model.mot, tokens, cache, {n: Clock(at) for n, at in timed.items()} | dict(clocks))

    def velocity(self, x: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
        """The velocities (B, T, X) of the flows ``x``, as ``Model.velocity`` at the times of ``run``."""
        flows = {n: self.model.seated(n, self.model.codec(n).join(v.to(self.dtype), self.told[n][run])) for n, v in x.items()}
        hidden, _ = self.body.run(self.streams | flows, run, outputs=list(x))
        return {n: self.model.codec(n).velocity(hidden[n]) for n in x}


def _finish(
    model: Model, inputs: Inputs, noise: Mapping[str, Tensor], kept: dict[str, KV], foresight: dict[str, Tensor], request: Request
) -> Outputs:
    """The first phase that generates and what follows it."""
    copies = _copies(inputs, noise)
    if copies > 1:
        inputs = model.see(inputs, list(model.graph.owner)).repeated(copies)
        kept = {n: kv.repeated(copies) for n, kv in kept.items()}
        foresight = {n: t.repeat_interleave(copies, dim=0) for n, t in foresight.items()}
    done: dict[str, Tensor] = {}
    words: dict[str, Tensor] = {}
    phases = itertools.dropwhile(lambda item: item[1].kind not in GENERATES, model.graph.schedule(request.mode).items())
    for name, phase in phases:
        now = replace(inputs, clean=dict(inputs.clean) | done)
        if phase.kind == "denoise":
            done |= _denoise(model, phase, now, noise, kept, request)
        elif phase.kind == "ar":
            inputs, words[phase.streams[0]] = _speak(model, phase.streams[0], now, kept)
            kept |= model.fill(name, inputs, kept, request.mode)[0]
        else:
            kv, seen = model.fill(name, now, kept, request.mode)
            kept |= kv
            foresight |= seen
    flows = {n: x for n, x in done.items() if n in model.foresight}
    actions = next((done.get(n, inputs.clean.get(n)) for n in model.actions), None)
    return Outputs(actions, foresight | flows, words)


def _denoise(model: Model, phase: Phase, inputs: Inputs, noise: Mapping[str, Tensor], kept: Cache, request: Request) -> dict[str, Tensor]:
    """The flows of a phase, integrated from noise to data by Euler's method, summed in the type of the noise."""
    steps = request.steps or phase.steps or 10
    flows = [n for n in phase.streams if n in model.spec.flows]
    x = {n: inputs.clean[n] if n in phase.clean else noise[n] for n in flows}
    grids = {n: grid(steps, phase.shift or model.spec.flow(n).shift) for n in flows}
    fixed = dict.fromkeys(phase.clean, (1.0,) * steps) | dict.fromkeys(phase.noise, (0.0,) * steps)
    prefix, settled = request.prefix, {}
    acts = [n for n in flows if n in model.actions and n not in fixed and prefix is not None]
    for n in acts:
        assert prefix is not None
        if prefix.guide is None:
            settled[n] = prefix.weights > 0
            x[n] = torch.where(settled[n][..., None], prefix.actions.to(x[n].dtype), x[n])
    clocks = {n: Clock(fixed.get(n, tuple(grids[n][:-1])), settled.get(n)) for n in flows}
    velocity: Velocity = Plan(model, phase, inputs, kept, x, clocks).velocity
    if phase.guidance is not None:
        velocity = _without(model, phase, inputs, x, clocks, request.mode, velocity)
    for n in acts:
        assert prefix is not None
        if prefix.guide is not None:
            velocity = guided(velocity, n, prefix, clocks[n].at)
    for run in range(steps):
        for n, v in velocity(x, run).items():
            if n not in fixed:
                moved = x[n] + v.to(x[n].dtype) / (1 / (grids[n][run + 1] - grids[n][run]))
                x[n] = torch.where(settled[n][..., None], x[n], moved) if n in settled else moved
    return {n: x[n] for n in flows if n not in phase.noise}


def _without(
    model: Model,
    phase: Phase,
    inputs: Inputs,
    x: Mapping[str, Tensor],
    clocks: Mapping[str, Clock],
    mode: str | None,
    velocity: Velocity,
) -> Velocity:
    """``velocity`` led away from what it would be without some streams (``spec.Guidance``)."""
    guidance, first = phase.guidance, next(iter(x.values()))
    assert guidance is not None
    gone = dict.fromkeys(guidance.without, torch.ones(len(first), dtype=torch.bool, device=first.device))
    bare = replace(inputs, dropped=dict(inputs.dropped) | gone)
    without = Plan(model, phase, bare, model.observe(bare, mode=mode)[0], x, clocks)

    def led(x: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
        plain = without.velocity(x, run)
        return {n: plain[n] + guidance.scale * (v - plain[n]) for n, v in velocity(x, run).items()}

    return led


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


def _copies(inputs: Inputs, noise: Mapping[str, Tensor]) -> int:
    """How often each observation is answered."""
    rows = {len(t) for t in noise.values()} or {1}
    seen = {len(t) for t in (inputs.state, inputs.ids, inputs.images, inputs.latents) if t is not None} if noise else rows
    seen = seen or {len(x) for x, _ in inputs.features.values()}
    assert len(rows) == len(seen) == 1, f"noise has {rows} rows, observations have {seen}"
    (many,), (one,) = rows, seen
    assert many % one == 0, f"{many} rows of noise are for {one} observations"
    return many // one


def _cloned(outputs: Outputs, timing: dict[str, float] | None = None) -> Outputs:
    """Tensors that autograd may take, and that the next call does not overwrite."""
    actions = None if outputs.actions is None else outputs.actions.clone()
    foresight, words = ({n: t.clone() for n, t in tensors.items()} for tensors in (outputs.foresight, outputs.words))
    return Outputs(actions, foresight, words, timing or {})


def _now(model: Model) -> float:
    """Milliseconds on a clock, when the device has done what it was told; nothing waits while a CUDA graph is being recorded."""
    device = next(model.parameters()).device
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def _as_weights(model: Model, inputs: Inputs) -> Inputs:
    """``inputs`` with numbers of the model's type; pixels stay as they are."""
    dtype = next(model.mot.parameters()).dtype
    pixels = inputs.images
    return replace(inputs.each(lambda t: t.to(dtype) if t.is_floating_point() else t), images=pixels)

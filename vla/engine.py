"""Inference: the schedule of a model, phase by phase, each stream no oftener than the graph demands.

What the denoise steps of an observation share is prepared once (``Plan``), so that a step is nothing but arithmetic on tensors that
are there: no mask is made, nothing is read back to the host, no keys are copied but the chunk's own.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .attention import attend, bias
from .experts.ready import Ready, ready
from .graph import Step
from .model import Inputs, Model, Outputs
from .mot import Cache, Tokens


def infer(model: Model, inputs: Inputs, noise: Float[Tensor, "B C A"], cache: Cache | None = None, steps: int | None = None) -> Outputs:
    """Answer a batch of observations, without gradients.

    Everything that does not change between denoise steps is computed once (``Model.observe``, ``Plan``) and read from there.

    Args:
        noise: the start of the flow, standard normal.
        cache: streams computed before for these very observations.
        steps: Euler steps, by default those of the spec's schedule.
    """
    with torch.inference_mode():
        kept, foresight = model.observe(_as_weights(model, inputs), cache)
        actions = Plan(model, inputs, kept, noise, steps or model.denoise_steps).run(noise)
    return Outputs(actions.clone(), {name: patches.clone() for name, patches in foresight.items()})  # tensors that autograd may take


class Captured:
    """``infer`` as one CUDA graph from frames to actions, for inputs of the shapes of an example.

    The prompt stream is padded to the spec's length, so a batch size needs one graph. A captured call is answered from the very
    tensors of ``inputs`` that it was made with, into which each call copies its own. The weights must stay where they are.

    Written for CUDA and not yet run on any: where this was made there was none. ``tests/gpu/test_graph.py`` says what must hold.

    Args:
        inputs: an example, on the device of the model.
        noise: an example.
        cache: streams computed before (frozen prefixes), which the graph reads where they lie and does not compute.
    """

    def __init__(self, model: Model, inputs: Inputs, noise: Float[Tensor, "B C A"], cache: Cache | None = None) -> None:
        self.inputs, self.noise = replace(inputs, **{n: t.clone() for n, t in vars(inputs).items() if t is not None}), noise.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their plans and workspaces before the capture
            for _ in range(3):
                infer(model, self.inputs, self.noise, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = infer(model, self.inputs, self.noise, cache)

    def __call__(self, inputs: Inputs, noise: Float[Tensor, "B C A"]) -> Outputs:
        """As ``infer``."""
        for name, held in vars(self.inputs).items():
            if held is not None:
                held.copy_(getattr(inputs, name))
        self.noise.copy_(noise)
        self.graph.replay()
        return Outputs(self.outputs.actions.clone(), {n: patches.clone() for n, patches in self.outputs.foresight.items()})


@dataclass(frozen=True)
class _Read:
    """What the chunk reads in one step of the backbone.

    Attributes:
        layer: of the action expert.
        keys, values: (B, G, T, H) of all columns, or None where there is nothing to read.
        own: the places in ``keys`` and ``values`` of the chunk's, written anew in every denoise step; None in a layer without any.
        mask: added to the scores, or None where every column may be read.
    """

    layer: int
    keys: Tensor | None
    values: Tensor | None
    own: tuple[Tensor, Tensor] | None
    mask: Tensor | None


class Plan:
    """All that the denoise steps of one batch of observations share.

    Keys and values of what the chunk reads lie in one buffer a layer, written once; behind them stands room for the chunk's own,
    which each step overwrites. Masks, rotary phases, time features and adaptive norms of all steps are computed beforehand.

    Args:
        cache: what ``Model.observe`` kept.
        noise: for its shape and device.
        steps: Euler steps from t = 0 to t = 1.
    """

    def __init__(self, model: Model, inputs: Inputs, cache: Cache, noise: Float[Tensor, "B C A"], steps: int) -> None:
        name, mot = model.action_stream, model.mot
        owner = mot.owner[name]
        self.steps, self.head, self.expert = steps, model.actions[name], mot.experts[owner]
        self.dtype = self.head.out.weight.dtype
        times = torch.arange(steps, dtype=torch.float64, device=noise.device).div(steps).float()
        features = self.head.features(times[:, None])
        self.features = None if features is None else features.to(self.dtype).split(1)
        tokens = model.embed([name], inputs, noise.to(self.dtype), times[:1].expand(noise.shape[:2]), cache)[name]
        from_zero = tokens.positions - tokens.positions[..., :1]
        phase, alone = (self.expert.phase(tokens.x, ids) for ids in (tokens.positions, from_zero))
        self.ready: Ready = ready(self.expert, phase, alone, times, (noise.shape[0], noise.shape[1]))
        past = [n for n in model.graph.reads(name) if n in cache]
        ran = [step for step in mot.steps if owner in step.layers]
        self.reads = [self._read(model, step, owner, tokens, past, cache) for step in ran]

    def run(self, noise: Float[Tensor, "B C A"]) -> Float[Tensor, "B C A"]:
        """The chunk that the flow leads to from ``noise``, by Euler's method, summed in the type of ``noise``."""
        x = noise
        for step in range(self.steps):
            x = torch.add(x, self.velocity(x, step).to(x.dtype), alpha=1 / self.steps)
        return x

    def velocity(self, noisy: Float[Tensor, "B C A"], step: int) -> Float[Tensor, "B C A"]:
        """As ``Model.velocity``, at the time of ``step``."""
        x = self.head.join(noisy.to(self.dtype), None if self.features is None else self.features[step])
        for read in self.reads:
            if read.own is not None:
                q, k, v = self.ready.project(read.layer, x, step)
                read.own[0].copy_(k)
                read.own[1].copy_(v)
            else:
                q = self.ready.ask(read.layer, x, step)
            if read.keys is None or read.values is None:
                attended = torch.zeros_like(q).transpose(1, 2).flatten(2)
            else:
                attended = attend(q, read.keys, read.values, read.mask)
            x = self.ready.finish(read.layer, x, attended, step)
        return self.head.velocity(self.ready.final(x, step))

    def _read(self, model: Model, step: Step, owner: str, tokens: Tokens, past: list[str], cache: Cache) -> _Read:
        name, graph = model.action_stream, model.graph
        layer, crossed = step.layers[owner], owner in step.crossed
        ready = [n for n in past if model.mot.owner[n] in step.layers.keys() - step.crossed and (name, n) in step.edges]
        columns = ready if crossed else [*ready, name]
        if not columns:
            return _Read(layer, None, None, None, None)
        present = {n: tokens.present if n == name else cache[n].present for n in columns}
        mask = graph.mask([name], columns, present, tokens.x.device, step.edges)
        added = None if mask is None else bias(mask, self.dtype)
        places = {n: step.layers[model.mot.owner[n]] for n in ready}
        keys, values = [cache[n].keys[i] for n, i in places.items()], [cache[n].values[i] for n, i in places.items()]
        if crossed:
            return _Read(layer, *self.expert.adapt(layer, torch.cat(keys, dim=2), torch.cat(values, dim=2)), None, added)
        room = tokens.x.new_empty(len(tokens.x), model.spec.space.kv_heads, tokens.x.shape[1], model.spec.space.head_dim)
        whole = torch.cat([*keys, room], dim=2), torch.cat([*values, room], dim=2)
        own = whole[0][:, :, -room.shape[2] :], whole[1][:, :, -room.shape[2] :]
        return _Read(layer, *whole, own, added)


def _as_weights(model: Model, inputs: Inputs) -> Inputs:
    """``inputs`` with numbers of the model's type."""
    dtype = model.actions[model.action_stream].out.weight.dtype
    state, latents = (None if t is None else t.to(dtype) for t in (inputs.state, inputs.latents))
    return replace(inputs, state=state, latents=latents)

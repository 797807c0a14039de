"""A spec made runnable: embed the streams, run the backbone, read the heads."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ..errors import UserError
from .experts import Decoder, Expert, PretrainedVLM
from .flow import interpolate
from .foresight import LatentForesight
from .graph import Graph
from .heads import ActionHead, StateEncoder
from .modules import ModuleDict
from .mot import KV, Cache, MoT, Tokens
from .spec import DecoderExpert, FlowHead, LatentHead, PretrainedExpert, Spec


@dataclass(frozen=True)
class Inputs:
    """What the streams are made of. A field is needed only where a live stream is made of it.

    Attributes:
        images: (B, V, 3, Y, X), uint8 or float from 0 to 255, views in the spec's camera order.
        ids: prompt token ids (B, T); present: (B, T) bool, False on padding.
        state: normalised proprioception (B, S).
        latents: patches (B, T, P) of the present frames, where foresight needs them; encoded from ``images`` where absent.
    """

    images: UInt8[Tensor, "B V 3 Y X"] | Float[Tensor, "B V 3 Y X"] | None = None
    ids: Int[Tensor, "B T"] | None = None
    present: Bool[Tensor, "B T"] | None = None
    state: Float[Tensor, "B S"] | None = None
    latents: Float[Tensor, "B L P"] | None = None


@dataclass(frozen=True)
class Targets:
    """What training compares with.

    Attributes:
        actions: normalised chunk (B, C, A); mask: (B, C), False after the episode's end.
        future: (B, V, 3, Y, X) uint8 frames of the foresight cameras ``horizon`` steps ahead, or their patches (B, T, P).
    """

    actions: Float[Tensor, "B C A"]
    mask: Bool[Tensor, "B C"]
    future: Tensor


@dataclass(frozen=True)
class Outputs:
    """What inference answers: the normalised chunk (B, C, A), and predicted latent patches (B, T, P) per foresight stream."""

    actions: Float[Tensor, "B C A"]
    foresight: dict[str, Tensor] = field(default_factory=dict)


class Model(nn.Module):
    """The networks of a spec. ``vla/mot.py`` is the loop, ``vla/graph.py`` says who reads whom.

    Raises:
        UserError: the experts' sizes do not meet in one attention space.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.graph = Graph(spec)
        experts = {name: _expert(config, spec) for name, config in spec.experts.items()}
        _check_space(spec, experts)
        self.mot = MoT(self.graph, experts)
        widths = {name: experts[stream.expert].width for name, stream in spec.streams.items()}
        linear = {name: stream.encoder == "linear" for name, stream in spec.streams.items()}
        states = [name for name, stream in spec.streams.items() if stream.tokens == "state"]
        self.states = ModuleDict({n: StateEncoder(spec.state_dim, widths[n], linear[n]) for n in states})
        flows = {n: h for n, h in spec.heads.items() if isinstance(h, FlowHead)}
        latents = {n: h for n, h in spec.heads.items() if isinstance(h, LatentHead)}
        self.actions = ModuleDict({n: ActionHead(h.action_dim, widths[n], self._mixed_time(n), linear[n]) for n, h in flows.items()})
        self.foresight = ModuleDict(
            {n: LatentForesight(h, widths[n], spec.streams[n].length, spec.streams[n].tokens == "latents") for n, h in latents.items()}
        )
        for name, config in spec.experts.items():
            if config.frozen:
                self.mot.experts[name].requires_grad_(False)

    # the parts of a forward pass ------------------------------------------------------------------------------------

    def embed(
        self, names: Sequence[str], inputs: Inputs, noisy: Tensor | None = None, time: Tensor | None = None, cache: Cache | None = None
    ) -> dict[str, Tokens]:
        """Tokens of the streams ``names``; action streams take the ``noisy`` chunk (B, C, A) and its ``time`` (B, C).

        Args:
            cache: streams computed before; those after them count on from where they ended.
        """
        inputs = self.see(inputs, names)
        given = next(t for t in (noisy, inputs.state, inputs.ids, inputs.latents) if t is not None)
        tokens = {n: self._embed(n, self.spec.streams[n].tokens, inputs, noisy, time, given.shape[0]) for n in names}
        own = {n: kv.own for n, kv in (cache or {}).items() if kv.own is not None}
        own |= {n: part.own for n, part in tokens.items() if part.own is not None}
        positions = self.graph.positions(self.presence(inputs), given.shape[0], given.device, own)
        return {n: replace(part, positions=positions[n]) for n, part in tokens.items()}

    def see(self, inputs: Inputs, names: Sequence[str]) -> Inputs:
        """``inputs`` with the latents of the present frames, where one of the streams ``names`` needs them."""
        seeing = next((n for n in names if n in self.foresight and self.foresight[n].needs_present), None)
        if seeing is None or inputs.latents is not None:
            return inputs
        assert inputs.images is not None, f"stream {seeing} needs images"
        module = self.foresight[seeing]
        views = [self.spec.cameras.index(camera) for camera in module.head.cameras]
        return replace(inputs, latents=module.encode(inputs.images[:, views]))

    def presence(self, inputs: Inputs) -> dict[str, Tensor | None]:
        """Stream -> which of its tokens are there; None where all are."""
        return {n: inputs.present if s.tokens == "prompt" else None for n, s in self.spec.streams.items()}

    def observe(self, inputs: Inputs, cache: Cache | None = None) -> tuple[dict[str, KV], dict[str, Tensor]]:
        """Run every phase before the first denoise phase, once per observation.

        Args:
            cache: streams already computed (frozen prefixes kept from before); they are not run again.

        Returns:
            keys and values for the phases that follow; predicted latent patches per foresight stream.
        """
        kept: dict[str, KV] = dict(cache or {})
        foresight: dict[str, Tensor] = {}
        plan = self.graph.cached()
        for name, phase in self.graph.phases.items():
            live = [s for s in phase.streams if s not in kept]
            if phase.kind == "denoise" or not live:
                continue
            wanted = [s for s in live if s in self.foresight]
            inputs = self.see(inputs, live)
            hidden, kv = self.mot(self.embed(live, inputs, cache=kept), kept, keep=[s for s in plan[name] if s in live], outputs=wanted)
            foresight |= {s: self.foresight[s].predict(hidden[s], inputs.latents) for s in wanted}
            kept |= kv
        return kept, foresight

    def velocity(self, inputs: Inputs, noisy: Float[Tensor, "B C A"], time: Float[Tensor, "B C"], cache: Cache) -> Float[Tensor, "B C A"]:
        """The flow velocity of the action stream, reading ``cache``."""
        name = self.action_stream
        hidden, _ = self.mot(self.embed([name], inputs, noisy, time, cache), cache, outputs=[name])
        return self.actions[name].velocity(hidden[name])

    def joint(self, inputs: Inputs, noisy: Tensor, time: Tensor, cache: Cache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward over all streams that are not in ``cache``: velocity and predicted patches, as in training."""
        live = [n for n in self.graph.names if n not in (cache or {})]
        heads = [n for n in live if n in self.spec.heads]
        inputs = self.see(inputs, live)
        hidden, _ = self.mot(self.embed(live, inputs, noisy, time, cache), cache or {}, outputs=heads)
        foresight = {n: self.foresight[n].predict(hidden[n], inputs.latents) for n in heads if n in self.foresight}
        return self.actions[self.action_stream].velocity(hidden[self.action_stream]), foresight

    def losses(
        self, inputs: Inputs, targets: Targets, noise: Float[Tensor, "B C A"], time: Float[Tensor, "B C"], cache: Cache | None = None
    ) -> dict[str, Tensor]:
        """Weighted sum ``loss`` and its terms, one per head."""
        velocity, foresight = self.joint(inputs, interpolate(noise, targets.actions, time), time, cache)
        terms = {}
        for name, head in self.spec.heads.items():
            if isinstance(head, FlowHead):
                terms[name] = self.actions[name].loss(velocity, targets.actions - noise, targets.mask, head.loss)
            else:
                future = targets.future if targets.future.ndim == 3 else self.foresight[name].encode(targets.future)
                terms[name] = self.foresight[name].loss(foresight[name], future)
        total = sum((self.spec.heads[n].weight * term for n, term in terms.items()), torch.zeros((), device=velocity.device))
        return {"loss": total} | terms

    # what the spec says ---------------------------------------------------------------------------------------------

    @property
    def action_stream(self) -> str:
        """The stream with the flow head."""
        return next(iter(self.actions))

    @property
    def denoise_steps(self) -> int:
        """Euler steps of the denoise phase."""
        return next(p.steps or 10 for p in self.graph.phases.values() if p.kind == "denoise")

    def vlm(self, stream: str) -> PretrainedVLM:
        """The expert of a prompt stream."""
        expert = self.mot.experts[self.spec.streams[stream].expert]
        assert isinstance(expert, PretrainedVLM), f"stream {stream} holds no prompt"
        return expert

    def trained(self) -> dict[str, Tensor]:
        """Names and values of the parameters that training changes: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> "Model":
        """Frozen experts stay in evaluation mode whatever the rest does."""
        super().train(mode)
        for name, config in self.spec.experts.items():
            if config.frozen:
                self.mot.experts[name].eval()
        return self

    def _timed(self, stream: str) -> bool:
        expert = self.spec.experts[self.spec.streams[stream].expert]
        return isinstance(expert, DecoderExpert) and expert.time == "adaptive_norm"

    def _mixed_time(self, stream: str) -> str | None:
        """Where the flow time joins the actions rather than the expert's norms: what its embedding is a function of."""
        expert = self.spec.experts[self.spec.streams[stream].expert]
        return None if self._timed(stream) else expert.time_of if isinstance(expert, DecoderExpert) else "t"

    def _embed(self, name: str, kind: str, inputs: Inputs, noisy: Tensor | None, time: Tensor | None, batch: int) -> Tokens:
        empty = torch.empty(0)  # positions are filled in by embed
        match kind:
            case "prompt":
                assert inputs.images is not None and inputs.ids is not None, f"stream {name} needs images and prompt ids"
                prompt = self.vlm(name).embed(inputs.images, inputs.ids, inputs.present)
                scale = prompt.x.shape[-1] ** 0.5 if self.spec.streams[name].scale == "sqrt_width" else 1.0
                return Tokens(prompt.x * scale, empty, inputs.present, inject=prompt.inject, own=prompt.own)
            case "state":
                assert inputs.state is not None, f"stream {name} needs the state"
                return Tokens(self.states[name](inputs.state), empty, time=self._clean(name, batch, inputs.state))
            case "actions":
                assert noisy is not None and time is not None, f"stream {name} needs a noisy chunk and its time"
                return Tokens(self.actions[name].encode(noisy, time), empty, time=time if self._timed(name) else None)
            case _:
                tokens = self.foresight[name].tokens(batch, inputs.latents)
                return Tokens(tokens, empty, time=self._clean(name, batch, tokens))

    def _clean(self, name: str, batch: int, like: Tensor) -> Tensor | None:
        """Flow time 1 for the tokens of clean streams, where their expert is conditioned on time."""
        return torch.ones(batch, self.spec.streams[name].length, device=like.device) if self._timed(name) else None


def build(spec: Spec, seed: int = 0) -> Model:
    """The model of ``spec``; fresh weights are a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(spec)


def sketch(spec: Spec) -> Model:
    """The model of ``spec`` on the meta device: all names and shapes, no weights, no memory."""
    with torch.device("meta"):
        return Model(spec)


def _expert(config: PretrainedExpert | DecoderExpert, spec: Spec) -> Expert:
    if isinstance(config, PretrainedExpert):
        return PretrainedVLM(config, spec.space.rope_theta)
    return Decoder(config, spec.space)


def _check_space(spec: Spec, experts: dict[str, Expert]) -> None:
    for name, expert in experts.items():
        if isinstance(expert, PretrainedVLM) and expert.space != spec.space:
            raise UserError(
                f"{spec.name}: the weights of expert '{name}' live in the attention space {expert.space!r}; "
                f"set the spec's space to it (it is {spec.space!r})"
            )

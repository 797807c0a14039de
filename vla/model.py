"""A spec made runnable: embed the streams, run the backbone, read the heads."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .experts import Bridge, Decoder, Expert, PretrainedVLM
from .flow import draw_times, flow_loss, interpolate, table
from .foresight import LatentForesight
from .graph import Graph
from .heads import FlowCodec, StateEncoder, mlp
from .inputs import Inputs, Noisy, Targets
from .modules import ModuleDict
from .mot import KV, Cache, MoT, Tokens
from .packing import pack
from .spec import DecoderExpert, FlowHead, LatentHead, PretrainedExpert, Spec, Stream, TimeFeatures, WordHead

GENERATES = ("ar", "denoise")
"""Phases that make what was not observed."""


class Model(nn.Module):
    """The networks of a spec. ``vla/mot.py`` is the loop, ``vla/graph.py`` says who reads whom.

    Raises:
        UserError: the experts' sizes do not meet in one attention space.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.graph = Graph(spec)
        self.mot = MoT(self.graph, _experts(spec, self.graph))
        streams = spec.streams
        self.widths = widths = {
            n: self.mot.experts[e].width if (e := self.graph.owner.get(n)) else s.width or 0 for n, s in streams.items()
        }
        times = {n: self._time(n) for n in streams}
        kinds = {kind: [n for n, s in streams.items() if s.tokens == kind] for kind in ("state", "hidden", "queries")}
        self.states = ModuleDict({n: StateEncoder(spec.state_dim, widths[n], streams[n].encoder, streams[n].inner) for n in kinds["state"]})
        self.actions = ModuleDict(
            {
                n: FlowCodec(h.action_dim, widths[n], streams[n].encoder, *times[n], h.inner)
                for n, h in spec.heads.items()
                if isinstance(h, FlowHead)
            }
        )
        self.foresight = ModuleDict(
            {n: LatentForesight(h, streams[n], widths[n], *times[n]) for n, h in spec.heads.items() if isinstance(h, LatentHead)}
        )
        self.adapters = ModuleDict(
            {n: mlp(widths[s.of], widths[n], s.encoder, s.inner) for n in kinds["hidden"] if (s := streams[n]).of is not None}
        )
        given = {n: s.width for n, s in streams.items() if s.tokens == "features" and n in self.graph.owner}
        self.features = ModuleDict(
            {n: mlp(size, widths[n], streams[n].encoder, streams[n].inner) for n, size in given.items() if size is not None}
        )
        said = {n: s.vocabulary for n, s in streams.items() if s.vocabulary is not None}
        self.words = ModuleDict({n: nn.Embedding(size, widths[n]) for n, size in said.items()})
        spoken = [n for n, h in spec.heads.items() if isinstance(h, WordHead)]
        self.speech = ModuleDict({n: nn.Linear(widths[n], said[n], bias=False) for n in spoken})
        for n in said:
            nn.init.normal_(self.words[n].weight, std=0.02)
        learned = {n: torch.randn(streams[n].length, widths[n]) * 0.02 for n in kinds["queries"] if n not in spec.heads}
        self.registers = nn.ParameterDict(learned)
        seats = {n: torch.randn(s.length, widths[n]) * 0.02 for n, s in streams.items() if s.table == "learned"}
        self.places = nn.ParameterDict(seats)
        for name, config in spec.experts.items():
            if config.frozen:
                self.mot.experts[name].requires_grad_(False)

    # the parts of a forward pass ------------------------------------------------------------------------------------

    def embed(
        self, names: Sequence[str], inputs: Inputs, noisy: Mapping[str, Noisy] | None = None, cache: Cache | None = None
    ) -> dict[str, Tokens]:
        """Tokens of the streams ``names``; flows take what is ``noisy``.

        Args:
            cache: streams computed before; those after them count on from where they ended.
        """
        inputs = self.see(inputs, names)
        noisy, cache = noisy or {}, cache or {}
        batch, device = _batch(inputs, noisy, cache)
        tokens = {n: self._embed(n, inputs, noisy, cache, batch) for n in names}
        own = {n: kv.own for n, kv in cache.items() if kv.own is not None}
        own |= {n: part.own for n, part in tokens.items() if part.own is not None}
        present = self.presence(inputs)
        positions = self.graph.positions(present, batch, device, own)
        return {n: replace(part, positions=positions[n], present=present.get(n)) for n, part in tokens.items()}

    def contexts(self, inputs: Inputs) -> dict[str, KV]:
        """The streams without an expert, as cross layers read them."""
        present = self.presence(inputs)
        out = {}
        for name in self.graph.contexts:
            if name in self.states:
                assert inputs.state is not None, f"context {name} needs the state"
                hidden = self.states[name](inputs.state)
            else:
                assert name in inputs.features, f"context {name} needs its features"
                hidden = inputs.features[name][0]
            out[name] = KV(present=present.get(name), hidden=hidden)
        return out

    def see(self, inputs: Inputs, names: Sequence[str]) -> Inputs:
        """``inputs`` with the latents of the present frames, where one of the streams ``names`` needs them."""
        modules = [self.foresight[n] for n in names if n in self.foresight and self.foresight[n].needs_present]
        modules += [self.foresight[s.of] for n in names if (s := self.spec.streams[n]).tokens == "present" and s.of is not None]
        if not modules or inputs.latents is not None:
            return inputs
        assert inputs.images is not None, f"the streams {', '.join(names)} need images"
        module = modules[0]
        frames = self.spec.history.frames
        views = [frames * self.spec.cameras.index(camera) + frames - 1 for camera in module.head.cameras]
        return replace(inputs, latents=module.encode(inputs.images[:, views]).to(next(module.parameters()).dtype))

    def look(self, inputs: Inputs) -> Inputs:
        """``inputs`` with the image tokens of every prompt whose vision tower waits for the host: the rest of a call does not."""
        names = [n for n, s in self.spec.streams.items() if s.tokens == "prompt" and self.vlm(n).family.waits]
        return inputs if inputs.images is None else replace(inputs, seen={n: self.vlm(n).look(inputs.images) for n in names})

    def presence(self, inputs: Inputs) -> dict[str, Tensor | None]:
        """Stream -> which of its tokens are there; None where all are."""
        out: dict[str, Tensor | None] = {n: inputs.present for n, s in self.spec.streams.items() if s.tokens in ("prompt", "words")}
        out |= {n: present for n, (_, present) in inputs.features.items()}
        for name, rows in inputs.dropped.items():
            here, length = out.get(name), self.spec.streams[name].length
            out[name] = ~rows[:, None].expand(-1, length) if here is None else here & ~rows[:, None]
        for name, stream in self.spec.streams.items():  # what is made of padding is padding
            if stream.tokens == "hidden" and name not in inputs.dropped:
                out[name] = out.get(stream.of or "")
        return out

    def run(
        self,
        inputs: Inputs,
        noisy: Mapping[str, Noisy],
        cache: Cache | None = None,
        outputs: Sequence[str] | None = None,
        moved: Mapping[str, Tensor] | None = None,
        packed: bool = False,
    ) -> dict[str, Tensor]:
        """One joint forward over all streams that are not in ``cache``, as in training: final hidden states of ``outputs``.

        Streams that need final hidden states of others run after these (``Graph.stages``).

        Args:
            moved: stream -> what is added to its embeddings (the gradient probe moves tokens so).
            packed: whether the samples are laid end to end (``packing.py``).
        """
        moved = moved or {}
        kept = {n: _moved_context(kv, moved.get(n)) for n, kv in self.contexts(inputs).items()} | dict(cache or {})
        hidden: dict[str, Tensor] = {}
        for number, stage in enumerate(self.graph.stages):
            live = [n for n in stage if n not in (cache or {})]
            if not live:
                continue
            later = [row for rest in self.graph.stages[number + 1 :] for row in rest]
            keep = [n for n in live if self.graph.informs(n, later) or any((row, n) in self.graph.edges for row in later)]
            tokens = self.embed(live, inputs, noisy, kept)
            tokens = {n: replace(t, x=t.x + moved[n]) if n in moved else t for n, t in tokens.items()}
            asked = [n for n in live if outputs is None or n in outputs]
            out, kv = (pack(self.mot, tokens, kept, asked), {}) if packed else self.mot(tokens, kept, keep, asked)
            hidden |= out
            kept |= kv
        return hidden

    def observe(self, inputs: Inputs, cache: Cache | None = None, mode: str | None = None) -> tuple[dict[str, KV], dict[str, Tensor]]:
        """Run every phase before the first that generates, once per observation.

        Args:
            cache: streams already computed (frozen prefixes kept from before); they are not run again.

        Returns:
            keys and values for the phases that follow; predicted latent patches per foresight stream.
        """
        kept: dict[str, KV] = self.contexts(inputs) | dict(cache or {})
        foresight: dict[str, Tensor] = {}
        for name, phase in self.graph.schedule(mode).items():
            if phase.kind in GENERATES:
                break
            kv, seen = self.fill(name, inputs, kept, mode)
            kept |= kv
            foresight |= seen
        return kept, foresight

    def fill(self, name: str, inputs: Inputs, cache: Cache, mode: str | None = None) -> tuple[dict[str, KV], dict[str, Tensor]]:
        """Run one prefill or regress phase over ``cache``: what later phases read of it, and its predicted patches."""
        live = [s for s in self.graph.schedule(mode)[name].streams if s not in cache]
        if not live:
            return {}, {}
        wanted = [s for s in live if s in self.foresight]
        inputs = self.see(inputs, live)
        hidden, kv = self.mot(self.embed(live, inputs, cache=cache), cache, [s for s in self.graph.cached(mode)[name] if s in live], wanted)
        return kv, {s: self.foresight[s].predict(hidden[s], inputs.latents) for s in wanted}

    def velocity(self, streams: Sequence[str], inputs: Inputs, noisy: Mapping[str, Noisy], cache: Cache) -> dict[str, Tensor]:
        """The velocities (B, T, X) of the flows among ``streams``, which run together and read ``cache``."""
        flows = [n for n in streams if n in noisy]
        hidden, _ = self.mot(self.embed(streams, inputs, noisy, cache), cache, outputs=flows)
        return {n: self.codec(n).velocity(hidden[n]) for n in flows}

    def joint(self, inputs: Inputs, noisy: Mapping[str, Noisy], cache: Cache | None = None, packed: bool = False) -> dict[str, Tensor]:
        """One forward over all streams that are not in ``cache``: what each head predicts (``answer``)."""
        heads = [n for n in self.spec.heads if n not in (cache or {})]
        inputs = self.see(inputs, list(self.graph.owner))
        hidden = self.run(inputs, noisy, cache, heads, packed=packed)
        return {n: self.answer(n, hidden[n], inputs) for n in heads}

    def answer(self, head: str, hidden: Tensor, inputs: Inputs) -> Tensor:
        """What a head makes of final hidden states: a velocity (B, T, X), patches (B, T, P), or scores of words (B, T, Z)."""
        if head in self.speech:
            return self.speech[head](hidden)
        if head in self.spec.flows:
            return self.codec(head).velocity(hidden)
        return self.foresight[head].predict(hidden, inputs.latents)

    def draw(self, rows: int, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Noise (B, T, X) and time (B, T) of every flow for ``rows`` samples in training, drawn on the CPU: the same on any device. The
        steps of a chunk that are settled before carry t = 1."""
        noise: dict[str, Tensor] = {}
        time: dict[str, Tensor] = {}
        device, shapes = next(self.parameters()).device, self.flow_shapes()
        for name in self.spec.flows:
            head, (length, size) = self.spec.flow(name), shapes[name]
            noise[name] = torch.randn(rows, length, size, generator=generator).to(device)
            drawn = draw_times((rows, 1), head, generator).expand(rows, length)
            if isinstance(head, FlowHead) and head.prefix:
                settled = torch.randint(0, head.prefix + 1, (rows, 1), generator=generator)
                drawn = torch.where(torch.arange(length) < settled, 1.0, drawn)
            time[name] = drawn.to(device)
        return noise, time

    def losses(
        self,
        inputs: Inputs,
        targets: Targets,
        noise: Mapping[str, Tensor],
        time: Mapping[str, Tensor],
        cache: Cache | None = None,
        shares: Mapping[str, float] | None = None,
        packed: bool = False,
    ) -> dict[str, Tensor]:
        """Weighted sum ``loss`` and its terms, one per head.

        Args:
            noise: flow -> standard normal like its data; time: flow -> (B, T). Chunk steps at t = 1 are given and not scored.
            shares: flow -> factor on its term, where these are some rows of a larger batch.
            packed: as in ``run``; the same numbers, faster where much is padding and the batch is long.
        """
        data = {n: self.data(n, targets) for n in self.spec.heads if n not in self.speech}
        noisy = {n: Noisy(interpolate(noise[n], data[n], time[n]), time[n]) for n in self.spec.flows}
        predicted = self.joint(replace(inputs, clean={n: data[n] for n in noisy} | dict(inputs.clean)), noisy, cache, packed)
        terms = {}
        for name, head in self.spec.heads.items():
            if name in noisy:
                counted = time[name] < 1
                counted = counted & targets.mask if isinstance(head, FlowHead) else counted
                kind = head.loss if isinstance(head, FlowHead) else "l2"
                loss = flow_loss(predicted[name], data[name] - noise[name], counted, time[name], self.spec.flow(name), kind)
                terms[name] = loss if shares is None else loss * shares.get(name, 1.0)
            elif name in data:
                terms[name] = F.mse_loss(predicted[name], data[name])
            else:
                terms[name] = self._next_words(predicted[name], inputs)
        total = sum((self.spec.heads[n].weight * term for n, term in terms.items()), torch.zeros((), device=targets.actions.device))
        return {"loss": total} | terms

    def _next_words(self, scores: Float[Tensor, "B T Z"], inputs: Inputs) -> Float[Tensor, ""]:
        """Cross-entropy of each present word given what comes before it."""
        assert inputs.ids is not None, "the loss on words needs their ids"
        here = torch.ones_like(inputs.ids, dtype=torch.bool) if inputs.present is None else inputs.present
        ids = torch.where(here, inputs.ids, -100)
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)

    def data(self, head: str, targets: Targets) -> Tensor:
        """What a head's predictions end in: the chunk (B, C, A), or the patches (B, T, P) of the future frames."""
        if head in self.actions:
            return targets.actions
        return targets.future if targets.future.ndim == 3 else self.foresight[head].encode(targets.future)

    def codec(self, flow: str) -> FlowCodec:
        """How a flow enters and leaves the backbone."""
        module = self.actions[flow] if flow in self.actions else self.foresight[flow].codec
        assert module is not None, f"stream {flow} is not a flow"
        return module

    # what the spec says ---------------------------------------------------------------------------------------------

    @property
    def action_stream(self) -> str:
        """The stream of actions.

        Raises:
            UserError: the spec has none.
        """
        if not self.actions:
            raise UserError(f"{self.spec.name} has no stream of actions, so it is no policy; give one of its streams a flow head")
        return next(iter(self.actions))

    def flow_shapes(self) -> dict[str, tuple[int, int]]:
        """Flow -> tokens and numbers per token (T, X), that of the actions first."""
        first = [*self.actions, *(n for n in self.spec.flows if n not in self.actions)]
        return {n: (self.spec.streams[n].length, self.codec(n).size) for n in first}

    def shortened(self, length: int) -> "Model":
        """The same modules for prompts of ``length`` tokens, and for streams made of their hidden states."""
        out, mot = copy(self), copy(self.mot)
        out._modules = dict(self._modules)
        out.spec = self.spec.shortened(length)
        mot.graph = out.graph = Graph(out.spec)
        out.mot = mot
        return out

    def vlm(self, stream: str) -> PretrainedVLM:
        """The expert of a prompt stream."""
        expert = self.mot.experts[self.graph.owner[stream]]
        assert isinstance(expert, PretrainedVLM), f"stream {stream} holds no prompt"
        return expert

    def trained(self) -> dict[str, Tensor]:
        """Names and values of the parameters that training changes: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> "Model":
        """Experts of which nothing learns stay in evaluation mode whatever the rest does."""
        super().train(mode)
        for expert in self.mot.experts.values():
            if not any(parameter.requires_grad for parameter in expert.parameters()):
                expert.eval()
        return self

    def _timed(self, stream: str) -> bool:
        expert = self.spec.experts[self.graph.owner[stream]]
        return isinstance(expert, DecoderExpert) and expert.time != "none"

    def _time(self, stream: str) -> tuple[str | None, TimeFeatures]:
        """Where the flow time joins a flow's tokens rather than the expert's norms: what its embedding is a function of, and which."""
        expert, joins = self.spec.experts.get(self.spec.streams[stream].expert or ""), self.spec.streams[stream].joins
        if not isinstance(expert, DecoderExpert):
            return "t", TimeFeatures()
        if joins is not None:
            return expert.time_of, joins
        return None if expert.time != "none" else expert.time_of, expert.time_features

    def _embed(self, name: str, inputs: Inputs, noisy: Mapping[str, Noisy], cache: Cache, batch: int) -> Tokens:
        """Tokens without positions, which ``embed`` fills in."""
        stream, empty = self.spec.streams[name], torch.empty(0)
        if stream.tokens == "prompt":
            assert inputs.images is not None and inputs.ids is not None, f"stream {name} needs images and prompt ids"
            prompt = self.vlm(name).embed(inputs.images, inputs.ids, inputs.present, inputs.seen.get(name))
            scale = prompt.x.shape[-1] ** 0.5 if stream.scale == "sqrt_width" else 1.0
            return Tokens(prompt.x * scale, empty, inject=prompt.inject, own=prompt.own, picture=inputs.ids == self.vlm(name).image_token)
        if stream.tokens in ("actions", "frames"):
            assert name in noisy, f"flow {name} needs what is noisy of it, and its time"
            x, time = self.codec(name).encode(noisy[name].x, noisy[name].time), noisy[name].time
        else:
            x = self._clean(name, stream, inputs, cache, batch)
            time = torch.ones(x.shape[:2], device=x.device)
            if stream.time_of is not None:
                time = noisy[stream.time_of].time[:, -1:].expand(x.shape[:2])
        source = cache.get(stream.of or "") if stream.tokens == "hidden" else None
        return Tokens(
            self.seated(name, x), empty, time=time if self._timed(name) else None, picture=None if source is None else source.picture
        )

    def seated(self, name: str, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Embeddings of a stream with what a table says of their places, where it has one."""
        first = self.spec.streams[name].table
        if first == "learned":
            return x + self.places[name].to(x.dtype)
        return x if first is None else x + table(first, x.shape[1], x.shape[2]).to(x.device, x.dtype)

    def _clean(self, name: str, stream: Stream, inputs: Inputs, cache: Cache, batch: int) -> Tensor:
        """Embeddings (B, T, D) of a stream that is neither a prompt nor a flow."""
        match stream.tokens:
            case "state":
                assert inputs.state is not None, f"stream {name} needs the state"
                return self.states[name](inputs.state)
            case "words":
                assert inputs.ids is not None, f"stream {name} needs ids"
                return self.words[name](inputs.ids)
            case "features":
                assert name in inputs.features, f"stream {name} needs its features"
                return self.features[name](inputs.features[name][0])
            case "queries" if name in self.registers:
                return self.registers[name][None].expand(batch, -1, -1)
            case "hidden":
                hidden = cache[stream.of or ""].hidden
                assert hidden is not None, f"stream {name} needs the hidden states of {stream.of}"
                return self.adapters[name](hidden)
            case "present" | "clean":
                data = inputs.latents if stream.tokens == "present" else inputs.clean.get(stream.of or "")
                assert data is not None, f"stream {name} needs the data of {stream.of}"
                return self.codec(stream.of or "").encode(data, torch.ones(data.shape[:2], device=data.device))
            case _:
                return self.foresight[name].tokens(batch, inputs.latents)


def build(spec: Spec, seed: int = 0) -> Model:
    """The model of ``spec``; fresh weights are a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(spec)


def sketch(spec: Spec) -> Model:
    """The model of ``spec`` on the meta device: all names and shapes, no weights, no memory."""
    with torch.device("meta"):
        return Model(spec)


def _experts(spec: Spec, graph: Graph) -> dict[str, Expert]:
    experts: dict[str, Expert] = {}
    for name, config in spec.experts.items():  # those of pretrained weights first: others read their hidden states
        if isinstance(config, PretrainedExpert):
            experts[name] = PretrainedVLM(config, spec.space.rope_theta)
    for name, config in spec.experts.items():
        if isinstance(config, DecoderExpert):
            experts[name] = Decoder(config, config.space or spec.space, _source(name, spec, graph, experts))
    steps = graph.steps({name: expert.depth for name, expert in experts.items()})
    for name, config in spec.experts.items():
        if isinstance(config, DecoderExpert) and config.bridge != "none":
            meets = [step for step in steps if any(_apart(name, graph.owner[r], graph.owner[c]) for r, c in step.edges)]
            experts[name] = Bridge(experts[name], spec.space, [step.layers[name] for step in meets], config.bridge == "linear_norm")
    keyed = [{graph.owner[row], graph.owner[col]} for (row, col), edge in graph.edges.items() if edge.via == "keys"]
    met = {name for pair in keyed if len(pair) > 1 for name in pair}
    for name, expert in experts.items():
        if name in met and expert.space != spec.space:
            raise UserError(
                f"{spec.name}: the weights of expert '{name}' live in the attention space {expert.space!r}; "
                f"set the spec's space to it, or give the expert a bridge (the space is {spec.space!r})"
            )
    return {name: experts[name] for name in spec.experts}


def _source(name: str, spec: Spec, graph: Graph, experts: Mapping[str, Expert]) -> int | None:
    """Channels of the hidden states that an expert reads.

    Raises:
        UserError: they differ.
    """
    read = {col for (row, col), edge in graph.edges.items() if edge.via == "hidden" and graph.owner[row] == name}
    widths = {}
    for col in sorted(read):
        config = spec.experts[graph.owner[col]] if col in graph.owner else spec.streams[col]
        widths[col] = experts[graph.owner[col]].width if isinstance(config, PretrainedExpert) else config.width
    if len(set(widths.values())) > 1:
        raise UserError(
            f"{spec.name}: expert '{name}' reads hidden states of different widths ({', '.join(f'{c} {w}' for c, w in widths.items())})"
        )
    return next(iter(widths.values()), None)


def _apart(name: str, reader: str, read: str) -> bool:
    """Whether an expert is one of two that read each other."""
    return reader != read and name in (reader, read)


def _batch(inputs: Inputs, noisy: Mapping[str, Noisy], cache: Cache) -> tuple[int, torch.device]:
    """Rows and device of whatever is there."""
    held = [kv.keys[0] if kv.keys else kv.hidden for kv in cache.values()]
    given = [*(n.x for n in noisy.values()), inputs.state, inputs.ids, inputs.latents, *(x for x, _ in inputs.features.values()), *held]
    first = next(t for t in given if t is not None)
    return first.shape[0], first.device


def _moved_context(kv: KV, by: Tensor | None) -> KV:
    return kv if by is None or kv.hidden is None else replace(kv, hidden=kv.hidden + by)

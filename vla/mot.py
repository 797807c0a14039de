"""The Mixture-of-Transformers loop: in every step each expert projects its own tokens, all attend once, each finishes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from .attention import attend, bias, blocks, sparse
from .experts.base import Context, Expert, Reading
from .experts.decoder import Decoder
from .experts.ready import Ready, ReadyDecoder, suits
from .graph import Edges, Graph, Own, Step
from .modules import ModuleDict
from .spec import Space


@dataclass(frozen=True)
class Tokens:
    """A stream's input to the backbone.

    Attributes:
        x: embeddings (B, T, D) in the width of the stream's expert.
        positions: rotary position ids (B, T), or (P, B, T) of P axes.
        present: (B, T) bool, or None where every token is present.
        time: flow time (B, T), where the expert is conditioned on it.
        inject: (B, T, D) each, added after the first, second, ... layer (DeepStack).
        own: positions that the stream's expert counted in its own way.
        first: positions at which the stream begins, where tokens of several samples share a row.
        picture: (B, T) bool, which tokens are of images.
    """

    x: Tensor
    positions: Tensor
    present: Tensor | None = None
    time: Tensor | None = None
    inject: tuple[Tensor, ...] = ()
    own: Own | None = None
    first: Tensor | None = None
    picture: Tensor | None = None


@dataclass(frozen=True)
class KV:
    """What later phases read of a stream: rotated keys and values, (B, G, T, H) per layer, and its final hidden states.

    Attributes:
        keys, values: one tensor per layer; a context has none.
        present: (B, T) bool, or None where every token is present.
        own, picture: positions and image tokens, as in ``Tokens``.
        hidden: (B, T, D), where a stream is read or made by them.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    present: Tensor | None = None
    own: Own | None = None
    hidden: Tensor | None = None
    picture: Tensor | None = None

    def repeated(self, copies: int) -> "KV":
        """The same with every row so often, one after the other."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.repeat_interleave(copies, dim=0)

        keys, values = (tuple(t.repeat_interleave(copies, dim=0) for t in parts) for parts in (self.keys, self.values))
        own = None
        if self.own is not None:
            own = Own(self.own.positions.repeat_interleave(copies, dim=1), self.own.reach.repeat_interleave(copies, dim=0))
        return KV(keys, values, rows(self.present), own, rows(self.hidden), rows(self.picture))


Cache = Mapping[str, KV]
Mask = Callable[[Sequence[str], Sequence[str], Edges], Tensor]
"""Rows, columns and the edges that hold -> what may be read, as ``Graph.mask``."""


@dataclass(frozen=True)
class Clock:
    """The flow time of a stream's tokens in each of several runs; those that are ``settled``, (B, T) bool, are clean, t = 1."""

    at: tuple[float, ...]
    settled: Tensor | None = None

    def time(self, run: int, tokens: Tensor) -> Tensor:
        """(B, T) of ``tokens`` (B, T, D)."""
        out = torch.full(tokens.shape[:2], self.at[run], device=tokens.device)
        return out if self.settled is None else out.masked_fill(self.settled, 1.0)


class MoT(nn.Module):
    """Experts joined by shared masked attention, in steps that say which layer of one meets which of another.

    Attributes:
        checkpointing: whether a step is computed again in the backward pass, rather than all it made being kept.
    """

    checkpointing = False

    def __init__(self, graph: Graph, experts: Mapping[str, Expert]) -> None:
        super().__init__()
        self.graph = graph
        self.experts = ModuleDict(experts)
        self.steps = graph.steps({name: expert.depth for name, expert in experts.items()})

    def forward(
        self, tokens: Mapping[str, Tokens], cache: Cache, keep: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, KV]]:
        """Run the live streams ``tokens``, which may read each other and the streams in ``cache``.

        Args:
            keep: live streams of which later phases read the keys, the values or the final hidden states.
            outputs: live streams whose final hidden states are returned; where nobody asks for any, the last step stops at its keys.

        Returns:
            final hidden states (B, T, D) of ``outputs``; KV of ``keep``.
        """
        return Pass(self, tokens, cache).run({n: t.x for n, t in tokens.items()}, keep=keep, outputs=outputs)


class Pass:
    """Live streams ready to run: who reads whom in which step, masks, rotary phases, conditions of the flow time.

    With ``clocks`` it is made for inference in many runs, in which embeddings and flow times change and nothing else: keys and values of
    what is read lie in one buffer a step, written once, with room for the live streams' own, which each run overwrites.

    Args:
        tokens: the live streams; of their embeddings only the shapes count.
        clocks: live stream -> its flow time in each run.
        mask: in place of the graph's, where tokens of several samples share a row (``packing.py``).
    """

    def __init__(
        self,
        mot: MoT,
        tokens: Mapping[str, Tokens],
        cache: Cache,
        clocks: Mapping[str, Clock] | None = None,
        mask: Mask | None = None,
    ) -> None:
        self.graph, self.experts, self.tokens, self.cache, self.mask = mot.graph, mot.experts, tokens, cache, mask
        self.owner, self.still, self.again = mot.graph.owner, clocks is not None, mot.checkpointing
        live = {e: [n for n in self.owner if n in tokens and self.owner[n] == e] for e in mot.experts}
        self.live = {e: names for e, names in live.items() if names}
        self.lengths = {e: [tokens[n].x.shape[1] for n in names] for e, names in self.live.items()}
        self.steps = [step for step in mot.steps if step.layers.keys() & self.live]
        self.past = [n for n in self.graph.names if n in cache and cache[n].keys and any((row, n) in self.graph.edges for row in tokens)]
        informed = {e for step in self.steps for e in step.informed & self.live.keys()}
        self.told = {e: self._told(e) for e in informed}
        self.inject = {e: _joined_inject([tokens[n] for n in names]) for e, names in self.live.items()}
        self.ready = {e: self._ready(e, clocks) for e in self.live}
        self.layers = [{e: step.layers[e] for e in self.live if e in step.layers} for step in self.steps]
        self._groups: dict[int, list[_Group]] = {}
        self._alike: dict[tuple[Edges, frozenset[str], frozenset[str]], int] = {}  # most steps are: the first of each kind
        self._held: dict[tuple[int, int], _Held] = {}

    def run(
        self, streams: Mapping[str, Tensor], run: int = 0, keep: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, KV]]:
        """One run over embeddings (B, T, D) of the live streams; see ``MoT.forward``."""
        wanted = {*outputs, *(n for n in keep if self.graph.informs(n, self.graph.names))}
        x = {e: _cat([streams[n] for n in names], 1) for e, names in self.live.items()}
        kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in keep}
        for number in range(len(self.steps)):
            ends = number == len(self.steps) - 1 and not wanted
            if self.again and torch.is_grad_enabled():
                x, k, v = checkpoint(self._advance, number, x, run, ends, use_reentrant=False)
            else:
                x, k, v = self._advance(number, x, run, ends)
            for name in kept:  # one entry a layer, empty where a layer has no keys of its own
                if self.owner[name] in self.layers[number]:
                    kept[name][0].append(k.get(name, x[self.owner[name]][:, :0]))
                    kept[name][1].append(v.get(name, x[self.owner[name]][:, :0]))
        hidden: dict[str, Tensor] = {}
        for e, names in self.live.items():
            if any(n in wanted for n in names):
                final = self.ready[e].final(x[e], run).split(self.lengths[e], dim=1)
                hidden |= {n: h for n, h in zip(names, final, strict=True) if n in wanted}
        facts = {n: (t.present, t.own, hidden.get(n), t.picture) for n, t in self.tokens.items() if n in kept}
        return {n: hidden[n] for n in outputs}, {n: KV(tuple(ks), tuple(vs), *facts[n]) for n, (ks, vs) in kept.items()}

    def _advance(
        self, number: int, before: Mapping[str, Tensor], run: int, ends: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """One step: hidden states (B, T, D) of the experts after it, and keys and values of the live streams in it, with which it ``ends``
        where nobody needs the hidden states."""
        step, layers, x = self.steps[number], self.layers[number], dict(before)
        q, k, v = self._project(step, layers, x, run)
        if ends:
            return x, k, v
        attended = self._attend(number, q, k, v)
        for e, layer in layers.items():
            told = self.told.get(e)
            if e in step.apart:
                heard = self._nothing(e, x[e]) if told is None else self.ready[e].hear(layer, x[e], told, run)
            else:
                heard = _cat([attended[n] for n in self.live[e]], 1)
            x[e] = self.ready[e].finish(layer, x[e], heard, run, told)
            if layer < len(self.inject[e]):
                x[e] = x[e] + self.inject[e][layer]
        return x, k, v

    def _project(
        self, step: Step, layers: Mapping[str, int], x: Mapping[str, Tensor], run: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Queries, keys and values of the live streams; a layer that is crossed has queries alone, one apart nothing."""
        q: dict[str, Tensor] = {}
        k: dict[str, Tensor] = {}
        v: dict[str, Tensor] = {}
        for e, layer in layers.items():
            if e in step.apart:
                continue
            made = (self.ready[e].ask(layer, x[e], run),) if e in step.crossed else self.ready[e].project(layer, x[e], run)
            for held, whole in zip((q, k, v), made, strict=False):
                parts = (whole,) if len(self.live[e]) == 1 else whole.split(self.lengths[e], dim=2)
                held.update(zip(self.live[e], parts, strict=True))
        return q, k, v

    def _attend(self, number: int, q: Mapping[str, Tensor], k: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each live stream reads in a step, (B, T, N*H)."""
        attended: dict[str, Tensor] = {}
        if number not in self._groups:
            step = self.steps[number]
            first = self._alike.setdefault((step.edges, step.crossed | step.apart, frozenset(self.layers[number])), number)
            self._groups[number] = self._groups.get(first) or self._grouped(list(q), self._readable(step, list(k)), step)
        for place, group in enumerate(self._groups[number]):
            asked = _cat([q[r] for r in group.rows], 2)
            if group.cols:
                out = attend(asked, *self._columns(number, place, group, k, v), group.mask)
            else:  # a layer without keys of its own, and nobody to read
                out = torch.zeros_like(asked).transpose(1, 2).flatten(2)
            rows = [q[r].shape[2] for r in group.rows]
            attended |= zip(group.rows, (out,) if len(rows) == 1 else out.split(rows, dim=1), strict=True)
        return attended

    def _nothing(self, expert: str, x: Tensor) -> Tensor:
        """What tokens (B, T, D) that read nothing attend to, (B, T, N*H)."""
        space = self.experts[expert].space
        return x.new_zeros(*x.shape[:2], space.heads * space.head_dim)

    def _columns(self, number: int, place: int, group: "_Group", k: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T, H) that a group reads, in order."""
        own = [c for c in group.cols if c in self.tokens]
        if not self.still or torch.is_grad_enabled() or (group.adapter is not None and own):
            return self._joined(number, group, k, v)
        if (number, place) not in self._held:  # the first run makes the buffers
            self._held[number, place] = _Held.of(*self._joined(number, group, k, v), group.cols, own, k)
        held = self._held[number, place]
        for name, (keys, values) in held.own.items():
            keys.copy_(k[name])
            values.copy_(v[name])
        return held.keys, held.values

    def _joined(self, number: int, group: "_Group", k: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        layers = self.steps[number].layers
        keys = [k[c] if c in k else self.cache[c].keys[layers[self.owner[c]]] for c in group.cols]
        values = [v[c] if c in v else self.cache[c].values[layers[self.owner[c]]] for c in group.cols]
        whole = [
            torch.cat([t.detach() if c in group.detached and not self.still else t for c, t in zip(group.cols, parts, strict=True)], dim=2)
            for parts in (keys, values)
        ]
        if group.adapter is not None:
            return self.experts[group.adapter].adapt(layers[group.adapter], *whole)
        return whole[0], whole[1]

    def _readable(self, step: Step, live: list[str]) -> list[str]:
        """Streams with keys in a step: those kept from before, then the live ones."""
        there = step.layers.keys() - step.crossed - step.apart
        return [n for n in self.past if self.owner[n] in there] + live

    def _grouped(self, rows: list[str], cols: list[str], step: Step) -> list["_Group"]:
        """Live rows grouped by who projects the keys anew for them and by the columns that are detached, each group with its mask.

        Without gradients rows that read other columns are apart, too: whoever reads all there is of its columns then needs no mask.
        """
        present = {n: self.tokens[n].present if n in self.tokens else self.cache[n].present for n in cols}
        groups: dict[tuple[str | None, Space, bool | frozenset[str], frozenset[str]], list[str]] = {}
        train = torch.is_grad_enabled()
        for row in rows:
            seen = [c for c in cols if (row, c) in step.edges or row == c]
            detached = frozenset(c for c in seen if (row, c) in step.edges and self.graph.edges[row, c].detach)
            adapter = self.owner[row] if self.owner[row] in step.crossed else None
            expert = self.owner[row]  # where experts do not meet they may have spaces of their own
            space = self.experts[expert].space_of(step.layers[expert])
            groups.setdefault((adapter, space, bool(seen) if train else frozenset(seen), detached), []).append(row)
        out = []
        for (adapter, _, _, detached), members in groups.items():
            x = self.tokens[members[0]].x
            read = [c for c in cols if any((r, c) in step.edges or r == c for r in members)]
            if not read:
                mask = None
            elif self.mask is not None:
                mask = self.mask(members, read, step.edges)
            else:
                mask = self.graph.mask(members, read, present, x.device, step.edges)
            out.append(_Group(members, read, adapter, detached, None if mask is None else self._quick(mask, x)))
        return out

    def _quick(self, mask: Tensor, x: Tensor) -> Tensor | BlockMask:
        """A mask as it is fastest to apply."""
        if self.still:
            return bias(mask, x.dtype)
        return blocks(mask) if sparse(mask) else mask

    def _ready(self, expert: str, clocks: Mapping[str, Clock] | None) -> Ready:
        """An expert with what it needs of positions and flow times."""
        streams, module = [self.tokens[n] for n in self.live[expert]], self.experts[expert]
        x = torch.cat([s.x for s in streams], dim=1)
        phase = module.phase(x, _joined_positions(streams))
        crossing = any(expert in step.crossed for step in self.steps)
        alone = module.phase(x, _joined_positions([_from_zero(s) for s in streams])) if crossing else phase
        if clocks is None:
            return Ready(module, phase, alone, [module.condition(_joined_time(streams))])
        told = [clocks[n] for n in self.live[expert]]
        if len({c.at for c in told}) == 1 and suits(module):
            settled = _joined_settled(told, streams)
            at = told[0].at if settled is None else (*told[0].at, 1.0)
            times = torch.stack([torch.full((), t, device=x.device) for t in at])
            return ReadyDecoder(cast(Decoder, module), phase, alone, times, settled)
        runs = range(len(told[0].at))
        each = [torch.cat([c.time(run, s.x) for c, s in zip(told, streams, strict=True)], dim=1) for run in runs]
        return Ready(module, phase, alone, [module.condition(time) for time in each])

    def _told(self, expert: str) -> Context | None:
        """The hidden states that an expert's live tokens read, with who reads which; None where they read none."""
        rows, edges = self.live[expert], self.graph.edges
        cols = [c for c in self.graph.names if any((r, c) in edges and edges[r, c].via == "hidden" for r in rows)]
        hidden = []
        for col in cols:
            states = self.cache[col].hidden
            assert states is not None, f"the hidden states of {col} are not there"
            hidden.append(states.detach() if any((r, col) in edges and edges[r, col].detach for r in rows) else states)
        if not cols:
            return None
        module, present = self.experts[expert], [self.cache[c].present for c in cols]
        context = module.inform(torch.cat(hidden, dim=1))
        turns = module.config.cross.turns if isinstance(module, Decoder) and module.config.cross is not None else ("all",)
        if all((r, c) in edges for r in rows for c in cols) and all(p is None for p in present) and turns == ("all",):
            return context
        device = hidden[0].device
        sizes = list(zip(rows, self.lengths[expert], strict=True)), [(c, h.shape[1]) for c, h in zip(cols, hidden, strict=True)]
        allowed = [[torch.full((i, j), (r, c) in edges, device=device) for c, j in sizes[1]] for r, i in sizes[0]]
        read = torch.cat([torch.cat(row, dim=1) for row in allowed])
        there = [torch.ones_like(h[..., 0], dtype=torch.bool) if p is None else p for h, p in zip(hidden, present, strict=True)]
        mask = read & torch.cat(there, dim=1)[:, None]
        pictures = [self.cache[c].picture for c in cols]
        shown = [torch.zeros_like(t) if p is None else p for p, t in zip(pictures, there, strict=True)]
        of = {"all": mask, "images": mask & (picture := torch.cat(shown, dim=1)[:, None]), "words": mask & ~picture}
        readings = {turn: self._reading(of[turn], hidden[0]) for turn in set(turns)}
        return replace(context, turns=tuple(readings[turn] for turn in turns))

    def _reading(self, mask: Tensor, hidden: Tensor) -> Reading:
        """A mask (B, T, S) as cross layers apply it to what they read of ``hidden`` states."""
        return Reading(bias(mask[:, None], hidden.dtype) if self.still else mask[:, None], ~mask.any(-1, keepdim=True))


@dataclass(frozen=True)
class _Group:
    """Rows that attend together.

    Attributes:
        cols: what they read; detached: those of it through which no gradient goes.
        adapter: the expert that projects the keys anew.
        mask: as ``attend`` takes it; None where all may be read.
    """

    rows: list[str]
    cols: list[str]
    adapter: str | None
    detached: frozenset[str]
    mask: Tensor | BlockMask | None


@dataclass(frozen=True)
class _Held:
    """Keys and values that stay where they are, and the places in them of the live streams."""

    keys: Tensor
    values: Tensor
    own: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, cols: list[str], own: list[str], live: Mapping[str, Tensor]) -> "_Held":
        """Buffers out of what was joined of ``cols``, of which ``own`` are live and stand last."""
        places, end = {}, keys.shape[2]
        for name in reversed(own):
            start = end - live[name].shape[2]
            places[name] = keys[:, :, start:end], values[:, :, start:end]
            end = start
        return cls(keys, values, places)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts joined; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _joined_time(streams: list[Tokens]) -> Tensor | None:
    """Flow time of an expert's live tokens; tokens without one are clean data, t = 1."""
    if all(s.time is None for s in streams):
        return None
    return torch.cat([s.time if s.time is not None else torch.ones(s.x.shape[:2], device=s.x.device) for s in streams], dim=1)


def _joined_settled(clocks: Sequence[Clock], streams: list[Tokens]) -> Tensor | None:
    """Which of an expert's live tokens (B, T, 1) are settled; None where none is."""
    if all(c.settled is None for c in clocks):
        return None
    each = [
        torch.zeros_like(s.x[..., 0], dtype=torch.bool) if c.settled is None else c.settled for c, s in zip(clocks, streams, strict=True)
    ]
    return torch.cat(each, dim=1)[..., None]


def _joined_positions(streams: list[Tokens]) -> Tensor:
    """Positions of an expert's live tokens; a stream of one axis stands at one place of all axes."""
    axes = max((s.positions.shape[0] for s in streams if s.positions.ndim == 3), default=0)
    return torch.cat([s.positions.expand(axes, -1, -1) if axes and s.positions.ndim == 2 else s.positions for s in streams], dim=-1)


def _from_zero(stream: Tokens) -> Tokens:
    """The stream with positions that count from its own start."""
    return replace(stream, positions=stream.positions - (stream.positions[..., :1] if stream.first is None else stream.first))


def _joined_inject(streams: list[Tokens]) -> list[Tensor]:
    """What is added to an expert's live tokens, layer by layer."""
    layers = max(len(s.inject) for s in streams)
    return [torch.cat([s.inject[i] if i < len(s.inject) else torch.zeros_like(s.x) for s in streams], dim=1) for i in range(layers)]

"""The Mixture-of-Transformers loop: in every step each expert projects its own tokens, all attend once, each finishes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .attention import attend
from .experts.base import Context, Expert
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
    """

    x: Tensor
    positions: Tensor
    present: Tensor | None = None
    time: Tensor | None = None
    inject: tuple[Tensor, ...] = ()
    own: Own | None = None


@dataclass(frozen=True)
class KV:
    """What later phases read of a stream: rotated keys and values, (B, G, T, H) per layer, and its final hidden states.

    Attributes:
        keys, values: one tensor per layer; a context has none.
        present: (B, T) bool, or None where every token is present.
        own: positions, as in ``Tokens``.
        hidden: (B, T, D), where a stream is read or made by them.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    present: Tensor | None = None
    own: Own | None = None
    hidden: Tensor | None = None


Cache = Mapping[str, KV]


class MoT(nn.Module):
    """Experts joined by shared masked attention, in steps that say which layer of one meets which of another."""

    def __init__(self, graph: Graph, experts: Mapping[str, Expert]) -> None:
        super().__init__()
        self.graph = graph
        self.experts = ModuleDict(experts)
        self.steps = graph.steps({name: expert.depth for name, expert in experts.items()})
        self.owner = graph.owner

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
        owners = self._owners(tokens)
        past = [n for n in self.graph.names if n in cache and cache[n].keys and any((row, n) in self.graph.edges for row in tokens)]
        steps = [step for step in self.steps if step.layers.keys() & owners]
        reads: dict[tuple[Edges, tuple[str, ...]], list[_Read]] = {}  # most steps are alike
        wanted = {*outputs, *(n for n in keep if self.graph.informs(n, self.graph.names))}

        x = {e: torch.cat([tokens[n].x for n in names], dim=1) for e, names in owners.items()}
        phase = {e: self.experts[e].phase(x[e], _joined_positions([tokens[n] for n in names])) for e, names in owners.items()}
        crossing = {e for step in steps for e in step.crossed & owners.keys()}
        alone = {e: self.experts[e].phase(x[e], _joined_positions([_from_zero(tokens[n]) for n in owners[e]])) for e in crossing}
        told = {e: self._told(e, owners[e], tokens, cache) for step in steps for e in step.informed & owners.keys()}
        inject = {e: _joined_inject([tokens[n] for n in names]) for e, names in owners.items()}
        condition = {e: self.experts[e].condition(_joined_time([tokens[n] for n in names])) for e, names in owners.items()}
        kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in keep}

        for step in steps:
            layers = {e: step.layers[e] for e in owners if e in step.layers}
            q: dict[str, Tensor] = {}
            k: dict[str, Tensor] = {}
            v: dict[str, Tensor] = {}
            for e, layer in layers.items():
                lengths = [tokens[n].x.shape[1] for n in owners[e]]
                if e in step.apart:
                    continue
                if e in step.crossed:  # no keys of its own
                    made: tuple[Tensor, ...] = (self.experts[e].ask(layer, x[e], alone[e], condition[e]),)
                else:
                    made = self.experts[e].project(layer, x[e], phase[e], condition[e])
                for held, whole in zip((q, k, v), made, strict=False):
                    held.update(zip(owners[e], whole.split(lengths, dim=2), strict=True))
            ready = {n: step.layers[self.owner[n]] for n in past if self.owner[n] in step.layers.keys() - step.crossed - step.apart}
            keys = {n: cache[n].keys[layer] for n, layer in ready.items()} | k
            values = {n: cache[n].values[layer] for n, layer in ready.items()} | v
            for name in kept:  # one entry a layer, empty where a layer has no keys of its own
                if self.owner[name] in layers:
                    kept[name][0].append(keys.get(name, x[self.owner[name]][:, :0]))
                    kept[name][1].append(values.get(name, x[self.owner[name]][:, :0]))
            if step is steps[-1] and not wanted:
                break
            alike = (step.edges, tuple(q))
            if q and alike not in reads:
                reads[alike] = self._reads(list(q), list(keys), tokens, cache, step)
            attended = self._attend(q, keys, values, reads[alike], layers) if q else {}
            for e, layer in layers.items():
                expert = self.experts[e]
                if e in step.apart:
                    whole = expert.hear(layer, x[e], told[e], condition[e])
                else:
                    whole = torch.cat([attended[n] for n in owners[e]], dim=1)
                x[e] = expert.finish(layer, x[e], whole, condition[e], told.get(e))
                if layer < len(inject[e]):
                    x[e] = x[e] + inject[e][layer]

        hidden: dict[str, Tensor] = {}
        for e, names in owners.items():
            if any(n in wanted for n in names):
                final = self.experts[e].final(x[e], condition[e]).split([tokens[n].x.shape[1] for n in names], dim=1)
                hidden |= {n: h for n, h in zip(names, final, strict=True) if n in wanted}
        made_of = {n: KV(tuple(ks), tuple(vs), tokens[n].present, tokens[n].own, hidden.get(n)) for n, (ks, vs) in kept.items()}
        return {n: hidden[n] for n in outputs}, made_of

    def _told(self, expert: str, rows: Sequence[str], tokens: Mapping[str, Tokens], cache: Cache) -> Context:
        """The hidden states that an expert's live tokens read, with who reads which."""
        edges = self.graph.edges
        cols = [c for c in self.graph.names if any((r, c) in edges and edges[r, c].via == "hidden" for r in rows)]
        hidden = []
        for col in cols:
            states = cache[col].hidden
            assert states is not None, f"the hidden states of {col} are not there"
            hidden.append(states.detach() if any((r, col) in edges and edges[r, col].detach for r in rows) else states)
        whole, present = torch.cat(hidden, dim=1), [cache[c].present for c in cols]
        if all((r, c) in edges for r in rows for c in cols) and all(p is None for p in present):
            return self.experts[expert].inform(whole, None)
        read = torch.tensor([[(r, c) in edges for c in cols] for r in rows], device=whole.device)
        read = read.repeat_interleave(torch.tensor([tokens[r].x.shape[1] for r in rows], device=whole.device), dim=0)
        read = read.repeat_interleave(torch.tensor([h.shape[1] for h in hidden], device=whole.device), dim=1)
        there = [torch.ones_like(h[..., 0], dtype=torch.bool) if p is None else p for h, p in zip(hidden, present, strict=True)]
        return self.experts[expert].inform(whole, (read & torch.cat(there, dim=1)[:, None])[:, None])

    def _owners(self, tokens: Mapping[str, Tokens]) -> dict[str, list[str]]:
        """Expert -> its live streams, both in the spec's order."""
        owners = {e: [n for n in self.owner if n in tokens and self.owner[n] == e] for e in self.experts}
        return {e: names for e, names in owners.items() if names}

    def _reads(self, live: list[str], read: list[str], tokens: Mapping[str, Tokens], cache: Cache, step: Step) -> list["_Read"]:
        """Live rows grouped by who projects the keys anew for them and by the columns that are detached, each group with its mask."""
        present = {n: tokens[n].present if n in tokens else cache[n].present for n in read}
        device = tokens[live[0]].x.device
        groups: dict[tuple[str | None, Space, bool, frozenset[str]], list[str]] = {}
        for row in live:
            seen = [c for c in read if (row, c) in step.edges or row == c]
            detached = frozenset(c for c in seen if (row, c) in step.edges and self.graph.edges[row, c].detach)
            adapter = self.owner[row] if self.owner[row] in step.crossed else None
            space = self.experts[self.owner[row]].space  # experts that never meet may have spaces of their own
            groups.setdefault((adapter, space, bool(seen), detached), []).append(row)
        out = []
        for (adapter, _, _, detached), rows in groups.items():
            cols = [c for c in read if any((r, c) in step.edges or r == c for r in rows)]
            mask = self.graph.mask(rows, cols, present, device, step.edges) if cols else None
            out.append(_Read(rows, cols, adapter, detached, mask))
        return out

    def _attend(
        self,
        q: Mapping[str, Tensor],
        k: Mapping[str, Tensor],
        v: Mapping[str, Tensor],
        reads: list["_Read"],
        layers: Mapping[str, int],
    ) -> dict[str, Tensor]:
        attended: dict[str, Tensor] = {}
        for read in reads:
            asked = torch.cat([q[r] for r in read.rows], dim=2)
            if read.cols:
                keys = torch.cat([k[c].detach() if c in read.detached else k[c] for c in read.cols], dim=2)
                values = torch.cat([v[c].detach() if c in read.detached else v[c] for c in read.cols], dim=2)
                if read.adapter is not None:
                    keys, values = self.experts[read.adapter].adapt(layers[read.adapter], keys, values)
                out = attend(asked, keys, values, read.mask)
            else:  # a layer without keys of its own, and nobody to read
                out = torch.zeros_like(asked).transpose(1, 2).flatten(2)
            attended |= dict(zip(read.rows, out.split([q[r].shape[2] for r in read.rows], dim=1), strict=True))
        return attended


@dataclass(frozen=True)
class _Read:
    rows: list[str]
    cols: list[str]
    adapter: str | None
    detached: frozenset[str]
    mask: Tensor | None


def _joined_time(streams: list[Tokens]) -> Tensor | None:
    """Flow time of an expert's live tokens; tokens without one are clean data, t = 1."""
    if all(s.time is None for s in streams):
        return None
    return torch.cat([s.time if s.time is not None else torch.ones(s.x.shape[:2], device=s.x.device) for s in streams], dim=1)


def _joined_positions(streams: list[Tokens]) -> Tensor:
    """Positions of an expert's live tokens; a stream of one axis stands at one place of all axes."""
    axes = max((s.positions.shape[0] for s in streams if s.positions.ndim == 3), default=0)
    return torch.cat([s.positions.expand(axes, -1, -1) if axes and s.positions.ndim == 2 else s.positions for s in streams], dim=-1)


def _from_zero(stream: Tokens) -> Tokens:
    """The stream with positions that count from its own start."""
    return replace(stream, positions=stream.positions - stream.positions[..., :1])


def _joined_inject(streams: list[Tokens]) -> list[Tensor]:
    """What is added to an expert's live tokens, layer by layer."""
    layers = max(len(s.inject) for s in streams)
    return [torch.cat([s.inject[i] if i < len(s.inject) else torch.zeros_like(s.x) for s in streams], dim=1) for i in range(layers)]

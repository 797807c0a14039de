"""Samples laid end to end in one row, so that padding and absent cameras cost nothing: for long training batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .graph import Edges, Graph
from .mot import KV, Cache, MoT, Pass, Tokens


def pack(mot: MoT, tokens: Mapping[str, Tokens], cache: Cache, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Final hidden states (B, T, D) of ``outputs`` as ``MoT.forward`` gives them, from samples laid end to end; zero where nothing is.

    Raises:
        UserError: streams of the spec read final hidden states.
    """
    parts: dict[str, Tokens | KV] = {n: cache[n] for n in cache} | dict(tokens)
    batch, device = next((t.x.shape[0], t.x.device) for t in tokens.values())
    packing = Packing.of(mot.graph, {n: part.present for n, part in parts.items()}, batch, device)
    live = {n: _tokens(n, t, packing) for n, t in tokens.items()}
    kept = {n: _kv(n, kv, packing) for n, kv in cache.items()}
    hidden, _ = Pass(mot, live, kept, mask=packing.mask).run({n: t.x for n, t in live.items()}, outputs=outputs)
    return {n: packing.unpack(n, h) for n, h in hidden.items()}


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each stream come from: ``places``, stream -> (N,), present tokens of a padded (B, T), counted row by row.

    A token reads those of its own sample alone, and of these what the graph says.
    """

    graph: Graph
    places: Mapping[str, Tensor]
    batch: int

    @classmethod
    def of(cls, graph: Graph, present: Mapping[str, Tensor | None], batch: int, device: torch.device) -> "Packing":
        """The packing of a batch; the host learns how many tokens are there.

        Args:
            present: stream -> (B, T), or None where all are.

        Raises:
            UserError: streams of the spec read final hidden states.
        """
        if len(graph.stages) > 1 or graph.contexts:
            raise UserError(f"{graph.spec.name} has streams that read final hidden states, which is not packed; train it without packing")
        counted = {n: torch.arange(batch * graph.spec.streams[n].length, device=device) for n in present}
        return cls(graph, {n: all_of if (p := present[n]) is None else all_of[p.flatten()] for n, all_of in counted.items()}, batch)

    def pack(self, name: str, x: Tensor, dim: int = 0) -> Tensor:
        """``x`` with batch and tokens at ``dim`` and ``dim + 1``, (.., B, T, ..) -> (.., 1, N, ..)."""
        return x.flatten(dim, dim + 1).index_select(dim, self.places[name]).unsqueeze(dim)

    def unpack(self, name: str, x: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D), zero where nothing was."""
        out = x.new_zeros(self.batch * self.graph.spec.streams[name].length, x.shape[-1])
        return out.index_copy(0, self.places[name], x[0]).unflatten(0, (self.batch, -1))

    def mask(self, rows: Sequence[str], cols: Sequence[str], edges: Edges) -> Tensor:
        """As ``Graph.mask`` for packed streams: (1, 1, N_rows, N_cols), True where a token may read. One that could read nothing reads
        itself."""
        (asking, at, token), (asked, of, other) = (self._tokens(names) for names in (rows, cols))
        allowed = asking[:, None] == asked
        whole = self.graph.mask(rows, cols, {}, asking.device, edges)
        if whole is not None:
            allowed = allowed & whole[0, 0][at[:, None], of]
        return (allowed | ((token[:, None] == other) & ~allowed.any(-1, keepdim=True)))[None, None]

    def _tokens(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token of some streams: its sample, its place among the unpacked tokens of one sample, and a number of its own."""
        samples, places, numbers, start = [], [], [], 0
        begin = {n: i for i, n in enumerate(self.graph.names)}
        for name in names:
            found, length = self.places[name], self.graph.spec.streams[name].length
            samples.append(found // length)
            places.append(found % length + start)
            numbers.append(found * len(begin) + begin[name])
            start += length
        return torch.cat(samples), torch.cat(places), torch.cat(numbers)


def _tokens(name: str, stream: Tokens, packing: Packing) -> Tokens:
    """A stream's tokens of all samples in one row; their positions stay what they were."""
    first = stream.positions[..., :1].expand_as(stream.positions)
    positions, first = (packing.pack(name, ids, ids.ndim - 2) for ids in (stream.positions, first))
    time = None if stream.time is None else packing.pack(name, stream.time)
    return Tokens(packing.pack(name, stream.x), positions, None, time, tuple(packing.pack(name, x) for x in stream.inject), first=first)


def _kv(name: str, kv: KV, packing: Packing) -> KV:
    """Keys and values of all samples in one row."""
    keys, values = ([packing.pack(name, x.transpose(1, 2)).transpose(1, 2) for x in part] for part in (kv.keys, kv.values))
    return KV(tuple(keys), tuple(values))

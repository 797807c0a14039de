"""Everything that follows from who reads whom: order, phases, cache plan, mask, positions, gradient routes."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .spec import DecoderExpert, LatentHead, Phase, PhaseKind, Spec, WordHead


@dataclass(frozen=True)
class Own:
    """Positions (P, B, T) of P axes that an expert counts in its own way, from 0, and how far they reach: (B, 1), the position that
    comes next."""

    positions: Tensor
    reach: Tensor


BLOCKS = ("block_causal", "own_block", "earlier_block")
"""Relations between blocks of tokens."""

Edges = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """One step of the backbone.

    Attributes:
        layers: expert -> which of its layers runs; those not named rest.
        edges: (row, col) of the streams that read each other's keys in it.
        crossed: experts whose layer has no keys of its own and projects those of others anew.
        informed: experts whose layer reads final hidden states; of these ``apart`` do so in place of attention to keys.
    """

    layers: Mapping[str, int]
    edges: Edges
    crossed: frozenset[str] = frozenset()
    informed: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()


class Graph:
    """The attention graph of a spec.

    Attributes:
        names: stream names in the spec's order, which is the order of tokens in a joint forward.
        phases: name -> Phase in execution order, validated against the edges.

    Raises:
        UserError: a frozen expert reads a trained one, a phase reads what a later phase makes, a relation needs a block.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.names = tuple(spec.streams)
        self.contexts = tuple(n for n in self.names if spec.streams[n].expert is None)
        self.owner = {n: e for n in self.names if (e := spec.streams[n].expert) is not None}
        self.edges = {(row, col): edge for row in self.names for col in self.names if (edge := spec.edge(row, col))}
        self.interleaved = {piece.stream for piece, _ in spec.pieces}
        self._check_edges()
        self.stages = self._stages()
        self.phases = dict(spec.schedule) if spec.schedule else self._derive_phases()
        self._check_phases(self.phases, "the schedule")
        for name, mode in spec.modes.items():
            self._check_phases(mode, f"mode '{name}'")

    def reads(self, row: str) -> tuple[str, ...]:
        """Streams that ``row`` reads, in token order; contexts, which are always there, left out."""
        return tuple(col for col in self.names if (row, col) in self.edges and col in self.owner)

    def informs(self, col: str, rows: Sequence[str]) -> bool:
        """Whether one of ``rows`` needs the final hidden states of ``col``."""
        return any(col in self._sources(row) for row in rows)

    def schedule(self, mode: str | None = None) -> Mapping[str, Phase]:
        """The phases of a mode, by default those of the schedule.

        Raises:
            UserError: the spec has no such mode.
        """
        if mode is None:
            return self.phases
        if mode not in self.spec.modes:
            raise UserError(f"{self.spec.name} has no mode '{mode}' (it has {', '.join(self.spec.modes) or 'none'})")
        return self.spec.modes[mode]

    def cached(self, mode: str | None = None) -> dict[str, tuple[str, ...]]:
        """The cache plan: phase -> streams whose keys and values (or hidden states) it must keep for a later phase.

        A stream that no later phase reads is never kept; one that is kept is computed once per observation.
        """
        phases = self.schedule(mode)
        order = list(phases.values())
        plan = {}
        for i, (name, phase) in enumerate(phases.items()):
            readers = [row for later in order[i + 1 :] for row in later.streams]
            plan[name] = tuple(s for s in phase.streams if self.informs(s, readers) or any((row, s) in self.edges for row in readers))
        return plan

    def steps(self, depths: Mapping[str, int]) -> list[Step]:
        """What runs in each step of the backbone, and who reads whom there, for experts of the given depths.

        Raises:
            UserError: depths differ and nothing says how they meet, or an expert meets others where none of its layers runs.
        """
        couple = self.spec.couple
        keyed = [(self.owner[row], self.owner[col]) for (row, col), edge in self.edges.items() if edge.via == "keys"]
        met = {name for pair in keyed if pair[0] != pair[1] for name in pair}
        loose = [name for name in depths if name not in couple and name in met]
        if len({depths[name] for name in loose}) > 1:
            raise UserError(
                f"{self.spec.name}: the experts' depths differ ({', '.join(f'{n} {depths[n]}' for n in loose)}), so their layers do not "
                "meet one to one; say in couple where they stand (first, every, joint)"
            )
        where: dict[str, Sequence[int]] = {n: c.steps or range(c.first, c.first + c.every * depths[n], c.every) for n, c in couple.items()}
        for name, steps in where.items():
            if len(steps) != depths[name]:
                raise UserError(f"{self.spec.name}: couple.{name}.steps names {len(steps)} steps, the expert has {depths[name]} layers")
        where |= {name: range(depths[name]) for name in depths if name not in couple}
        for name, c in couple.items():
            if c.joint is not None and not set(range(*c.joint)) & set(where[name]):
                raise UserError(
                    f"{self.spec.name}: couple.{name}.joint says steps {c.joint[0]} to {c.joint[1] - 1}, where none of its layers runs "
                    f"(they run in {where[name][0]} to {where[name][-1]})"
                )
        last = max(steps[-1] for steps in where.values())
        return [self._step(number, {n: steps.index(number) for n, steps in where.items() if number in steps}) for number in range(last + 1)]

    def mask(
        self,
        rows: Sequence[str],
        cols: Sequence[str],
        present: dict[str, Tensor | None],
        device: torch.device | None = None,
        edges: Edges | None = None,
    ) -> Tensor | None:
        """Boolean attention mask, True where the row token may read the column token.

        Args:
            rows, cols: streams of the queries and of the keys, in order.
            present: stream -> (B, T) presence of its tokens, or None where all are present.
            edges: those that hold, by default all of the spec.

        Returns:
            (B or 1, 1, T_rows, T_cols), or None when every row token reads every column token. A row that could read
            nothing at all (an absent token of its own stream, a first block) reads itself, so that softmax stays finite.
        """
        held = {pair for pair, edge in self.edges.items() if edge.via == "keys"} if edges is None else edges
        simple = all((r, c) in held and self.edges[r, c].relation == "full" for r in rows for c in cols)
        if simple and all(present.get(c) is None for c in cols):
            return None
        blocks = [torch.cat([self._block(row, col, (row, col) in held, device) for col in cols], dim=1) for row in rows]
        allowed = torch.cat(blocks, dim=0)[None]
        own = torch.cat([torch.cat([self._own(r, c, device) for c in cols], dim=1) for r in rows], dim=0)[None]
        if any(present.get(c) is not None for c in cols):
            batch = next(p.shape[0] for c in cols if (p := present.get(c)) is not None)
            columns = [self._presence(c, present.get(c), batch, device) for c in cols]
            allowed = allowed & torch.cat(columns, dim=1)[:, None, :]
        return (allowed | (own & ~allowed.any(-1, keepdim=True)))[:, None]

    def positions(
        self,
        present: dict[str, Tensor | None],
        batch: int,
        device: torch.device | None = None,
        own: Mapping[str, Own] | None = None,
    ) -> dict[str, Tensor]:
        """Rotary position ids (B, T) of every stream, (3, B, T) where it has a grid or counts its own: a pure function of the spec and
        of what is present.

        ``continue`` streams count on after the last present token of all earlier streams; absent tokens do not count.

        Args:
            own: streams whose expert counts in its own way.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.owner}
        offset = torch.zeros(batch, 1, dtype=torch.long, device=device)
        starts = {name: offset + stream.start for name, stream in self.spec.streams.items()}
        for name, tokens in self._pieces():
            stream = self.spec.streams[name]
            here = self._presence(name, present.get(name), batch, device)[:, tokens].long()
            if own and name in own:
                local, reach = own[name].positions, own[name].reach
            elif stream.grid is not None:
                local, reach = _grid(stream.grid, batch, device), torch.full_like(offset, max(stream.grid))
            elif stream.ids == "one":
                local, reach = torch.zeros_like(here), here.amax(1, keepdim=True)
            else:
                local, reach = (here.cumsum(1) - 1).clamp(min=0), here.sum(1, keepdim=True)
            if stream.positions == "restart":
                shift = torch.stack([starts[name], offset * 0, offset * 0]) if stream.grid is not None else starts[name]
                parts[name].append(local + shift)
                starts[name] = starts[name] + reach
            else:
                parts[name].append(local + offset)
                offset = offset + reach if stream.advances else offset
        return {name: torch.cat(part, dim=-1) for name, part in parts.items()}

    def reaches(self, steps: Sequence[Step], gradient: bool = False) -> Tensor:
        """Token-level closure over the steps of the backbone: entry (i, j) is True where token i depends on token j.

        With ``gradient`` detached edges carry nothing, so the closure says where a gradient can flow.
        """
        eye = torch.eye(sum(self.spec.streams[n].length for n in self.names), dtype=torch.bool)
        allowed, final = {}, eye
        for edges, informed in dict.fromkeys((step.edges, step.informed) for step in steps):
            open_edges = frozenset(e for e in edges if not (gradient and self.edges[e].detach))
            mask = self.mask(self.names, self.names, {}, edges=open_edges)
            heard = [(r, c) for (r, c), e in self.edges.items() if e.via == "hidden" and self.owner[r] in informed]
            told = self._pairs([(r, c) for r, c in heard if not (gradient and self.edges[r, c].detach)])
            allowed[edges, informed] = eye | (torch.ones_like(eye) if mask is None else mask[0, 0]), told
        for _ in self.stages:  # hidden states of earlier stages are right by then
            closure = eye | (self._pairs([(n, of) for n, of in self._made_of_hidden().items()], own=True).float() @ final.float() > 0)
            for step in steps:
                read, told = allowed[step.edges, step.informed]
                closure = (read.float() @ closure.float() + told.float() @ final.float()) > 0
            final = closure
        return final

    def matrix(self) -> list[list[str]]:
        """The explicit stream matrix: relation by which row reads column, '-' for nothing, '*' marks a detached edge."""
        return [[self._symbol(row, col) for col in self.names] for row in self.names]

    def table(self) -> dict[str, dict[str, str]]:
        """``matrix`` by name: row -> column -> relation."""
        return {row: dict(zip(self.names, cells, strict=True)) for row, cells in zip(self.names, self.matrix(), strict=True)}

    def hash(self) -> str:
        """12 hex digits over streams, lengths, relations and phases; part of every checkpoint."""
        facts = {
            "streams": {n: self.spec.streams[n].model_dump(mode="json") for n in self.names},
            "matrix": self.matrix(),
            "phases": {n: p.model_dump(mode="json") for n, p in self.phases.items()},
        }
        rest = self.spec.model_dump(mode="json", include={"couple", "sequence", "modes"})
        facts |= {key: value for key, value in rest.items() if value}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    # steps ----------------------------------------------------------------------------------------------------------

    def _step(self, number: int, layers: dict[str, int]) -> Step:
        """The step in which ``layers`` run: streams of one expert read each other, those of several where all of them meet."""
        couple = self.spec.couple
        meets = {n for n in layers if n not in couple or (j := couple[n].joint) is None or j[0] <= number < j[1]}
        cross = {n: e.cross for n, layer in layers.items() if isinstance(e := self.spec.experts[n], DecoderExpert) and e.crosses(layer)}
        crossed = frozenset(n for n, c in cross.items() if c is not None and c.reads == "keys")
        informed = frozenset(cross) - crossed
        apart = frozenset(n for n in informed if (c := cross[n]) is not None and c.place == "instead")

        def holds(row: str, col: str) -> bool:
            one, other = self.owner[row], self.owner[col]
            return (
                other not in crossed | apart and one not in apart and (one in layers if one == other else one in meets and other in meets)
            )

        keyed = [pair for pair, edge in self.edges.items() if edge.via == "keys"]
        return Step(layers, frozenset(pair for pair in keyed if holds(*pair)), crossed, informed, apart)

    def _stages(self) -> list[tuple[str, ...]]:
        """Streams in the order in which one joint forward runs them: who needs final hidden states comes after those who have them."""
        stage = dict.fromkeys(self.owner, 0)
        for _ in range(len(stage) + 1):
            before = dict(stage)
            for row in stage:
                hidden = [stage[s] + 1 for s in self._sources(row) if s in stage]
                stage[row] = max([stage[row], *hidden, *(stage[c] for c in self.reads(row) if self.edges[row, c].via == "keys")])
            if stage == before:
                return [tuple(n for n in stage if stage[n] == i) for i in range(max(stage.values()) + 1)]
        late = ", ".join(n for n in stage if stage[n] != before[n])
        raise UserError(f"{self.spec.name}: {late} need final hidden states that depend on themselves; cut an edge via hidden")

    def _sources(self, row: str) -> set[str]:
        """Streams whose final hidden states ``row`` needs: those it reads them from, and what it is made of."""
        made = self._made_of_hidden()
        return {c for (r, c), e in self.edges.items() if r == row and e.via == "hidden"} | ({made[row]} if row in made else set())

    def _made_of_hidden(self) -> dict[str, str]:
        return {n: s.of for n, s in self.spec.streams.items() if s.tokens == "hidden" and s.of is not None}

    def _pieces(self) -> list[tuple[str, slice]]:
        """Tokens in the order of the sequence: whole streams, or pieces of those that are interleaved."""
        out: list[tuple[str, slice]] = []
        begun: dict[str, int] = {}
        for name in self.owner:
            if name not in self.interleaved:
                out.append((name, slice(0, self.spec.streams[name].length)))
            elif not begun:
                for piece, _ in self.spec.pieces:
                    start = begun.get(piece.stream, 0)
                    begun[piece.stream] = start + piece.length
                    out.append((piece.stream, slice(start, start + piece.length)))
        return out

    def _order(self, name: str, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Of each token its place and its block: in the interleaved sequence with pieces as blocks, or in its own stream."""
        if name not in self.interleaved:
            places = torch.arange(self.spec.streams[name].length, device=device)
            return places, places // (self.spec.streams[name].block or 1)
        pieces = self.spec.pieces
        starts = itertools.accumulate((piece.length for piece, _ in pieces), initial=0)
        mine = [(start, piece.length, block) for start, (piece, block) in zip(starts, pieces, strict=False) if piece.stream == name]
        places = torch.cat([torch.arange(start, start + length, device=device) for start, length, _ in mine])
        return places, torch.cat([torch.full((length,), block, device=device) for _, length, block in mine])

    def _pairs(self, pairs: Sequence[tuple[str, str]], own: bool = False) -> Tensor:
        """(N, N) over all tokens: True between all tokens of each (row, col), or with ``own`` between those of the same number."""
        ends = torch.tensor([0, *(self.spec.streams[n].length for n in self.names)]).cumsum(0).tolist()
        at = {n: slice(a, b) for n, a, b in zip(self.names, ends[:-1], ends[1:], strict=True)}
        out = torch.zeros(ends[-1], ends[-1], dtype=torch.bool)
        for row, col in pairs:
            block = out[at[row], at[col]]
            block |= torch.eye(len(block), dtype=torch.bool) if own else torch.ones_like(block)
        return out

    # derivation -----------------------------------------------------------------------------------------------------

    def _kind(self, stream: str) -> PhaseKind:
        if stream in self.spec.flows:
            return "denoise"
        return "regress" if isinstance(self.spec.heads.get(stream), LatentHead) else "prefill"

    def _needs(self, stream: str) -> set[str]:
        """Streams that must be there before or while ``stream`` runs in inference."""
        made = self.spec.streams[stream].of if self.spec.streams[stream].tokens == "clean" else None
        return {s for s in {*self.reads(stream), *self._sources(stream)} if s in self.owner} | ({made} if made else set())

    def _derive_phases(self) -> dict[str, Phase]:
        done: list[str] = []
        phases: dict[str, Phase] = {}
        while len(done) < len(self.owner):
            ready = [n for n in self.owner if n not in done and all(c in done or c == n for c in self._needs(n))]
            if not ready:
                left = ", ".join(n for n in self.owner if n not in done)
                raise UserError(
                    f"{self.spec.name}: streams {left} read each other in a cycle; "
                    "give a schedule that puts them in one phase, or cut an edge"
                )
            kind = min((self._kind(n) for n in ready), key=("prefill", "ar", "regress", "denoise").index)
            streams = tuple(n for n in ready if self._kind(n) == kind)
            last = next(reversed(phases)) if phases else None
            apart = last is not None and any(set(phases[last].streams) & self._sources(n) for n in streams)
            if last and phases[last].kind == kind and kind == "prefill" and not apart:
                phases[last] = Phase(kind=kind, streams=phases[last].streams + streams)
            else:
                phases["_".join([kind, *streams])] = Phase(kind=kind, streams=streams, steps=10 if kind == "denoise" else None)
            done += streams
        return phases

    # checks ---------------------------------------------------------------------------------------------------------

    def _check_edges(self) -> None:
        interleaved = self.interleaved
        for (row, col), edge in self.edges.items():
            where = f"{self.spec.name}: edges.{row}.{col}"
            if row not in self.owner:
                raise UserError(f"{where}: {row} is a context, which reads nothing; cut the edge or give the stream an expert")
            reader, owner = self.spec.streams[row], self.owner.get(col)
            expert = self.spec.experts[self.owner[row]]
            if expert.frozen and self.owner[row] != owner and not expert.allow_perturb:
                raise UserError(
                    f"{where}: the expert '{reader.expert}' of {row} is frozen and must not read {col}, "
                    "which would change it; cut the edge, unfreeze it, or say allow_perturb: true"
                )
            inside = row == col or {row, col} <= interleaved
            if edge.relation in ("causal", "window") and not inside:
                raise UserError(f"{where}: relation '{edge.relation}' holds inside one stream or sequence only; use 'full'")
            if edge.relation == "row_causal" and inside:
                raise UserError(f"{where}: relation 'row_causal' is between two streams; inside one use 'causal'")
            for name in dict.fromkeys((row, col) if edge.relation in BLOCKS else (row,) if edge.relation == "window" else ()):
                if self.spec.streams[name].block is None and (name not in interleaved or edge.relation == "window"):
                    raise UserError(f"{where}: relation '{edge.relation}' needs streams.{name}.block")
            if edge.via == "keys" and owner is None:
                raise UserError(f"{where}: the context {col} has no keys; read it with {{via: hidden}}")
            cross = expert.cross if isinstance(expert, DecoderExpert) else None
            if edge.via == "hidden" and (cross is None or cross.reads != "hidden"):
                raise UserError(f"{where}: no layer of expert '{reader.expert}' reads hidden states; set its cross: {{reads: hidden}}")
        for expert_name in self.spec.experts:
            rows = [n for n in self.owner if self.owner[n] == expert_name]
            heard = {col: self._detached(rows, col) for (row, col), e in self.edges.items() if row in rows and e.via == "hidden"}
            for col, kinds in heard.items():
                if len(kinds) > 1:
                    raise UserError(
                        f"{self.spec.name}: all streams of expert '{expert_name}' must detach the hidden states of {col}, or none"
                    )

    def _detached(self, rows: Sequence[str], col: str) -> set[bool]:
        return {self.edges[row, col].detach for row in rows if (row, col) in self.edges}

    def _check_phases(self, phases: Mapping[str, Phase], what: str) -> None:
        listed = [s for phase in phases.values() for s in phase.streams]
        left = [n for n in self.owner if n not in listed]
        missed = any(n not in self.spec.heads or any(n in self._needs(row) for row in listed) for n in left)
        if len(set(listed)) < len(listed) or set(listed) - set(self.owner) or missed:
            raise UserError(
                f"{self.spec.name}: {what} must name every stream once ({', '.join(self.owner)}), but for heads that nobody reads; "
                f"it names {', '.join(listed)}"
            )
        done: set[str] = set()
        for name, phase in phases.items():
            held = done
            done = done | set(phase.streams)
            for row in phase.streams:
                late = sorted(self._needs(row) - done | (self._sources(row) & set(phase.streams)) - held)
                if late:
                    raise UserError(
                        f"{self.spec.name}: {row} runs in phase '{name}' of {what} but reads {', '.join(late)}, which a later phase makes"
                    )
                allowed = {self._kind(row)} | ({"ar"} if isinstance(self.spec.heads.get(row), WordHead) else set())
                allowed |= {self._kind(s) for s in phase.streams} if self._kind(row) == "prefill" else set()
                allowed |= {"denoise"} if self._kind(row) == "regress" and set(phase.streams) & set(self.spec.flows) else set()
                if phase.kind not in allowed or (phase.kind == "ar" and len(phase.streams) > 1):
                    kind = self._kind(row)
                    raise UserError(
                        f"{self.spec.name}: {row} is of kind {kind} by its head and cannot run in the {phase.kind} phase '{name}' of {what}"
                    )

    # blocks of the mask ---------------------------------------------------------------------------------------------

    def _block(self, row: str, col: str, held: bool, device: torch.device | None) -> Tensor:
        rows, cols = self.spec.streams[row].length, self.spec.streams[col].length
        edge = self.edges.get((row, col))
        if edge is None or not held:
            return torch.zeros(rows, cols, dtype=torch.bool, device=device)
        (i, mine), (j, theirs) = (self._order(name, device) for name in (row, col))
        match edge.relation:
            case "full":
                return torch.ones(rows, cols, dtype=torch.bool, device=device)
            case "causal" | "row_causal":
                return j <= i[:, None]
            case "window":
                return (j <= i[:, None]) & (j > i[:, None] - (self.spec.streams[row].block or 1))
            case "block_causal":
                return theirs <= mine[:, None]
            case "own_block":
                return theirs == mine[:, None]
            case "earlier_block":
                return theirs < mine[:, None]

    def _own(self, row: str, col: str, device: torch.device | None) -> Tensor:
        rows, cols = self.spec.streams[row].length, self.spec.streams[col].length
        if row == col:
            return torch.eye(rows, dtype=torch.bool, device=device)
        return torch.zeros(rows, cols, dtype=torch.bool, device=device)

    def _presence(self, name: str, present: Tensor | None, batch: int, device: torch.device | None) -> Tensor:
        if present is not None:
            return present
        return torch.ones(batch, self.spec.streams[name].length, dtype=torch.bool, device=device)

    def _symbol(self, row: str, col: str) -> str:
        edge = self.edges.get((row, col))
        name = None if edge is None else edge.relation if edge.via == "keys" else "hidden"
        return "-" if edge is None or name is None else name + ("*" if edge.detach else "")


def _grid(grid: tuple[int, int, int], batch: int, device: torch.device | None) -> Tensor:
    """Frame, row and column (3, B, T) of the tokens of a grid."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes])[:, None].expand(-1, batch, -1)

"""Everything that follows from who reads whom: order, phases, cache plan, mask, positions, gradient routes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .spec import DecoderExpert, FlowHead, LatentHead, Phase, PhaseKind, Spec


@dataclass(frozen=True)
class Own:
    """Positions (P, B, T) of P axes that an expert counts in its own way, from 0, and how far they reach: (B, 1), the position that
    comes next."""

    positions: Tensor
    reach: Tensor


Edges = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """One step of the backbone.

    Attributes:
        layers: expert -> which of its layers runs; those not named rest.
        edges: (row, col) of the streams that read each other in it.
        crossed: experts whose layer has no keys of its own and projects those of others anew.
    """

    layers: Mapping[str, int]
    edges: Edges
    crossed: frozenset[str] = frozenset()


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
        self.edges = {(row, col): edge for row in self.names for col in self.names if (edge := spec.edge(row, col))}
        self._check_edges()
        self.phases = dict(spec.schedule) if spec.schedule else self._derive_phases()
        self._check_phases()

    def reads(self, row: str) -> tuple[str, ...]:
        """Streams that ``row`` reads, in token order."""
        return tuple(col for col in self.names if (row, col) in self.edges)

    def cached(self) -> dict[str, tuple[str, ...]]:
        """The cache plan: phase -> streams whose keys and values it must keep for a later phase.

        A stream that no later phase reads is never kept; one that is kept is computed once per observation.
        """
        order = list(self.phases.values())
        plan = {}
        for i, (name, phase) in enumerate(self.phases.items()):
            readers = [row for later in order[i + 1 :] for row in later.streams]
            plan[name] = tuple(s for s in phase.streams if any((row, s) in self.edges for row in readers))
        return plan

    def steps(self, depths: Mapping[str, int]) -> list[Step]:
        """What runs in each step of the backbone, and who reads whom there, for experts of the given depths.

        Raises:
            UserError: depths differ and nothing says how they meet, or an expert meets others where none of its layers runs.
        """
        couple = self.spec.couple
        loose = [name for name in depths if name not in couple]
        if len({depths[name] for name in loose}) > 1:
            raise UserError(
                f"{self.spec.name}: the experts' depths differ ({', '.join(f'{n} {depths[n]}' for n in loose)}), so their layers do not "
                "meet one to one; say in couple where they stand (first, every, joint)"
            )
        where = {name: range(c.first, c.first + c.every * depths[name], c.every) for name, c in couple.items()}
        where |= {name: range(depths[name]) for name in loose}
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
            nothing at all (an absent token of its own stream) reads itself, so that softmax stays finite.
        """
        held = self.edges.keys() if edges is None else edges
        simple = all((r, c) in held and self.edges[r, c].relation == "full" for r in rows for c in cols)
        if simple and all(present.get(c) is None for c in cols):
            return None
        blocks = [torch.cat([self._block(row, col, (row, col) in held, device) for col in cols], dim=1) for row in rows]
        allowed = torch.cat(blocks, dim=0)[None]
        if any(present.get(c) is not None for c in cols):
            batch = next(p.shape[0] for c in cols if (p := present.get(c)) is not None)
            columns = [self._presence(c, present.get(c), batch, device) for c in cols]
            allowed = allowed & torch.cat(columns, dim=1)[:, None, :]
            own = torch.cat([torch.cat([self._own(r, c, device) for c in cols], dim=1) for r in rows], dim=0)[None]
            allowed = allowed | (own & ~allowed.any(-1, keepdim=True))
        return allowed[:, None]

    def positions(
        self,
        present: dict[str, Tensor | None],
        batch: int,
        device: torch.device | None = None,
        own: Mapping[str, Own] | None = None,
    ) -> dict[str, Tensor]:
        """Rotary position ids (B, T) of every stream: a pure function of the spec and of what is present.

        ``continue`` streams count on after the last present token of all earlier streams; absent tokens do not count.

        Args:
            own: streams whose expert counts in its own way.
        """
        out: dict[str, Tensor] = {}
        offset = torch.zeros(batch, 1, dtype=torch.long, device=device)
        for name in self.names:
            if own and name in own:
                local, reach = own[name].positions, own[name].reach
            else:
                here = self._presence(name, present.get(name), batch, device).long()
                local, reach = (here.cumsum(1) - 1).clamp(min=0), here.sum(1, keepdim=True)
            restart = self.spec.streams[name].positions == "restart"
            out[name] = local if restart else local + offset
            if not restart:
                offset = offset + reach
        return out

    def reaches(self, steps: Sequence[Step], gradient: bool = False) -> Tensor:
        """Token-level closure over the steps of the backbone: entry (i, j) is True where token i depends on token j.

        With ``gradient`` detached edges carry nothing, so the closure says where a gradient can flow.
        """
        sizes = [self.spec.streams[n].length for n in self.names]
        closure = torch.eye(sum(sizes), dtype=torch.bool)
        for step in steps:
            edges = frozenset(e for e in step.edges if not (gradient and self.edges[e].detach))
            mask = self.mask(self.names, self.names, {}, edges=edges)
            allowed = torch.ones_like(closure) if mask is None else mask[0, 0]
            closure = ((torch.eye(len(closure), dtype=torch.bool) | allowed).float() @ closure.float()) > 0
        return closure

    def matrix(self) -> list[list[str]]:
        """The explicit stream matrix: relation by which row reads column, '-' for nothing, '*' marks a detached edge."""
        return [[self._symbol(row, col) for col in self.names] for row in self.names]

    def hash(self) -> str:
        """12 hex digits over streams, lengths, relations and phases; part of every checkpoint."""
        facts = {
            "streams": {n: self.spec.streams[n].model_dump(mode="json") for n in self.names},
            "matrix": self.matrix(),
            "phases": {n: p.model_dump(mode="json") for n, p in self.phases.items()},
        }
        if self.spec.couple:
            facts["couple"] = {n: c.model_dump(mode="json") for n, c in self.spec.couple.items()}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    # steps ----------------------------------------------------------------------------------------------------------

    def _step(self, number: int, layers: dict[str, int]) -> Step:
        """The step in which ``layers`` run: streams of one expert read each other, those of several where all of them meet."""
        couple = self.spec.couple
        meets = {n for n in layers if n not in couple or (j := couple[n].joint) is None or j[0] <= number < j[1]}
        owner = {name: stream.expert for name, stream in self.spec.streams.items()}
        experts = self.spec.experts
        crossed = frozenset(n for n, layer in layers.items() if isinstance(e := experts[n], DecoderExpert) and e.crosses(layer))

        def holds(row: str, col: str) -> bool:
            one, other = owner[row], owner[col]
            return other not in crossed and (one in layers if one == other else one in meets and other in meets)

        return Step(layers, frozenset(edge for edge in self.edges if holds(*edge)), crossed)

    # derivation -----------------------------------------------------------------------------------------------------

    def _kind(self, stream: str) -> PhaseKind:
        head = self.spec.heads.get(stream)
        return "denoise" if isinstance(head, FlowHead) else "regress" if isinstance(head, LatentHead) else "prefill"

    def _derive_phases(self) -> dict[str, Phase]:
        done: list[str] = []
        phases: dict[str, Phase] = {}
        while len(done) < len(self.names):
            ready = [n for n in self.names if n not in done and all(c in done or c == n for c in self.reads(n))]
            if not ready:
                left = ", ".join(n for n in self.names if n not in done)
                raise UserError(
                    f"{self.spec.name}: streams {left} read each other in a cycle; "
                    "give a schedule that puts them in one phase, or cut an edge"
                )
            kind = min((self._kind(n) for n in ready), key=("prefill", "regress", "denoise").index)
            streams = tuple(n for n in ready if self._kind(n) == kind)
            last = next(reversed(phases)) if phases else None
            if last and phases[last].kind == kind and kind == "prefill":
                phases[last] = Phase(kind=kind, streams=phases[last].streams + streams)
            else:
                phases["_".join([kind, *streams])] = Phase(kind=kind, streams=streams, steps=10 if kind == "denoise" else None)
            done += streams
        return phases

    # checks ---------------------------------------------------------------------------------------------------------

    def _check_edges(self) -> None:
        for (row, col), edge in self.edges.items():
            reader, read = self.spec.streams[row], self.spec.streams[col]
            if self.spec.experts[reader.expert].frozen and reader.expert != read.expert:
                raise UserError(
                    f"{self.spec.name}: edges.{row}.{col}: the expert '{reader.expert}' of {row} is frozen and must not read {col}, "
                    "which would change it; cut the edge or unfreeze it"
                )
            if edge.relation != "full" and row != col:
                raise UserError(f"{self.spec.name}: edges.{row}.{col}: relation '{edge.relation}' holds inside one stream only; use 'full'")
            if edge.relation in ("block_causal", "own_block") and reader.block is None:
                raise UserError(f"{self.spec.name}: edges.{row}.{col}: relation '{edge.relation}' needs streams.{row}.block")

    def _check_phases(self) -> None:
        listed = [s for phase in self.phases.values() for s in phase.streams]
        if sorted(listed) != sorted(self.names):
            raise UserError(
                f"{self.spec.name}: the schedule must name every stream once ({', '.join(self.names)}), it names {', '.join(listed)}"
            )
        done: set[str] = set()
        for name, phase in self.phases.items():
            done |= set(phase.streams)
            for row in phase.streams:
                late = [c for c in self.reads(row) if c not in done]
                if late:
                    raise UserError(
                        f"{self.spec.name}: {row} runs in phase '{name}' but reads {', '.join(late)}, which a later phase makes"
                    )
                kind = self._kind(row)
                if kind != phase.kind:
                    raise UserError(
                        f"{self.spec.name}: {row} is of kind {kind} by its head and cannot run in the {phase.kind} phase '{name}'"
                    )

    # blocks of the mask ---------------------------------------------------------------------------------------------

    def _block(self, row: str, col: str, held: bool, device: torch.device | None) -> Tensor:
        rows, cols = self.spec.streams[row].length, self.spec.streams[col].length
        edge = self.edges.get((row, col))
        if edge is None or not held:
            return torch.zeros(rows, cols, dtype=torch.bool, device=device)
        i = torch.arange(rows, device=device)[:, None]
        j = torch.arange(cols, device=device)[None, :]
        block = self.spec.streams[row].block or 1
        match edge.relation:
            case "full":
                return torch.ones(rows, cols, dtype=torch.bool, device=device)
            case "causal":
                return j <= i
            case "block_causal":
                return j // block <= i // block
            case "own_block":
                return j // block == i // block

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
        return "-" if edge is None else edge.relation + ("*" if edge.detach else "")

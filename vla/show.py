"""A spec as people read it: tables for the terminal, one drawing for reports."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .graph import Graph, Step
from .model import Model, sketch
from .spec import DecoderExpert, Spec, load_spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

RELATION_COLOURS = {"full": "#4477aa", "causal": "#66ccee", "block_causal": "#228833", "own_block": "#ccbb44", "hidden": "#aa3377"}
RELATION_COLOURS |= {"row_causal": "#66ccee", "window": "#66ccee", "earlier_block": "#228833"}
"""Paul Tol's bright palette: told apart by colour-blind readers."""


def facts(spec: Spec, model: Model | None = None) -> dict[str, Any]:
    """Everything that ``vla model show`` prints, as data: streams, matrix, phases with what they keep, parameters."""
    graph = Graph(spec)
    model = model or sketch(spec)
    kept = graph.cached()
    counts = {}
    for name, expert in model.mot.experts.items():
        total = sum(p.numel() for p in expert.parameters())
        trained = sum(p.numel() for p in expert.parameters() if p.requires_grad)
        runs = [number for number, step in enumerate(model.mot.steps) if name in step.layers]
        counts[name] = {"parameters": total, "trained": trained, "steps": runs, "joint": _joint(model.mot.steps, spec, name)}
    rest = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mot.experts."))
    return {
        "name": spec.name,
        "about": spec.about.strip(),
        "graph_hash": graph.hash(),
        "streams": {n: s.model_dump(mode="json") for n, s in spec.streams.items()},
        "matrix": graph.table(),
        "phases": {n: {**p.model_dump(mode="json"), "keeps": list(kept[n])} for n, p in graph.phases.items()},
        "experts": counts,
        "heads_and_encoders": rest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _joint(steps: Sequence[Step], spec: Spec, expert: str) -> list[int]:
    """The steps in which an expert's streams and those of others read each other."""
    owner = {name: stream.expert for name, stream in spec.streams.items()}
    apart = {(row, col) for row in owner for col in owner if owner[row] != owner[col] and expert in (owner[row], owner[col])}
    return [number for number, step in enumerate(steps) if step.edges & apart]


def _ranges(numbers: list[int]) -> str:
    """``0-11``, or ``0, 2, 4``."""
    if not numbers:
        return "none"
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))


def show(name: str, png: Path | None = None, overrides: list[str] | None = None) -> "RenderableType":
    """The tables of the spec ``name`` for a rich console; with ``png`` the drawing is written too."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    spec = load_spec(name, overrides)
    data = facts(spec)
    graph = Graph(spec)
    if png is not None:
        figure(spec).savefig(png, dpi=160)

    streams = Table("stream", "expert", "tokens", "length", "positions", "head", title="streams")
    for n, s in spec.streams.items():
        expert = "context" if s.expert is None else s.expert + (" (frozen)" if spec.experts[s.expert].frozen else "")
        head = spec.heads[n].kind if n in spec.heads else ""
        streams.add_row(n, expert, s.tokens, str(s.length), s.positions, head)
    matrix = Table("row reads", *graph.names, title="attention graph (* = gradient stops)")
    for row, cells in zip(graph.names, graph.matrix(), strict=True):
        matrix.add_row(row, *cells)
    phases = Table("phase", "kind", "runs", "keeps for later", "how often", title="execution order and cache plan")
    for n, p in graph.phases.items():
        kept = ", ".join(graph.cached()[n]) or "nothing"
        phases.add_row(n, p.kind, ", ".join(p.streams), kept, f"{p.steps or 10} steps" if p.kind == "denoise" else "once an observation")
    experts = Table("expert", "made of", "steps", "joint", title="experts")
    for column in ("parameters", "trained"):
        experts.add_column(column, justify="right", no_wrap=True)
    for n, counts in data["experts"].items():
        config = spec.experts[n]
        made = f"{config.depth} layers of {config.width}" if isinstance(config, DecoderExpert) else config.weights
        where = (_ranges(counts["steps"]), _ranges(counts["joint"]))
        experts.add_row(n, made, *where, f"{counts['parameters']:,}", f"{counts['trained']:,}")
    experts.add_row("heads, encoders", "", "", "", f"{data['heads_and_encoders']:,}", f"{data['heads_and_encoders']:,}")
    experts.add_row("all", "", "", "", f"{data['parameters']:,}", f"{data['trained']:,}")
    parts: list[RenderableType] = [
        Text(f"{spec.name}  graph {data['graph_hash']}", style="bold"),
        Text(spec.about.strip()),
        streams,
        matrix,
        phases,
    ]
    if spec.modes:
        parts.append(Text(f"modes, each a schedule of its own: {', '.join(spec.modes)}"))
    return Group(*parts, experts)


def draw(spec: Spec) -> str:
    """The drawing of ``figure`` as an SVG element for an HTML page."""
    buffer = io.StringIO()
    figure(spec).savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def figure(spec: Spec) -> "Figure":
    """Left, the mask as the backbone sees it, one square per token pair; right, the phases and what each keeps."""
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    graph = Graph(spec)
    cols, rows = graph.names, tuple(graph.owner)  # contexts read nothing
    lengths = {n: spec.streams[n].length for n in cols}
    across, down = (_readable([lengths[n] for n in names]) for names in (cols, rows))

    fig = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.1])
    left.pcolormesh(across, down, np.zeros((len(rows), len(cols))), alpha=0)
    seen = []
    for (row, col), edge in graph.edges.items():
        kind = "hidden" if edge.via == "hidden" else edge.relation
        seen.append(kind)
        mask = None if kind == "hidden" else graph.mask([row], [col], {})
        allowed = np.ones((lengths[row], lengths[col]), bool) if mask is None else mask[0, 0].numpy()
        block = np.where(allowed[..., None], to_rgb(RELATION_COLOURS[kind]), 1.0)
        r, c = rows.index(row), cols.index(col)
        left.imshow(block, extent=(across[c], across[c + 1], down[r + 1], down[r]), aspect="auto", interpolation="nearest")
    for names, borders, axis in ((cols, across, left.xaxis), (rows, down, left.yaxis)):
        axis.set_ticks([(a + b) / 2 for a, b in itertools.pairwise(borders)], [f"{n}\n{lengths[n]}" for n in names])
    left.set(xlim=(0, across[-1]), xlabel="is read", ylim=(down[-1], 0), ylabel="reads")
    left.set_title(f"{spec.name}: who reads whom", fontsize=10, loc="left")
    for at in across[1:-1]:
        left.axvline(at, color="#bbbbbb", lw=0.8)
    for at in down[1:-1]:
        left.axhline(at, color="#bbbbbb", lw=0.8)
    left.tick_params(length=0, labelsize=8)
    if len(cols) > 6:
        left.tick_params(axis="x", rotation=45)
    patches = [Patch(color=RELATION_COLOURS[kind], label=kind.replace("_", " ")) for kind in dict.fromkeys(seen)]
    right.legend(handles=patches, loc="lower left", fontsize=8, frameon=False, ncols=len(patches))
    _phases(right, graph)
    return fig


def _readable(lengths: list[int]) -> list[float]:
    """Block borders on an axis where short streams stay visible: widths grow with the root of the length."""
    borders = [0.0]
    for length in lengths:
        borders.append(borders[-1] + max(length, 1) ** 0.5 + 1.5)
    return borders


def _phases(axes: Any, graph: Graph) -> None:
    kept = graph.cached()
    axes.set(xlim=(0, 10), ylim=(len(graph.phases) + 0.3, -0.3))
    axes.axis("off")
    axes.set_title("order, caches", fontsize=10, loc="left")
    for i, (name, phase) in enumerate(graph.phases.items()):
        often = f"{phase.steps or 10} steps" if phase.kind == "denoise" else "once"
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef3f8", "edgecolor": "#4477aa", "linewidth": 1.0}
        experts = ", ".join(dict.fromkeys(graph.owner[s] for s in phase.streams))
        text = f"{name}: {phase.kind} {', '.join(phase.streams)}  ({often}, expert {experts})"
        axes.text(0.2, i + 0.3, text, fontsize=9, va="center", bbox=box)
        if kept[name]:
            hidden = [s for s in kept[name] if graph.informs(s, graph.names)]
            keys = [s for s in kept[name] if s not in hidden]
            told = [f"{what} of {', '.join(of)}" for what, of in (("K/V", keys), ("hidden states", hidden)) if of]
            axes.text(0.6, i + 0.75, f"keeps {', '.join(told)}", fontsize=8, va="center", color="#555555")

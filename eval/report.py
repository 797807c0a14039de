"""The report of an evaluation: one HTML file that needs nothing beside it; and the table for the terminal."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import write_file
from ..errors import UserError
from .charts import curve
from .episodes import Row, read_rows
from .statistics import compare

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATES = Path(__file__).parent / "templates"
VIDEO_BYTES = 5_500_000  # of films in a report, before base64 adds a third
PANELS = 4


def write_report(
    out: Path,
    *,
    graph_svg: str | None = None,
    provenance: Mapping[str, str] | None = None,
    beside: Mapping[str, Path] | None = None,
) -> Path:
    """Write ``out/report.html`` from what ``evaluate`` left in ``out``.

    Args:
        graph_svg: drawing of the policy's attention graph, an ``<svg>`` element.
        provenance: further rows of the last table, such as the minutes of VLM training behind the number.
        beside: label -> folder of another evaluation of the same suite and seeds, compared pair by pair.

    Raises:
        UserError: ``out``, or a folder of ``beside``, holds no finished evaluation; or nothing can be paired.
    """
    import jinja2

    results, rows = read_results(out), read_rows(out / "episodes.jsonl")
    files = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    films = _films(out, rows, {task["name"] for task in results["tasks"] if task["scored"]})
    page = files.get_template("report.html.j2").render(
        results=results,
        lines=[_line(task, rows, None) for task in results["tasks"]],
        controls=[_line(control, rows, control["name"]) for control in results["controls"]],
        failures=[film for film in films if film["control"] is None and not film["success"]],
        successes=[film for film in films if film["control"] is None and film["success"]],
        control_films=[film for film in films if film["control"] is not None],
        failed=sum(row.control is None and not row.success_any for row in rows),
        panels=_panels(out),
        curves=_curves(results["policy"]),
        graph_svg=graph_svg,
        beside=[_beside(label, folder, rows) for label, folder in (beside or {}).items()],
        provenance=_provenance(results, provenance or {}),
    )
    path = out / "report.html"
    write_file(path, page)
    return path


def rates_table(results: dict[str, Any]) -> "Table":
    """Rates with their intervals, for the terminal."""
    from rich.table import Table

    table = Table(title=f"{results['title']}: {results['policy']}", title_justify="left")
    table.add_column("task")
    for name in ("success", "rate", "95 % interval", "bar"):
        table.add_column(name, justify="right")
    for task in results["tasks"]:
        table.add_row(
            task["name"] if task["scored"] else f"{task['name']} (not scored)", *_cells(task), style=None if task["scored"] else "dim"
        )
    if results["overall"] is not None:
        table.add_section()
        table.add_row("overall", *_cells(results["overall"]), style="bold")
    table.add_section()
    for control in results["controls"]:
        table.add_row(f"control: {control['name']}", *_cells(control))
    return table


def read_results(out: Path) -> dict[str, Any]:
    """``results.json`` of an evaluation's folder.

    Raises:
        UserError: there is none, or it is broken.
    """
    path = out / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no {path}; finish the evaluation first, the same vla eval command goes on where it stopped") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); run the same vla eval command again to rewrite it") from None
    return results


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["ci95"]
    bar = f"{row['gate']} {'met' if row['passed'] else 'missed'}" if "gate" in row else ""
    return [f"{row['successes']}/{row['episodes']}", f"{row['rate']:.1%}", f"{low:.1%} to {high:.1%}", bar]


def _line(row: dict[str, Any], rows: list[Row], control: str | None) -> dict[str, Any]:
    """One bar of a chart, with the episodes behind it."""
    mine = [r for r in rows if r.control == control and (control is not None or r.task == row["name"])]
    episodes = [{"won": r.success_any, "title": f"{r.task}, seed {r.seed}: {_outcome(r)}"} for r in mine]
    return row | {"strip": episodes}


def _outcome(row: Row) -> str:
    if row.error is not None and not row.success_any:
        return f"error after {row.steps} steps: {row.error}"
    if not row.success_any:
        return f"failed, {row.steps} steps"
    return f"success at step {row.first_success_step}" + ("" if row.success_end else ", lost again")


def _films(out: Path, rows: list[Row], scored: set[str]) -> list[dict[str, Any]]:
    """Films as data addresses, within a budget: failures of scored tasks first, then other failures, successes, controls."""
    filmed = [row for row in rows if row.video is not None and (out / row.video).is_file()]
    filmed.sort(key=lambda r: (r.control is not None, r.success_any, r.task not in scored, r.task, r.seed))
    films, spent = [], 0
    for row in filmed:
        path = out / str(row.video)
        data, poster = path.read_bytes(), path.with_suffix(".jpg").read_bytes()
        if spent + len(data) + len(poster) > VIDEO_BYTES:
            continue
        spent += len(data) + len(poster)
        said = {"control": row.control, "task": row.task, "seed": row.seed, "success": row.success_any, "outcome": _outcome(row)}
        films.append(said | {"src": _address(data, "video/mp4"), "poster": _address(poster, "image/jpeg")})
    return films


def _panels(out: Path) -> list[dict[str, Any]]:
    """Foresight panels: one of each task first, failures before successes, then more until ``PANELS``."""
    facts = [(path, json.loads(path.read_text())) for path in sorted((out / "foresight").glob("*.json"))]
    facts = [(path, fact) for path, fact in facts if fact["control"] is None]
    facts.sort(key=lambda pair: (pair[1]["task"], pair[1]["success"], pair[1]["seed"]))
    place = {path: sum(other["task"] == fact["task"] for _, other in facts[:i]) for i, (path, fact) in enumerate(facts)}
    facts.sort(key=lambda pair: place[pair[0]])
    panels = []
    for path, fact in facts[:PANELS]:
        sheets = [(camera, _address(path.with_name(f"{path.stem}-{camera}.png").read_bytes(), "image/png")) for camera in fact["cameras"]]
        panels.append(fact | {"sheets": sheets, "mean_error": _mean(fact["error"]), "mean_still": _mean(fact["still"])})
    return panels


def _curves(policy: str) -> list[dict[str, Any]]:
    """Losses of the run that a checkpoint ``<run>/checkpoints/<step>`` belongs to; none without its log."""
    checkpoint = Path(policy).resolve()
    logs = [folder / "log.jsonl" for folder in (checkpoint, *checkpoint.parents[:2])]
    log = next((path for path in logs if path.is_file()), None)
    if log is None:
        return []
    entries = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    names = sorted({name for entry in entries for name in entry if "loss" in name}, key=lambda name: (name != "loss", name))
    curves = []
    for name in names:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if len(points) > 1:
            curves.append({"name": name, "svg": curve(*zip(*points, strict=True)), "last": points[-1][1]})
    return curves


def _beside(label: str, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """This evaluation against another one, over the episodes of the scored tasks that both played."""
    scored = {task["name"] for task in read_results(folder)["tasks"] if task["scored"]}
    theirs = read_rows(folder / "episodes.jsonl")
    a, b = ({(r.task, r.seed): r.success_any for r in side if r.control is None and r.task in scored} for side in (rows, theirs))
    return {"label": label, "found": compare(a, b)}


def _provenance(results: dict[str, Any], more: Mapping[str, str]) -> list[tuple[str, str]]:
    machine, seeds = results["hardware"], results["seeds"]
    rows = [
        ("Command", results["command"]),
        ("Policy", results["policy"]),
        ("Suite", results["suite"]),
        ("Seeds", f"{seeds['first']:,} to {seeds['last']:,}"),
        ("Worlds seen as", "; ".join(dict.fromkeys(_view(task["view"]) for task in results["tasks"]))),
        ("Hardware", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['gpu'] or 'no GPU'}"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in results["versions"].items())),
        ("Evaluation took", f"{results['minutes']:g} minutes"),
        ("Date", results["date"]),
    ]
    if results["checkpoint"] is not None:
        rows.insert(2, ("Checkpoint", f"{results['checkpoint']['step']}, manifest sha256 {results['checkpoint']['manifest_sha256'][:16]}"))
    return rows + list(more.items())


def _view(view: dict[str, Any]) -> str:
    """Such as ``agentview 96 x 96, wrist 96 x 96, 20 Hz, rendered fast``; a size gives height and width."""
    cameras = [f"{camera} {height} x {width}" for camera, (height, width) in view["cameras"].items()]
    return ", ".join([*cameras, f"{view['rate']:g} Hz", f"rendered {view['render']}"])


def _address(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

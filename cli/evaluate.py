"""``vla eval``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json, print_renderable, progress_bar


def evaluate(
    suite: Annotated[str, typer.Argument(help="A name in configs/suite, or a path to a YAML file.")],
    policy: Annotated[
        str, typer.Option(help="Checkpoint or run folder; ws://host:port of a server; 'expert' for the worlds' scripted experts.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the suite.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes per task; as the suite says unless given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed; evaluation seeds begin at 1,000,000.")] = 1_000_000,
    out: Annotated[Path, typer.Option(help="Folder of results.json, episodes.jsonl, videos and report.html.")] = Path("runs/eval"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that simulate; the outcome does not depend on it.")] = 2,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=DIR", help="A finished evaluation of the same suite and seeds, compared pair by pair in the report."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate a policy in closed loop: rates with intervals, videos, one HTML report."""
    others = dict(_labelled(item) for item in beside or [])
    results = judge(suite, policy, out, episodes=episodes, seed=seed, workers=workers, overrides=overrides, beside=others)
    if json:
        print_json(results)
    else:
        print_results(results, out)


def judge(
    suite: str,
    policy: str,
    out: Path,
    *,
    episodes: int | None,
    seed: int,
    workers: int,
    overrides: list[str] | None,
    beside: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """Evaluate with a progress bar, write the report into ``out``, and return the results."""
    from ..eval import EXPERT, write_report
    from ..eval import evaluate as run
    from ..policies import find_checkpoint
    from ..policies.lerobot import is_lerobot
    from ..policies.remote import is_remote

    with progress_bar("episodes") as progress:
        results = run(
            suite,
            policy,
            out=out,
            episodes=episodes,
            seed=seed,
            workers=workers,
            overrides=overrides,
            on_episode=lambda _, done, total: progress(done, total),
        )
    if policy == EXPERT or is_remote(policy) or is_lerobot(find_checkpoint(policy)):
        write_report(out, beside=beside)
    else:
        write_report(out, graph_svg=_graph(policy), provenance=_training_of_weights(policy), beside=beside)
    return results


def print_results(results: dict[str, Any], out: Path) -> None:
    """The table of rates, and where the report is."""
    from ..eval import rates_table

    print_renderable(rates_table(results))
    print(f"report: {out / 'report.html'}")


def _labelled(item: str) -> tuple[str, Path]:
    from ..errors import UserError

    label, separator, folder = item.partition("=")
    if not separator or not label or not folder:
        raise UserError(f"--beside {item} is not LABEL=DIR; write, for example, --beside 'random VLM=runs/random/eval'")
    return label, Path(folder)


def _graph(policy: str) -> str:
    from ..policies import find_checkpoint
    from ..vla import load_spec
    from ..vla.show import draw

    return draw(load_spec(str(find_checkpoint(policy) / "spec.yaml")))


def _training_of_weights(policy: str) -> dict[str, str]:
    """How long the frozen weights of a policy were trained themselves, as far as their folders say (``training.json``)."""
    from json import loads

    from ..policies import read_checkpoint
    from ..vla import load_spec
    from ..vla.spec import PretrainedExpert

    checkpoint, rows = read_checkpoint(policy), {}
    experts = load_spec(str(checkpoint.spec)).experts
    for name, reference in checkpoint.info.weights.items():
        card = checkpoint.reference(name) / "training.json"
        expert = experts.get(name)
        if isinstance(expert, PretrainedExpert) and expert.fresh:
            rows[f"training of {name}"] = f"none before: random weights in the architecture of {reference.ref}"
        elif card.is_file():
            said = loads(card.read_text())
            rows[f"training of {name} ({reference.ref})"] = f"{said['minutes']} minutes on {said['hardware']}; {said['recipe']}"
    return rows

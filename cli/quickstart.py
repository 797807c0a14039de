"""``vla quickstart``: record, train, evaluate; what is already done is not done again."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .evaluate import judge, print_results
from .output import duration, print_table, progress_bar


def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to configs/quickstart.yaml.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the data, the run and the report.")] = Path("runs/quickstart"),
) -> None:
    """Record demonstrations, train the three-expert policy, evaluate it in closed loop, write a report. All offline."""
    from ..config import CONFIGS, Strict, load

    class Record(Strict):
        worlds: dict[str, int]
        noise: float = 0.0
        pushes: float = 0.0

    class Train(Strict):
        recipe: str
        overrides: list[str] = []

    class Evaluate(Strict):
        suite: str
        episodes: int | None = None
        seed: int = 1_000_000
        overrides: list[str] = []

    class Quickstart(Strict):
        record: Record
        train: Train
        evaluate: Evaluate
        workers: int

    plan = load(Quickstart, CONFIGS / "quickstart.yaml", overrides)
    stages = Stages(out)
    stages.run("record", out / "data", plan.record.model_dump(), partial(_record, out, workers=plan.workers, **plan.record.model_dump()))
    stages.run("train", out / "train", plan.train.model_dump(), partial(_train, out, **plan.train.model_dump()))
    evaluate = partial(_evaluate, out, workers=plan.workers, **plan.evaluate.model_dump())
    stages.run("evaluate", out / "eval" / "results.json", plan.evaluate.model_dump(), evaluate)

    print_table("Stages", ("stage", "time"), [(name, duration(done["seconds"])) for name, done in stages.done.items()])
    print_results(json.loads((out / "eval" / "results.json").read_text()), out / "eval")


class Stages:
    """The finished stages of a quickstart's folder, kept in its ``stages.json``: name -> inputs and seconds.

    A finished stage is skipped; an interrupted one goes on where its own work can.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "stages.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, result: Path, inputs: dict[str, Any], work: Callable[[], object]) -> None:
        """Do ``work``, which leaves ``result``, unless it is done and its result is still there.

        Raises:
            UserError: it was done with other inputs.
        """
        if name in self.done and result.exists():
            if self.done[name]["inputs"] != inputs:
                was, now = (", ".join(f"{k}={v}" for k, v in d.items()) for d in (self.done[name]["inputs"], inputs))
                raise UserError(f"'{name}' in {self.folder} was done with {was}, now it is {now}: give another --out, or delete the folder")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        typer.echo(f"== {name}", err=True)
        start = time.perf_counter()
        work()
        self.done[name] = {"inputs": inputs, "seconds": round(time.perf_counter() - start, 1)}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=2))
        temporary.replace(self.path)


def _record(out: Path, worlds: dict[str, int], noise: float, pushes: float, workers: int) -> None:
    from ..envs.record import record_all

    with progress_bar("demonstrations") as progress:
        record_all(worlds, out / "data", noise=noise, pushes=pushes, workers=workers, progress=progress)


def _train(out: Path, recipe: str, overrides: list[str]) -> None:
    from ..policies.train.recipe import run

    folder = out / "train"
    run(recipe, [*overrides, f"data={json.dumps(str(out / 'data'))}"], folder, resume=(folder / "recipe.yaml").is_file())


def _evaluate(out: Path, suite: str, episodes: int | None, seed: int, overrides: list[str], workers: int) -> None:
    policy = str(out / "train" / "checkpoints" / "last")
    judge(suite, policy, out / "eval", episodes=episodes, seed=seed, workers=workers, overrides=overrides)

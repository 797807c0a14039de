"""``vla quickstart``: record, train, evaluate; what is already done is not done again."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .output import duration, print_rates, print_table


def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to configs/quickstart.yaml.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the data, the run and the report.")] = Path("runs/quickstart"),
) -> None:
    """Record demonstrations, train the three-expert policy, evaluate it in closed loop, write a report. All offline."""
    from ..config import CONFIGS, Strict, load

    class Demonstrations(Strict):
        episodes: int
        noise: float = 0.0

    class Quickstart(Strict):
        record: dict[str, Demonstrations]
        recipe: str
        suite: str
        episodes: int
        seed: int
        workers: int

    plan = load(Quickstart, CONFIGS / "quickstart.yaml", overrides)
    stages = Stages(out)
    folders = {world: out / "data" / world.replace("/", "-") for world in plan.record}
    for world, wanted in plan.record.items():
        record = partial(_record, world, wanted.episodes, wanted.noise, plan.workers, folders[world])
        stages.run(f"record {world}", wanted.model_dump(), record)
    stages.run("train", {"recipe": plan.recipe}, lambda: _train(plan.recipe, list(folders.values()), out / "train"))
    judged = {"suite": plan.suite, "episodes": plan.episodes, "seed": plan.seed}
    stages.run("evaluate", judged, lambda: _evaluate(plan.suite, plan.episodes, plan.seed, plan.workers, out))

    print_table("Stages", ("stage", "time"), [(name, duration(done["seconds"])) for name, done in stages.done.items()])
    print_rates(json.loads((out / "eval" / "results.json").read_text()))
    print(f"report: {out / 'eval' / 'report.html'}")


class Stages:
    """The finished stages of a quickstart folder, kept in its ``stages.json``: name -> inputs and seconds.

    A stage that is done is skipped; one that was interrupted begins again where it can.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "stages.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[], object]) -> None:
        """Do ``work`` unless it is done.

        Raises:
            UserError: it was done with other inputs.
        """
        if name in self.done:
            if self.done[name]["inputs"] != inputs:
                was, now = (", ".join(f"{k}={v}" for k, v in d.items()) for d in (self.done[name]["inputs"], inputs))
                raise UserError(f"'{name}' in {self.folder} was done with {was}, now it is {now}: give another --out, or delete the folder")
            return
        typer.echo(f"== {name}", err=True)
        start = time.perf_counter()
        work()
        self.done[name] = {"inputs": inputs, "seconds": round(time.perf_counter() - start, 1)}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=2))
        temporary.replace(self.path)


def _record(world: str, episodes: int, noise: float, workers: int, out: Path) -> None:
    from ..envs.record import record

    record(world, episodes, out, noise=noise, workers=workers)


def _train(recipe: str, datasets: list[Path], out: Path) -> None:
    from ..policies.train.recipe import run

    listed = ", ".join(json.dumps(str(path)) for path in datasets)
    run(recipe, [f"datasets=[{listed}]"], out, resume=out.exists())


def _evaluate(suite: str, episodes: int, seed: int, workers: int, out: Path) -> None:
    from ..eval.suite import evaluate

    evaluate(suite, str(out / "train" / "checkpoints" / "last"), episodes=episodes, seed=seed, out=out / "eval", workers=workers)

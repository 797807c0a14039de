"""``vla``: the verbs in one place, and what happens to errors.

Verb files import the library inside their functions, so that ``vla --help`` starts in a fraction of a second.
"""

import logging
import sys
from typing import Annotated

import typer

from .. import UserError, __version__
from . import bench, client, data, doctor, evaluate, model, quickstart, replay, serve, train, trial, verify

app = typer.Typer(name="vla", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("replay")(replay.replay)
app.command("client")(client.client)
app.command("trial")(trial.trial)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"triune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Vision-language-action robot policies: record, train, evaluate."""


def main() -> None:
    """Run ``vla``. A user's mistake is one line on stderr and exit code 2; Ctrl-C exits with 130."""
    logging.getLogger("lerobot").setLevel(logging.ERROR)  # it warns at length that FFmpeg is missing; PyAV brings its own
    try:
        app()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

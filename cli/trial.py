"""``vla trial``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .client import open_options
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..eval.trial import Run, Score, Verdict


def trial(
    a: Annotated[str, typer.Argument(help="A policy: checkpoint, run folder, or a server's ws://host:port.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    world: Annotated[str | None, typer.Option(help="Drive a simulated world, which judges by itself.")] = None,
    robot: Annotated[str | None, typer.Option(metavar="TYPE", help="Drive a robot of lerobot.")] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of the robot's configuration; may be repeated.")] = None,
    mapping: Annotated[str | None, typer.Option(help="Which of its cameras and numbers are which.")] = None,
    instruction: Annotated[str, typer.Option(help="What the robot is to do.")] = "",
    pairs: Annotated[int, typer.Option(min=1, help="Starts; each is run by both. Decide before you begin.")] = 20,
    mode: Annotated[Literal["auto", "sync", "async", "rtc", "ensemble"], typer.Option(help="As in `vla client`.")] = "sync",
    seconds: Annotated[float, typer.Option(min=0.1, help="After which a run is ended.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first start.")] = 1_000_000,
    ask: Annotated[bool, typer.Option(help="Ask for success or failure of simulated runs, too.")] = False,
    out: Annotated[Path, typer.Option(help="Folder; a trial that was begun there goes on.")] = Path("runs/trial"),
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare two policies on the same starts, in blind random order: one key judges a run, and each pair mends the exact interval."""
    from contextlib import ExitStack
    from dataclasses import asdict
    from json import dumps
    from random import SystemRandom

    from ..config import parse
    from ..data import Contract
    from ..data.files import write_file
    from ..errors import UserError

    try:
        from ..eval.bodies import open_body
        from ..eval.live import Loop, drive
        from ..eval.trial import Plan, Stopped, begin, go_on, report
    except ImportError as error:
        raise UserError(f"a trial needs the client of action servers, which is not here ({error}): pip install triune-client") from None

    with ExitStack() as stack:
        clients = {side: _connect(stack, policy) for side, policy in (("a", a), ("b", b))}
        likes = [parse(Contract, client.welcome.contract, policy) for client, policy in zip(clients.values(), (a, b), strict=True)]
        options = None if robot is None else {"type": robot} | open_options(option or [])
        body = open_body(world=world, episode=None, robot=options, mapping=mapping, instruction=instruction, like=likes[0])
        stack.callback(body.close)
        for like, policy in zip(likes, (a, b), strict=True):
            like.require(body.contract, policy, body.name)
        loop = Loop(mode, seconds=seconds)
        contracts = (likes[0].model_dump(mode="json"), likes[1].model_dump(mode="json"))
        order = SystemRandom().randrange(2**32)
        plan = Plan(a=a, b=b, contracts=contracts, body=body.name, pairs=pairs, seed=seed, order_seed=order, loop=asdict(loop))
        before = len(begin(out, plan))
        if before:
            typer.echo(f"{out}: going on after {before} runs", err=True)
        judge = _by_key if robot is not None or ask else _by_world

        def play(side: Any, start: int) -> Any:
            if robot is not None:
                typer.echo(f"\nput the scene as for start {start}; any key begins, q leaves", err=True)
                if _key() == "q":
                    raise Stopped
            return drive(body, clients[side], loop, [start])[0]

        try:
            standing = go_on(out, plan, play, judge, _tell)
        except Stopped:
            typer.echo(f"{out} keeps what was judged; the same command goes on", err=True)
            raise typer.Exit(130) from None
    result = report(plan, standing)
    write_file(out / "result.json", dumps(result, indent=1) + "\n")
    if json:
        print_json(result)
        return
    rows = [[row["policy"], f"{row['successes']}/{row['pairs']}", _span(row["ci95"])] for row in result["policies"]]
    print_table(f"{result['body']}, {standing.pairs} pairs", ["policy", "success", "95 % interval"], rows)
    typer.echo(f"difference {100 * result['difference']:+.1f} points, exact 95 % interval {_span(result['ci95'])}")


def _connect(stack: Any, policy: str) -> Any:
    """A connection to a server, or to one of our own for a checkpoint."""
    from ..policies.remote import is_remote, open_remote
    from ..policies.serve import Source
    from ..policies.serve.local import serving

    url = policy
    if not is_remote(policy):
        source = Source("triune.policies:open_policy", {"path": policy})
        url = stack.enter_context(serving(source, Path(policy).name)).url
    return stack.enter_context(open_remote(url).client)


def _by_world(run: "Run") -> "Verdict":
    from ..eval.trial import Verdict

    return Verdict(run.success)


def _by_key(run: "Run") -> "Verdict":
    """One key: s success, f failure, r again, q leave; then a note, or nothing."""
    from ..eval.trial import Stopped, Verdict

    typer.echo(f"pair {run.pair + 1}, run {run.turn + 1}: s success, f failure, r run it again, q leave", err=True)
    while (key := _key()) not in ("s", "f", "r", "q"):
        typer.echo(f"'{key}' is none of s, f, r, q", err=True)
    if key == "q":
        raise Stopped
    note = "" if key == "r" else typer.prompt("note", default="", show_default=False, err=True)
    return Verdict(key == "s", note, key == "r")


def _key() -> str:
    import click

    return click.getchar().lower()


def _tell(standing: "Score") -> None:
    counts = f"X {standing.successes['a']}, Y {standing.successes['b']} of {standing.pairs}"
    typer.echo(f"{counts}; X - Y {100 * standing.difference:+.1f} points, exact 95 % interval {_span(standing.ci95)}", err=True)


def _span(interval: Any) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"

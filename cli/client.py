"""``vla client``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .output import print_json, print_table


def client(
    url: Annotated[str, typer.Argument(help="The server: ws://host:port or wss://host:port.")],
    world: Annotated[str | None, typer.Option(help="Drive a simulated world, such as cubes/lift-red.")] = None,
    episode: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Show recorded episodes; actions are compared with theirs.")
    ] = None,
    robot: Annotated[str | None, typer.Option(metavar="TYPE", help="Drive a robot of lerobot, such as so100_follower.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of the robot's configuration: port=/dev/ttyACM0; may be repeated.")
    ] = None,
    mapping: Annotated[str | None, typer.Option(help="Which cameras and numbers are which: a name in configs/robot, or a file.")] = None,
    instruction: Annotated[str, typer.Option(help="What a robot is to do.")] = "",
    mode: Annotated[
        Literal["auto", "sync", "async", "rtc", "ensemble"], typer.Option(help="Wait for answers (sync), or go on while they are computed.")
    ] = "auto",
    executed: Annotated[int | None, typer.Option(min=1, help="Actions executed between two questions.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Control rate in Hz, where it is not the body's own.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="After which an episode is ended.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first episode; the next have one more.")] = 1_000_000,
    latency: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="SECONDS", help="Let every answer take so long on a clock of its own: repeatable, not real time."),
    ] = None,
    guard: Annotated[bool, typer.Option(help="Keep the server's limits here too, where actions leave for the robot.")] = True,
    dry: Annotated[bool, typer.Option("--dry-run", help="Ask and check, and send nothing to the body.")] = False,
    dialect: Annotated[
        Literal["triune", "openpi"], typer.Option(help="openpi drives a peer's server; name --rate, --executed and the keys it wants.")
    ] = "triune",
    key: Annotated[
        list[str] | None, typer.Option(metavar="NAME=KEY", help="openpi: camera=key, state=key, prompt=key; may be repeated.")
    ] = None,
    jpeg: Annotated[int | None, typer.Option(min=1, max=95, help="Send pictures as JPEG of this quality; pixels unless given.")] = None,
    resize: Annotated[str | None, typer.Option(metavar="HxW", help="Scale pictures down to fit before they are sent.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File whose first line is the server's token; else TRIUNE_TOKEN.")] = None,
    ca: Annotated[str | None, typer.Option(help="Certificates to trust, for wss://.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Drive a world, a recorded episode or a robot with a served policy, at wall-clock rate: success, stalls, reaction time, smoothness."""
    from dataclasses import asdict
    from json import dumps

    from ..config import parse
    from ..data import Contract
    from ..data.files import write_file
    from ..errors import UserError
    from ..policies.remote import open_remote

    try:
        from ..eval.bodies import open_body
        from ..eval.live import Drive, Loop, drive, summary
    except ImportError as error:
        raise UserError(f"driving needs the client of action servers, which is not here ({error}): pip install triune-client") from None

    token = None if token_file is None else token_file.read_text().split("\n")[0].strip()
    size = None if resize is None else _size(resize)
    if dialect == "openpi":
        opened: Any = _openpi(url, token, rate, executed, key or [], size)
    else:
        opened = open_remote(url, token=token, ca=ca, jpeg=jpeg, resize=size).client
    with opened as link:
        like = parse(Contract, link.welcome.contract, f"the contract of {url}") if link.welcome.contract else None
        options = None if robot is None else {"type": robot} | open_options(option or [])
        body = open_body(world=world, episode=episode, robot=options, mapping=mapping, instruction=instruction, like=like)
        try:
            if like is not None:
                like.require(body.contract, "the served policy", body.name)
            loop = Loop(mode, executed, seconds, rate, guard, sends=not dry, latency=latency)

            def told(done: Drive) -> None:
                if not json:
                    typer.echo(_line(asdict(done)), err=True)

            report = summary(body, link, loop, drive(body, link, loop, range(seed, seed + episodes), told=told))
        finally:
            body.close()
    if out is not None:
        write_file(out, dumps(report, indent=1) + "\n")
    if json:
        print_json(report)
    else:
        total = report["total"]
        print_table(
            f"{report['body']} by {report['policy']}, {report['mode']}",
            ["what", "value"],
            [[key, _said(value)] for key, value in total.items()],
        )


def _openpi(url: str, token: str | None, rate: float | None, executed: int | None, keys: list[str], size: tuple[int, int] | None) -> Any:
    """A connection to a server of openpi's protocol, which says nothing of what it wants."""
    from triune_client.openpi import OpenpiClient

    from ..errors import UserError

    if rate is None or executed is None:
        raise UserError(
            "a server of openpi's protocol says neither its rate nor how much of a chunk to execute; name --rate and --executed"
        )
    named = dict(item.partition("=")[::2] for item in keys)
    if not all(named.values()):
        raise UserError("--key wants NAME=KEY; write, for example, --key agentview=observation/image --key state=observation/state")
    words: dict[str, Any] = {name: named.pop(name) for name in ("state", "prompt") if name in named}
    try:
        return OpenpiClient(url, rate, executed, named, token=token, resize=size, **words)
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise UserError(str(error)) from None


def _line(done: dict[str, Any]) -> str:
    """One episode in one line."""
    outcome = {True: "success", False: "failure", None: "done"}[done["success"]]
    reaction = done["reaction_ms"].get("p50")
    said = f"seed {done['seed']}: {outcome} in {done['seconds']:.1f} s, {done['executed']} actions, {done['stalls']} stalls"
    said += "" if reaction is None else f", reaction {reaction:.0f} ms"
    said += "" if not done["events"] else ", " + ", ".join(f"{count} {event}" for event, count in done["events"].items())
    return said + ("" if not done["problem"] else f"; {done['problem']}")


def _said(value: object) -> object:
    return " to ".join(f"{v:.3g}" for v in value) if isinstance(value, list) else value


def _size(text: str) -> tuple[int, int]:
    from ..errors import UserError

    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--resize {text} is not HEIGHTxWIDTH in pixels; write, for example, 224x224")
    return int(sides[0]), int(sides[1])


def open_options(items: list[str]) -> dict[str, Any]:
    """``a.b=c`` of a robot's configuration as a tree."""
    import yaml

    from ..config import merge
    from ..errors import UserError

    tree: dict[str, Any] = {}
    for item in items:
        key, found, text = item.partition("=")
        if not found or not key:
            raise UserError(f"--option {item} is not KEY=VALUE; write, for example, --option port=/dev/ttyACM0")
        node: Any = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            node = {part: node}
        tree = merge(tree, node)
    return tree

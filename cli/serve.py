"""``vla serve``."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def serve(
    policy: Annotated[str, typer.Option(help="Checkpoint or run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any value of a serve config: batch=4.")] = None,
    config: Annotated[str | None, typer.Option(help="A name in configs/serve, or a path to a YAML file.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; other than loopback needs a token.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    harness_port: Annotated[int | None, typer.Option(help="Port for vla-evaluation-harness, which has no path.")] = None,
    groot_port: Annotated[int | None, typer.Option(help="Port for clients of GR00T (ZeroMQ).")] = None,
    allow_plain_zmq: Annotated[bool, typer.Option("--allow-plain-zmq", help="Speak ZeroMQ unencrypted to other machines.")] = False,
    token_file: Annotated[Path | None, typer.Option(help="File whose first line is the secret that clients send.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    precision: Annotated[str, typer.Option(help="What the weights are held in: auto, fp32, bf16.")] = "auto",
    record: Annotated[
        Path | None, typer.Option(help="Folder of the flight recorder: what happened before a fault, for vla replay.")
    ] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Show cameras, foresight, actions and timing in a rerun viewer.")] = False,
    rerun_save: Annotated[Path | None, typer.Option(help="The same into an .rrd file.")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON, one object per line.")] = False,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="What is logged; debug: every answer.")] = "info",
) -> None:
    """Serve a policy to robots and simulators; the port opens when it is loaded and warm."""
    import asyncio
    import logging

    from ..config import find, load_tree, parse
    from ..errors import UserError

    try:
        from ..policies.serve import Serve, Server, Source
        from ..policies.serve.logs import set_up
    except ImportError as error:
        raise UserError(f"serving needs packages that are not here ({error}): pip install 'triune-vla[serve]'") from None

    ports = {"port": port, "harness_port": harness_port, "groot_port": groot_port, "allow_plain_zmq": allow_plain_zmq or None}
    given = {"host": host, **ports, "token_file": token_file, "tls_cert": tls_cert, "tls_key": tls_key}
    given |= {"record.dir": record, "rerun.save": rerun_save, "rerun.spawn": "true" if rerun else None}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    tree = load_tree(find(config or "local", "serve"), [*(overrides or []), *flags])
    settings = parse(Serve, tree, config or "vla serve")
    set_up(log_json, log_level)
    source = Source("triune.policies:open_policy", {"path": policy, "precision": precision}, settings.batch)

    async def run() -> None:
        server = Server.of(settings, source, Path(policy).name)
        await server.start()
        logging.info("%s is served at %s", policy, server.url)
        await server.run()
        logging.info("stopped; what was asked was answered")

    asyncio.run(run())

"""``vla verify``."""

import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .output import print_json, print_table


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run's folder.")],
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="What the weights are held in; auto as in other commands.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Prove that a checkpoint acts as it was trained: files by their hashes, actions by its golden observations, asked in this process
    and again through the server that robots would ask."""
    from ..policies import load_policy
    from ..policies.checkpoint import read_checkpoint
    from ..policies.checkpoint import verify as run

    found = read_checkpoint(checkpoint)
    policy = load_policy(str(found.folder), precision=precision)
    rows = [{"asked": "here"} | asdict(row) for row in run(found, policy, policy.dtype)]
    if find_spec("triune_client") is None:
        print("what is served was not asked: pip install 'triune-vla[serve]'", file=sys.stderr)
    else:
        rows += [{"asked": "through the server"} | asdict(row) for row in _served(found, precision, policy.dtype)]
    passed = all(row["passed"] for row in rows)
    if json:
        print_json({"checkpoint": str(checkpoint), "files": len(found.manifest.files), "rows": rows, "passed": passed})
    else:
        print_table("Golden observations", list(rows[0]), [list(row.values()) for row in rows])
    if not passed:
        sys.exit(1)


def _served(found: Any, precision: str, dtype: Any) -> Any:
    """The golden rows of the same checkpoint behind a server of its own, whose guard is off."""
    from ..policies.checkpoint import verify
    from ..policies.remote import open_remote
    from ..policies.serve import Serve, Source
    from ..policies.serve.local import serving

    source = Source("triune.policies:load_policy", {"path": str(found.folder), "precision": precision})
    with serving(source, found.folder.name, Serve(port=0, limits=False)) as server:
        remote = open_remote(server.url)
        try:
            return verify(found, remote, dtype)
        finally:
            remote.disconnect()

"""How tests speak to a server in the protocols of others."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
from triune_client.wire import pack, unpack
from websockets.asyncio.client import ClientConnection

import triune

from .fakes import expected
from .golden import said

HERE = Path(__file__).parent
PEERS = Path(triune.__file__).parent / ".venv-peers" / "bin" / "python"
IMAGES = {name: said.picture(i) for i, name in enumerate(said.CAMERAS)}


def answered(seed: int, step: int, state: np.ndarray | None = None, images: dict[str, np.ndarray] = IMAGES) -> np.ndarray:
    """The actions of the fake policy for what ``said`` says."""
    return expected(seed, step, (said.state() if state is None else state).astype(np.float32), images)


async def run_peer(script: str, url: str) -> dict[str, Any]:
    """What a script in ``peers`` prints, run by the interpreter that has the peers' packages."""
    assert PEERS.exists(), "the peers' own clients are not here: make venv builds .venv-peers"
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(PEERS, HERE / "peers" / script, url, **pipes)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = json.loads(out)
    return found


async def ask(socket: ClientConnection, message: Any) -> Any:
    """The answer to a message, or to a frame: text, or a message."""
    await socket.send(message if isinstance(message, bytes) else pack(message))
    answer = await socket.recv()
    return answer if isinstance(answer, str) else unpack(answer)

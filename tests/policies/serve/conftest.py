"""A server of a fake policy in this process's event loop, and the means to speak to it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("websockets")

from triune.policies.serve import Serve, Server, Service, Source

HERE = Path(__file__).parent


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's process finds ``fakes``."""
    import os

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))


def served(
    work: Callable[[Server], Awaitable[None]], *, batch: int = 8, service: dict[str, Any] | None = None, policy: str = "Fake", **made: Any
) -> Callable[..., None]:
    """Runs ``work`` with a running server of a fake policy made of ``made``; gives a function of the server's settings."""

    def run(**settings: Any) -> None:
        async def main() -> None:
            behind = Service(Source(f"fakes:{policy}", made, batch), **(service or {}))
            server = Server(Serve(port=0, batch=batch, **settings), behind, "fake")
            await server.start()
            try:
                await asyncio.wait_for(work(server), timeout=60)
            finally:
                await server.stop()

        asyncio.run(main())

    return run


def seen(seed: int = 0, instruction: str = "lift", size: int = 224) -> dict[str, Any]:
    """An observation as the wire carries it."""
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 255, (size, size, 3), np.uint8) for name in ("agentview", "wrist")}
    return {"images": images, "state": rng.standard_normal(8).astype(np.float32), "instruction": instruction, "timestamp": 0.25}

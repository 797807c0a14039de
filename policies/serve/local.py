"""A server in a thread of this process, for who wants to ask a policy the way its clients will: verification, benchmarks, tests."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .config import Serve
from .process import Source
from .server import Server


@contextmanager
def serving(source: Source, name: str, settings: Serve | None = None) -> Iterator[Server]:
    """A running server on this machine's loopback and a free port, unless ``settings`` say otherwise; no process stands by.

    Raises:
        UserError: the policy cannot be loaded.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    def run(work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result()  # type: ignore[arg-type]

    try:
        server = Server.of((settings or Serve(port=0)).model_copy(update={"standby": False}), source, name)
        run(server.start())
        try:
            yield server
        finally:
            run(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

"""A server of a fake policy in a process of its own, so that its memory, files and log can be looked at from outside.

As a program: ``python standing.py '{"serve": {...}, "service": {...}, "made": {...}, "policy": "fakes:Fake"}'``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEM = HERE.parents[1] / "client" / "tls.pem"


class Standing:
    """A running server; ``log`` is the file that it writes its log to."""

    def __init__(self, log: Path, *, policy: str = "fakes:Fake", service: dict[str, Any] | None = None, made: Any = None, **serve: Any):
        told = {"serve": {"port": 0} | serve, "service": service or {}, "made": made or {}, "policy": policy}
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.log = log
        self.token: str | None = None if "token_file" not in serve else Path(serve["token_file"]).read_text().strip()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), json.dumps(told)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdout=subprocess.PIPE,
                stderr=file,
            )
        assert self.process.stdout is not None
        with self.process.stdout as said:
            first = said.readline()
        assert first, log.read_text()
        self.port = int(first)
        self.scheme = "wss" if "tls_cert" in serve else "ws"

    def __enter__(self) -> "Standing":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(timeout=30) == 0, self.log.read_text()
        finally:
            self.process.kill()

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    def state(self) -> dict[str, Any]:
        """What the server holds: tasks, sessions, connections, sockets, requests."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/state", timeout=10) as answer:
            got: dict[str, Any] = json.load(answer)
        return got

    def settled(self, seconds: float = 10.0, **wanted: int) -> dict[str, Any]:
        """The state, once it is what is wanted."""
        until = time.monotonic() + seconds
        while not wanted.items() <= (state := self.state()).items():
            assert time.monotonic() < until, f"{wanted} wanted, still {state}"
            time.sleep(0.05)
        return state

    @property
    def worker(self) -> int:
        """Number of the policy's process."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def socket(self, address: str = "127.0.0.1", buffer: int | None = None) -> socket.socket:
        """A bare socket to the server, from ``address``, for which the kernel keeps ``buffer`` bytes that were not read.

        That is said before it connects: a window that shrinks later makes the kernel drop what confirms our own bytes.

        Raises:
            ConnectionResetError: the server ended it at once, which this side may hear while it still connects.
        """
        bare = socket.socket()
        bare.settimeout(10)
        if buffer is not None:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        try:
            bare.bind((address, 0))
            bare.connect(("127.0.0.1", self.port))
        except OSError:
            bare.close()
            raise
        return bare


def rss(pid: int) -> float:
    """MiB of memory that process ``pid`` holds."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def files(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> None:
    import asyncio
    import gc
    import logging

    from triune.policies.serve import Serve, Server, Service, Source

    told = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")

    async def run() -> None:
        service = Service(Source(told["policy"], told["made"]), **told["service"])
        server = Server(Serve(**told["serve"]), service, "fake")

        def state() -> tuple[int, str, bytes]:
            held = {"waiting": len(service.waiting), "held": service.held, "sessions": len(service.sessions)}
            held |= {"connections": server.connections.total(), "sockets": server.room.taken.total() - 1}  # without the one that asks
            held |= {"groot_port": server.port_of("groot_port") if server.config.groot_port is not None else 0}
            gc.collect()
            held |= {"tasks": len(asyncio.all_tasks()), "ready": int(service.ready), "objects": len(gc.get_objects())}
            return 200, "application/json", json.dumps(held).encode()

        server.pages["/state"] = state
        await server.start()
        print(server.port, flush=True)
        await server.run()

    asyncio.run(run())


if __name__ == "__main__":
    main()

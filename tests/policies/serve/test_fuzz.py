"""Mutated frames over every dialect: each is answered, or ends its connection; nothing else happens.

A dialect is one line of ``SPOKEN``. In memory, frames that reach new lines of the server are kept and changed further; over sockets the
process of the server is watched from outside.
"""

import asyncio
import base64
import contextlib
import json
import random
import resource
import socket
import struct
import time
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triune_client.wire
from triune_client import Client, outofband
from triune_client.outofband import pack_parts
from triune_client.wire import EncodedImage, Limits, WireError, pack, unpack
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from triune.data import Contract
from triune.policies.base import Request
from triune.policies.serve import keys as keys_module
from triune.policies.serve import line as line_module
from triune.policies.serve import security, zmtp
from triune.policies.serve.dialects import groot, harness, openpi
from triune.policies.serve.dialects import triune as native
from triune.policies.serve.exchange import Refusal, Reply
from triune.policies.serve.keys import Keys
from triune.policies.serve.line import Connection, Line
from triune.policies.serve.security import Rate, Token

from .conftest import seen
from .fakes import Fake, expected
from .golden import said as peers
from .mutants import Mutator, new_lines
from .standing import Standing, rss

FRAMES = {k: base64.b64decode(v) for k, v in json.loads(Path(peers.__file__).with_name("dialects.json").read_text())["frames"].items()}
SMALL = Limits(frame=1 << 20, array=1 << 18)
PICTURE = EncodedImage(bytes(192), "raw", (8, 8, 3))


@dataclass(frozen=True)
class Spoken:
    """A dialect under test.

    Attributes:
        prelude: frames that come before the mutants; valid: frames to change.
        greets: whether the server speaks first; silent: whether some frames have no answer. Then a ``hello`` follows each, which has.
        url: of the server, for a client of this dialect.
    """

    name: str
    module: Any
    prelude: tuple[bytes, ...]
    valid: tuple[bytes, ...]
    url: str
    greets: bool = False
    silent: bool = False


def _native() -> Spoken:
    hello = {"type": "hello", "id": 0, "protocol": 1, "client": "test", "contract": Fake(size=8).contract.model_dump(mode="json")}
    reset = {"type": "reset", "id": 1, "session": "a", "seed": 5}
    infer = {"type": "infer", "id": 2, "session": "a", "observation": seen(size=8), "deadline": 5.0, "foresight": True}
    settled = infer | {"prefix": np.zeros((4, 32), np.float32), "delay": 2, "samples": 1}
    encoded = infer | {"observation": seen(size=8) | {"images": {"agentview": PICTURE, "wrist": PICTURE}}}
    end = {"type": "end", "id": 3, "session": "a"}
    first, others = (pack(hello), pack(reset)), (infer, settled, encoded, end)
    behind = [b"".join(pack_parts(message)) for message in (infer, settled, encoded)]
    return Spoken("native", native, first, (*first, *map(pack, others), *behind), "{ws}/v1")


def _golden(*names: str) -> tuple[bytes, ...]:
    """What the peers' own clients sent, see ``golden``."""
    return tuple(frame for name, frame in FRAMES.items() if name.startswith(names) and "answer" not in name)


SPOKEN = [
    _native(),
    Spoken("openpi", openpi, (), _golden("openpi", "starvla"), "{ws}/", greets=True),
    Spoken("harness", harness, _golden("harness hello", "harness start"), _golden("harness"), "{ws}/harness", silent=True),
    Spoken("groot", groot, (), _golden("n1.5", "n1.6", "n1.7"), "tcp"),
]
EVERY = pytest.mark.parametrize("spoken", SPOKEN, ids=[spoken.name for spoken in SPOKEN])
COUNTS = pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=[pytest.mark.slow])])


class Scripted(Connection):
    """A connection whose frames are given and whose answers are kept."""

    def __init__(self) -> None:
        self.hungry = asyncio.Event()
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.hungry.set()
            yield await self.frames.get()

    async def send(self, frame: bytes | str) -> None:
        await self.answers.put(frame.encode() if isinstance(frame, str) else frame)


class Thoughtless:
    """What a dialect asks a service, answered without a policy."""

    introduction: dict[str, Any] = {}

    def __init__(self) -> None:
        self.contract: Contract = Fake(size=8).contract
        self.sessions: dict[str, int] = {}

    async def reset(self, session: str, seed: int) -> None:
        self.sessions[session] = seed

    async def close(self, session: str) -> None:
        self.sessions.pop(session, None)

    def refused(self, refusal: Refusal, client: str) -> None:
        """Nobody listens."""

    async def plan(self, request: Request, deadline: float | None = None, foresight: bool = False) -> Reply:
        if request.session not in self.sessions:
            raise Refusal("bad_request", "no such session")
        pack({"state": request.observation.state, "images": request.observation.images, "instruction": request.observation.instruction})
        return Reply(np.zeros((50, 32), np.float32), 50.0, request.observation.timestamp, {"turn": 0.0})

    def ask(
        self, request: Request, answered: Callable[[Reply | Refusal], None], deadline: float | None = None, foresight: bool = False
    ) -> None:
        """An answer at once."""
        try:
            self.plan(request).send(None)
        except Refusal as refusal:
            answered(refusal)
        except StopIteration as done:
            answered(done.value)


async def _exchange(spoken: Spoken, mutator: Mutator, count: int, fresh: Callable[[], int]) -> dict[str, float]:
    """Speak ``count`` mutants in memory. Gives the longest exchange in seconds, and connections that it took."""
    said, longest, service, connections = 0, 0.0, Thoughtless(), 0
    welcome = {"protocol": 1, "server": "here", "policy": "fake"}
    while said < count:
        connections += 1
        connection: Any = Scripted()
        line = Line(connection, f"c{connections}", "here", 0, SMALL, Rate(1e9, 1e9), Token(None), Keys())
        speaking = asyncio.ensure_future(spoken.module.speak(line, service, welcome))

        async def said_and_done(frame: bytes, connection: Any = connection) -> bytes:
            """An answer to a frame, empty where there is none to expect."""
            await connection.hungry.wait()
            connection.hungry.clear()
            connection.frames.put_nowait(frame)
            if not spoken.silent:
                return await connection.answers.get()
            await connection.hungry.wait()
            return b"".join(connection.answers.get_nowait() for _ in range(connection.answers.qsize()))

        if spoken.greets:
            await connection.answers.get()
        for frame in spoken.prelude:
            assert b"error" not in await said_and_done(frame)
        while said < count and not speaking.done():
            frame, said = next(mutator), said + 1
            began = time.perf_counter()
            answer = asyncio.ensure_future(said_and_done(frame))
            await asyncio.wait({answer, speaking}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
            assert answer.done() or speaking.done(), f"no answer to {frame.hex()}"
            if speaking.done() and (defect := speaking.exception()) is not None:
                raise AssertionError(f"{frame.hex()} ends the server's part") from defect
            longest = max(longest, time.perf_counter() - began)
            if answer.done():
                assert b"Traceback" not in answer.result() and b".py" not in answer.result(), frame.hex()
            answer.cancel()
            if fresh():
                mutator.keep(frame)
        speaking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await speaking
        assert not service.sessions
    return {"longest": longest, "connections": connections}


@EVERY
@COUNTS
def test_in_memory_every_mutant_is_answered_or_ends_its_connection(spoken: Spoken, count: int) -> None:
    mutator = Mutator(list(spoken.valid), seed=1)
    with new_lines([spoken.module, triune_client.wire, outofband, line_module, keys_module, security]) as fresh, warnings.catch_warnings():
        warnings.simplefilter("error")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        got = asyncio.run(_exchange(spoken, mutator, count, fresh))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{spoken.name}: {count} mutants, {got['connections']:.0f} connections, {len(mutator.corpus) - len(spoken.valid)} kept, "
        f"longest {1e3 * got['longest']:.0f} ms, memory + {grown:.0f} MiB"
    )
    assert got["longest"] < 5 and grown < 200
    assert len(mutator.corpus) > len(spoken.valid) + 5, "watching for new lines finds none"


@COUNTS
def test_unpack_gives_a_message_or_a_wire_error(count: int) -> None:
    mutator = Mutator([frame for spoken in SPOKEN for frame in spoken.valid], seed=2)
    longest, read = 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with new_lines([triune_client.wire, outofband]) as fresh:
        for _ in range(2 * count):
            frame = next(mutator)
            began = time.perf_counter()
            with contextlib.suppress(WireError):
                (outofband.unpack if outofband.is_out_of_band(frame) else unpack)(frame, SMALL)
                read += 1
            longest = max(longest, time.perf_counter() - began)
            if fresh():
                mutator.keep(frame)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert 0.1 < read / (2 * count) < 0.9, "mutants are all right or all wrong"
    assert longest < 2 and grown < 100


class Websocket:
    """A client of ``spoken`` over a socket."""

    def __init__(self, spoken: Spoken, server: Standing) -> None:
        self.spoken, self.probes = spoken, 0
        self.socket = connect(spoken.url.format(ws=server.url), compression=None, max_size=None)
        if spoken.greets:
            self.socket.recv(timeout=30)

    def exchange(self, frame: bytes) -> None:
        """Send a frame and wait for what shows that the server is done with it.

        Raises:
            ConnectionClosed: the server has closed.
        """
        self.socket.send(frame)
        if not self.spoken.silent:
            self.socket.recv(timeout=30)
            return
        self.probes += 1
        self.socket.send(pack({"type": "hello", "payload": {}, "seq": 2**40 + self.probes, "timestamp": 0.0}))
        while unpack(self.socket.recv(timeout=30))["seq"] != 2**40 + self.probes:
            pass

    def close(self) -> None:
        self.socket.close()


class Zeromq:
    """The same for GR00T, with ZMTP by hand."""

    def __init__(self, spoken: Spoken, server: Standing) -> None:
        port = server.state()["groot_port"]
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
        self.socket.sendall(zmtp.GREETING + bytes([zmtp.COMMAND, len(ready)]) + ready)
        self.read(64)
        self._frame()

    def read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = self.socket.recv(size - len(got))
            if not more:
                raise ConnectionResetError
            got += more
        return got

    def exchange(self, frame: bytes) -> None:
        self.socket.sendall(b"\x01\x00" + struct.pack(">BQ", zmtp.LONG, len(frame)) + frame)
        self._frame()
        self._frame()

    def close(self) -> None:
        self.socket.sendall(random.Random(5).randbytes(50))  # no frame at all
        self.socket.close()

    def _frame(self) -> bytes:
        flags = self.read(1)[0]
        return self.read(int.from_bytes(self.read(8 if flags & zmtp.LONG else 1), "big"))


@EVERY
@COUNTS
def test_a_server_outlives_mutants(spoken: Spoken, count: int, tmp_path: Path) -> None:
    mutator = Mutator(list(spoken.valid), seed=3)
    observation = seen(size=8)
    with Standing(tmp_path / "log", rate=1e9, made={"size": 8}, frame_mib=1, groot_port=0) as server, Client(server.url) as honest:
        pids = server.process.pid, server.worker
        before = [rss(pid) for pid in pids]
        said = opened = 0
        while said < count:
            opened += 1
            talking = Zeromq(spoken, server) if spoken.url == "tcp" else Websocket(spoken, server)
            with contextlib.suppress(ConnectionClosed, ConnectionError), contextlib.closing(talking):
                for frame in spoken.prelude:
                    talking.exchange(frame)
                while said < count:
                    said += 1
                    talking.exchange(next(mutator))
                    if said % 250 == 0:
                        honest.reset(seed=said)
                        right = expected(said, 0, observation["state"], observation["images"])
                        np.testing.assert_array_equal(honest.infer(observation).actions, right)
        grown = [rss(pid) - was for pid, was in zip(pids, before, strict=True)]
        print(f"{spoken.name}: {said} mutants, {opened} connections, memory of server and policy + {grown[0]:.0f}, {grown[1]:.0f} MiB")
        assert max(grown) < 150 and server.worker == pids[1]
        assert server.settled(connections=1)["sessions"] == 1  # the honest client's
    log = (tmp_path / "log").read_text()
    assert "connection handler failed" not in log and "a turn failed" not in log, log[-3000:]

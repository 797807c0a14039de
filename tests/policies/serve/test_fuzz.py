"""Mutated frames over every dialect: each is answered, or ends its connection; nothing else happens.

A dialect is one line of ``SPOKEN``. In memory, frames that reach new lines of the server are kept and changed further; over sockets the
process of the server is watched from outside.
"""

import asyncio
import contextlib
import resource
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triune_client.wire
from triune_client import Client
from triune_client.wire import EncodedImage, Limits, WireError, pack, unpack
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from triune.data import Contract
from triune.policies.base import Request
from triune.policies.serve import line as line_module
from triune.policies.serve import security
from triune.policies.serve.dialects import triune as native
from triune.policies.serve.line import Line
from triune.policies.serve.security import Rate
from triune.policies.serve.service import Refusal, Reply

from .conftest import seen
from .fakes import Fake, expected
from .mutants import Mutator, new_lines
from .standing import Standing, rss

SMALL = Limits(frame=1 << 20, array=1 << 18)
PICTURE = EncodedImage(bytes(192), "raw", (8, 8, 3))


@dataclass(frozen=True)
class Spoken:
    """A dialect under test.

    Attributes:
        speak: what serves a connection; module: where that is written.
        prelude: frames that are answered before the mutants come; valid: frames to change.
        greets: frames that the server sends first.
    """

    path: str
    speak: Callable[[Line, Any, dict[str, Any]], Awaitable[None]]
    module: Any
    prelude: tuple[bytes, ...]
    valid: tuple[bytes, ...]
    greets: int = 0


def _native() -> Spoken:
    hello = {"type": "hello", "id": 0, "protocol": 1, "client": "test", "contract": Fake(size=8).contract.model_dump(mode="json")}
    reset = {"type": "reset", "id": 1, "session": "a", "seed": 5}
    infer = {"type": "infer", "id": 2, "session": "a", "observation": seen(size=8), "deadline": 5.0, "foresight": True}
    settled = infer | {"prefix": np.zeros((4, 32), np.float32), "delay": 2, "samples": 1}
    encoded = infer | {"observation": seen(size=8) | {"images": {"agentview": PICTURE, "wrist": PICTURE}}}
    end = {"type": "end", "id": 3, "session": "a"}
    first = (pack(hello), pack(reset))
    return Spoken("/v1", native.speak, native, first, (*first, *map(pack, (infer, settled, encoded, end))))


SPOKEN = [_native()]
EVERY = pytest.mark.parametrize("spoken", SPOKEN, ids=[spoken.path for spoken in SPOKEN])
COUNTS = pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=[pytest.mark.slow])])


class Scripted:
    """A connection whose frames are given and whose answers are kept."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def recv_streaming(self) -> AsyncIterator[bytes]:
        yield await self.frames.get()

    async def send(self, frame: bytes) -> None:
        await self.answers.put(frame)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        pass


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

    async def plan(self, request: Request, deadline: float | None = None, foresight: bool = False) -> Reply:
        if request.session not in self.sessions:
            raise Refusal("bad_request", "no such session")
        pack({"state": request.observation.state, "images": request.observation.images, "instruction": request.observation.instruction})
        return Reply(np.zeros((50, 32), np.float32), 50.0, request.observation.timestamp, {})


async def _exchange(spoken: Spoken, mutator: Mutator, count: int, fresh: Callable[[], int]) -> dict[str, float]:
    """Speak ``count`` mutants in memory. Gives the longest exchange in seconds, connections that it took, and frames that were kept."""
    said, longest, service = 0, 0.0, Thoughtless()
    connections = 0
    while said < count:
        connections += 1
        connection: Any = Scripted()
        line = Line(connection, f"c{connections}", "here", 0, SMALL, Rate(1e9, 1e9))
        speaking = asyncio.ensure_future(spoken.speak(line, service, {"protocol": 1}))
        for _ in range(spoken.greets):
            await connection.answers.get()
        for frame in spoken.prelude:
            connection.frames.put_nowait(frame)
            assert "error" not in str(unpack(await connection.answers.get()).get("type"))
        while said < count and not speaking.done():
            frame, said = next(mutator), said + 1
            began = time.perf_counter()
            connection.frames.put_nowait(frame)
            answer = asyncio.ensure_future(connection.answers.get())
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
    with new_lines([spoken.module, triune_client.wire, line_module, security]) as fresh, warnings.catch_warnings():
        warnings.simplefilter("error")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        got = asyncio.run(_exchange(spoken, mutator, count, fresh))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{spoken.path}: {count} mutants, {got['connections']:.0f} connections, {len(mutator.corpus) - len(spoken.valid)} kept, "
        f"longest {1e3 * got['longest']:.0f} ms, memory + {grown:.0f} MiB"
    )
    assert got["longest"] < 5 and grown < 200
    assert len(mutator.corpus) > len(spoken.valid) + 5, "watching for new lines finds none"


@COUNTS
def test_unpack_gives_a_message_or_a_wire_error(count: int) -> None:
    mutator = Mutator([frame for spoken in SPOKEN for frame in spoken.valid], seed=2)
    longest, read = 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with new_lines([triune_client.wire]) as fresh:
        for _ in range(2 * count):
            frame = next(mutator)
            began = time.perf_counter()
            with contextlib.suppress(WireError):
                unpack(frame, SMALL)
                read += 1
            longest = max(longest, time.perf_counter() - began)
            if fresh():
                mutator.keep(frame)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert 0.1 < read / (2 * count) < 0.9, "mutants are all right or all wrong"
    assert longest < 2 and grown < 100


@EVERY
@COUNTS
def test_a_server_outlives_mutants(spoken: Spoken, count: int, tmp_path: Path) -> None:
    mutator = Mutator(list(spoken.valid), seed=3)
    observation = seen(size=8)
    with Standing(tmp_path / "log", rate=1e9, made={"size": 8}, frame_mib=1) as server, Client(server.url) as honest:
        pids = server.process.pid, server.worker
        before = [rss(pid) for pid in pids]
        said = opened = 0
        while said < count:
            opened += 1
            with contextlib.suppress(ConnectionClosed), connect(server.url + spoken.path, compression=None, max_size=None) as socket:
                for _ in range(spoken.greets):
                    socket.recv(timeout=30)
                for frame in spoken.prelude:
                    socket.send(frame)
                    socket.recv(timeout=30)
                while said < count:
                    said += 1
                    socket.send(next(mutator))
                    socket.recv(timeout=30)  # an answer, or the connection's end
                    if said % 250 == 0:
                        honest.reset(seed=said)
                        right = expected(said, 0, observation["state"], observation["images"])
                        np.testing.assert_array_equal(honest.infer(observation).actions, right)
        grown = [rss(pid) - was for pid, was in zip(pids, before, strict=True)]
        print(f"{spoken.path}: {said} mutants, {opened} connections, memory of server and policy + {grown[0]:.0f}, {grown[1]:.0f} MiB")
        assert max(grown) < 150 and server.worker == pids[1]
        assert server.settled(connections=1)["sessions"] == 1  # the honest client's
    log = (tmp_path / "log").read_text()
    assert "connection handler failed" not in log and "a turn failed" not in log, log[-3000:]

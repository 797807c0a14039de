"""The client's websocket beside the library's own server: every message arrives as it was sent, whatever its size and its way."""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triune_client.websocket import WebSocket, mask
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

PEM = str(Path(__file__).parent / "tls.pem")
SIZES = (1, 3, 125, 126, 127, 65535, 65536, 300_001, 3_000_000)


class Echo:
    """Sends back what comes; some texts mean something else."""

    def __init__(self, secure: bool) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(PEM)
        self.pings: list[float] = []
        self._up, self._over = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(context if secure else None),))
        self._thread.start()
        self._up.wait(10)

    async def _run(self, context: ssl.SSLContext | None) -> None:
        self._loop = asyncio.get_running_loop()
        async with serve(self._echo, "127.0.0.1", 0, ssl=context, max_size=None, compression=None, ping_interval=None) as server:
            self.url = f"{'wss' if context else 'ws'}://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            self._up.set()
            await self._over.wait()

    async def _echo(self, connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):  # some are cut
            async for message in connection:
                assert isinstance(message, bytes)
                await self._answer(connection, message)

    async def _answer(self, connection: ServerConnection, message: bytes) -> None:
        if message == b"in parts":
            await connection.send(iter([b"a", b"", b"bc", bytes(70_000)]))
        elif message == b"text":
            await connection.send("words")
        elif message == b"ping":
            await (await connection.ping())
            await connection.send(b"pong came")
        elif message == b"close":
            await connection.close(4000, "enough")
        elif message == b"cut":
            connection.transport.abort()
        else:
            await connection.send(message)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)


@pytest.fixture(scope="module", params=["ws", "wss"])
def echo(request: Any) -> Iterator[Echo]:
    server = Echo(request.param == "wss")
    yield server
    server.stop()


@pytest.fixture
def socket(echo: Echo) -> Iterator[WebSocket]:
    context = ssl.create_default_context(cafile=PEM) if echo.url.startswith("wss") else None
    made = WebSocket(echo.url, {}, context, wait=5, stuck=5, limit=1 << 22)
    yield made
    made.goodbye()
    made.last(5)
    made.close()


def said(socket: WebSocket, *parts: bytes) -> str | bytes:
    socket.send(parts)
    return socket.first(5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_messages_come_back_as_they_were(socket: WebSocket, size: int, masked: bool) -> None:
    socket._plain = not masked  # as over a network
    message = np.random.default_rng(size).bytes(size)
    cuts = sorted({0, size, *np.random.default_rng(0).integers(0, size, 3).tolist()})
    parts = [message[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert said(socket, *parts) == message
    assert said(socket, *map(memoryview, parts)) == message


def test_more_parts_than_the_system_takes_at_once(socket: WebSocket) -> None:
    assert said(socket, *[b"%d" % i for i in range(3000)]) == b"".join(b"%d" % i for i in range(3000))


def test_parts_texts_and_pings(socket: WebSocket) -> None:
    assert said(socket, b"in parts") == b"abc" + bytes(70_000)
    assert said(socket, b"text") == "words"
    assert said(socket, b"ping") == b"pong came"


def test_many_threads_send_and_one_receives(socket: WebSocket) -> None:
    messages = [bytes([i]) * (1000 * i + 1) for i in range(60)]
    with ThreadPoolExecutor(8) as threads:
        done = [threads.submit(socket.send, [message[:7], message[7:]]) for message in messages]
        came = []
        while len(came) < len(messages):
            came += socket.receive(5)
        assert all(one.result() is None for one in done)
    assert sorted(came) == sorted(messages)


def test_nothing_comes(socket: WebSocket) -> None:
    for patience in (0.0, 0.05):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            socket.receive(patience)
        assert patience <= time.monotonic() - began + 0.01 < patience + 1
    assert said(socket, b"still there") == b"still there"


@pytest.mark.parametrize(("word", "why"), [(b"close", "^4000 enough$"), (b"cut", "without a word"), (bytes(5 << 20), "broke the protocol")])
def test_the_end_has_a_reason(socket: WebSocket, word: bytes, why: str) -> None:
    """The last is answered with more than the limit."""
    socket.send([word])
    with pytest.raises(ConnectionError, match=why):
        socket.first(5)
    with pytest.raises(ConnectionError, match=why):
        socket.send([b"more"])


def test_ending_wakes_who_receives(socket: WebSocket) -> None:
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(socket.receive, 30)
        time.sleep(0.1)
        socket.end()
        assert waits.result(5) == []  # and the next call says why
    with pytest.raises(ConnectionError):
        socket.receive(5)


@pytest.mark.parametrize("size", range(10))
def test_mask(size: int) -> None:
    data, key = np.arange(size, dtype=np.uint8), b"\x01\x80\x00\xff"
    masked = data.copy()
    mask(masked, key)
    assert masked.tolist() == [value ^ key[i % 4] for i, value in enumerate(data.tolist())]

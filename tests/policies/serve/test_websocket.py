"""The server's websocket: what is read past the library's parser is what the parser would have read."""

import asyncio
import os
import random
import struct
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triune_client.websocket import header
from websockets.asyncio.server import serve
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

import triune
from triune.policies.serve.security import DESK, Room
from triune.policies.serve.websocket import ALIGNED, WAITING, Bounded

SIZES = (0, 1, 125, 126, 127, 300, DESK - 20, DESK - 14, DESK, DESK + 1, 65535, 65536, 200_000)
LIMIT = 1 << 19
ROOT = Path(triune.__file__).parent
Work = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def frame(data: bytes, key: bytes, opcode: Opcode = Opcode.BINARY, fin: bool = True) -> bytes:
    """As a client sends it."""
    head = bytes([0x80 * fin | opcode]) + header(len(data), masked=True)[1:]
    return head + key + bytes(b ^ key[i % 4] for i, b in enumerate(data))


def conversation(seed: int) -> tuple[list[bytes], list[bytes | str]]:
    """Frames in an order that a client may choose, and the messages that they are."""
    dice = random.Random(seed)
    sent, meant = list[bytes](), list[bytes | str]()
    for _ in range(12):
        key, data = dice.choice((bytes(4), dice.randbytes(4))), dice.randbytes(dice.choice(SIZES))
        kind = dice.choice(("whole", "whole", "whole", "parts", "text", "ping"))
        if kind == "whole":
            sent.append(frame(data, key))
            meant.append(data)
        elif kind == "text":
            sent.append(frame(data.hex().encode(), key, Opcode.TEXT))
            meant.append(data.hex())
        elif kind == "ping":
            sent.append(frame(data[:100], key, Opcode.PING))
        else:
            cut = dice.randint(0, len(data))
            sent += [frame(data[:cut], key, fin=False), frame(b"between", key, Opcode.PING), frame(data[cut:], key, Opcode.CONT)]
            meant.append(data)
    return sent, meant


def pieces(sent: list[bytes], how: str, dice: random.Random) -> Iterator[bytes]:
    """The frames as they may arrive."""
    if how == "frame by frame":
        yield from sent
        return
    data = b"".join(sent)
    while data:
        size = len(data) if how == "at once" else dice.choice((1, 2, 5, 13, 14, 15, 1000, DESK, 50_000))
        yield data[:size]
        data = data[size:]


async def talk(
    work: Work, slow: float = 0.0, waited: list[int] | None = None, listens: Callable[[Any], Awaitable[None]] | None = None
) -> list[bytes | str]:
    """What a server heard of what ``work`` sent after the handshake. ``waited`` gets how many more messages waited beside each;
    ``listens`` hears instead."""
    heard, over = list[bytes | str](), asyncio.Event()

    async def listen(connection: Any) -> None:
        if listens is not None:
            await listens(connection)
            over.set()
            return
        async for message in connection:
            heard.append(message if isinstance(message, str) else bytes(message))
            await asyncio.sleep(slow)
            if waited is not None:
                waited.append(len(connection._messages))
        over.set()

    room = Room(10, 10)

    def made(*given: Any, **settings: Any) -> Bounded:
        return Bounded(*given, room=room, silence=5.0, limit=LIMIT, **settings)

    async with serve(listen, "127.0.0.1", 0, create_connection=made, compression=None, max_size=LIMIT, ping_interval=None) as server:  # type: ignore[arg-type]
        port = next(iter(server.sockets)).getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}"))
        protocol.send_request(protocol.connect())
        writer.write(b"".join(protocol.data_to_send()))
        await reader.readuntil(b"\r\n\r\n")
        await work(reader, writer)
        await asyncio.wait_for(reader.read(), 20)  # until the server has said all
        writer.close()
        await asyncio.wait_for(over.wait(), 20)
    return heard


@pytest.mark.parametrize("how", ["frame by frame", "at once", "in pieces"])
@pytest.mark.parametrize("seed", range(8))
def test_every_conversation_is_heard_as_it_was_meant(seed: int, how: str) -> None:
    sent, meant = conversation(seed)

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces(sent, how, random.Random(seed)):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(frame(struct.pack("!H", 1000), bytes(4), Opcode.CLOSE))

    assert asyncio.run(talk(work)) == meant


@pytest.mark.parametrize("size", [100, 100_000])
def test_who_sends_faster_than_is_heard_is_read_no_further(size: int) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for i in range(60):
            writer.write(frame(bytes([i]) * size, b"mask"))
            await writer.drain()
            await asyncio.sleep(0)  # so that they are read one by one
        writer.write(frame(struct.pack("!H", 1000), bytes(4), Opcode.CLOSE))

    waited: list[int] = []
    assert [message[0] for message in asyncio.run(talk(work, 0.01, waited))] == list(range(60))
    assert WAITING <= max(waited) <= (WAITING if size > DESK else DESK // size)


def test_messages_as_large_as_the_last_are_read_into_where_they_stay() -> None:
    size, large, small = 100_000, asyncio.Event(), asyncio.Event()
    taken, begins, held = list[weakref.ref[np.ndarray]](), list[int](), list[int]()

    def memory(size: int) -> np.ndarray:
        block = np.empty(size, np.uint8)
        taken.append(weakref.ref(block))
        return block

    async def listens(connection: Any) -> None:
        connection.room.memory = memory
        async for message in connection:
            if len(message) == size:
                begins.append(np.frombuffer(message, np.uint8).ctypes.data - message.obj.ctypes.data)
                held.append(message[0])
                del message
                large.set()
            else:
                small.set()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for i in range(4):
            writer.write(frame(bytes([i]) * size, b"mask"))
            await asyncio.wait_for(large.wait(), 5)
            large.clear()
        assert len(taken) == 4, "a message was copied"
        writer.write(frame(b"small", b"mask"))
        await asyncio.wait_for(small.wait(), 5)
        assert len(taken) == 5 and not any(block() is not None for block in taken), "memory is held for a message that may never come"
        writer.write(frame(struct.pack("!H", 1000), bytes(4), Opcode.CLOSE))

    asyncio.run(talk(work, listens=listens))
    assert held == [0, 1, 2, 3] and set(begins) == {ALIGNED}


@pytest.mark.parametrize("size", [LIMIT + 1, 1 << 40])
def test_more_than_the_limit_is_refused_by_its_header(size: int) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(header(size, masked=True) + bytes(4) + bytes(100))
        protocol = await asyncio.wait_for(reader.read(), 5)
        assert struct.unpack("!H", protocol[2:4]) == (1009,)

    assert asyncio.run(talk(work)) == []


@pytest.mark.parametrize("sent", [DESK - 20, 150_000])
def test_a_message_whose_client_leaves_in_the_middle_is_not_heard(sent: int) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(bytes(200_000), b"mask")[:sent])
        await writer.drain()
        writer.write_eof()

    assert asyncio.run(talk(work)) == []


ROUND = """
import websockets
from triune_client import Client
from triune.eval.bench.server import observation
from triune.policies.serve import Source
from triune.policies.serve.local import serving

with serving(Source("triune.eval.bench.idle:Idle", {}), "idle") as server, Client(server.url) as client:
    client.reset()
    print(websockets.__version__, client.infer(observation(2, (224, 224))).actions.shape)
"""


def test_with_the_newest_library(tmp_path: Path) -> None:
    """What is read past the library's parser stands on attributes of it that no documentation names."""
    newest = next((ROOT / ".venv-peers" / "lib").glob("python3*")) / "site-packages" / "websockets"
    assert newest.exists(), "make venv builds .venv-peers"
    (tmp_path / "websockets").symlink_to(newest)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ROUND], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version, _, shape = done.stdout.partition(" ")
    assert int(version.split(".")[0]) >= 17 and shape.strip() == "(50, 32)"


def test_what_listens_hears_all_and_what_it_waits_for_holds_the_rest() -> None:
    sent, meant = conversation(3)
    heard, under_way = list[bytes | str](), [0, 0]

    async def later(message: Any) -> None:
        under_way[0] += 1
        under_way[1] = max(under_way)
        await asyncio.sleep(0.002)
        heard.append(message if isinstance(message, str) else bytes(message))
        under_way[0] -= 1

    def hear(message: Any) -> Any:
        if len(meant) % 2 == len(heard) % 2 or under_way[0]:
            return later(message)
        heard.append(message if isinstance(message, str) else bytes(message))
        return None

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces(sent, "in pieces", random.Random(3)):
            writer.write(piece)
            await writer.drain()
        writer.write(frame(struct.pack("!H", 1000), bytes(4), Opcode.CLOSE))

    asyncio.run(talk(work, listens=lambda connection: connection.listen(hear)))
    assert heard == meant and under_way == [0, 1]


@pytest.mark.parametrize("waits", [False, True])
def test_what_goes_wrong_while_listening_ends_it(waits: bool) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise ArithmeticError("a defect")

    def hear(message: Any) -> Any:
        if waits:
            return fails()
        raise ArithmeticError("a defect")

    async def listens(connection: Any) -> None:
        with pytest.raises(ArithmeticError, match="a defect"):
            await connection.listen(hear)

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(b"x", bytes(4)))

    asyncio.run(talk(work, listens=listens))

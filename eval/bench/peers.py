"""The other ends of the server benchmark, each a process that prints its port and runs until it is ended.

python -m triune.eval.bench.peers KIND ..., where KIND is one of ours '{"seconds": [0.05, 0.05]}', echo BYTES BYTES, streams BYTES BYTES,
defaults, shaped PORT MBIT SECONDS
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys

import numpy as np

from .idle import ACTION, CHUNK

PIECE = 16384


def main() -> None:
    """Run what the first argument names."""
    kind, *arguments = sys.argv[1:]
    if kind == "echo":
        echo(*(int(a) for a in arguments))
    elif kind == "streams":
        asyncio.run(streams(*(int(a) for a in arguments)))
    elif kind == "ours":
        asyncio.run(ours(json.loads(arguments[0])))
    elif kind == "defaults":
        asyncio.run(defaults())
    else:
        asyncio.run(shaped(int(arguments[0]), float(arguments[1]) * 1e6 / 8, float(arguments[2])))


def say(port: int) -> None:
    """Tell who started this process."""
    print(port, flush=True)


async def ours(arguments: dict[str, object]) -> None:
    """Our server with a policy that does nothing."""
    from ...policies.serve import Serve, Server, Source

    server = Server.of(Serve(port=0, rate=1e5, standby=False), Source("triune.eval.bench.idle:Idle", arguments), "idle")
    await server.start()
    say(server.port)
    await server.run()


def echo(takes: int, gives: int) -> None:
    """Answers every ``takes`` bytes with ``gives`` bytes: the least that any protocol over TCP costs."""
    answer, room = bytes(gives), memoryview(bytearray(takes))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        say(listening.getsockname()[1])
        while True:
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while True:
                    have = 0
                    while have < takes and (got := connection.recv_into(room[have:])):
                        have += got
                    if have < takes:
                        break
                    connection.sendall(answer)


async def streams(takes: int, gives: int) -> None:
    """The same over asyncio's streams."""
    answer = bytes(gives)

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readexactly(takes)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        say(server.sockets[0].getsockname()[1])
        await until_told()


async def defaults() -> None:
    """A websocket server as the library makes it, deflate and all, that unpacks each message of any size and answers with a chunk."""
    import msgpack
    from triune_client.wire import pack
    from websockets.asyncio.server import ServerConnection, serve

    async def answer(connection: ServerConnection) -> None:
        async for frame in connection:
            msgpack.unpackb(frame, raw=True, strict_map_key=False)
            await connection.send(pack({"actions": np.zeros((CHUNK, ACTION), np.float32)}))

    async with serve(answer, "127.0.0.1", 0, max_size=None) as server:
        say(next(iter(server.sockets)).getsockname()[1])
        await until_told()


async def shaped(to: int, rate: float, delay: float) -> None:
    """A link to a port of this machine: so many bytes per second and so many seconds on the way, in each direction."""
    loop = asyncio.get_running_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        free = loop.time()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=4096)

        async def deliver() -> None:
            while True:
                due, piece = await line.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                writer.write(piece)
                if not piece:
                    writer.close()
                    return

        delivering = asyncio.create_task(deliver())
        while piece := await reader.read(PIECE):
            free = max(free, loop.time()) + len(piece) / rate
            await asyncio.sleep(max(0.0, free - loop.time() - 0.002))  # what is sent waits at the sender, not in memory
            await line.put((free + delay, piece))
        await line.put((loop.time() + delay, b""))
        await delivering

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", to)
        with contextlib.suppress(asyncio.CancelledError):  # the benchmark is over
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    async with await asyncio.start_server(carry, "127.0.0.1", 0) as server:
        say(server.sockets[0].getsockname()[1])
        await until_told()


async def until_told() -> None:
    """Wait for SIGTERM."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    await told.wait()


if __name__ == "__main__":
    main()

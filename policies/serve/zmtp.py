"""ZeroMQ's wire protocol (ZMTP 3, RFC 23 and 37) for a socket that answers REQ clients: what GR00T's clients speak.

Why not libzmq: it gathers all parts of a message before anybody may look at it, so one stranger fills the memory whatever ZMQ_MAXMSGSIZE
is; and it does not tell that a client has gone, with whom its sessions should end. Here a part that is too long is refused when its
header was read, and a connection is a connection.
"""

import asyncio
import socket
import struct
import sys
from collections.abc import AsyncIterator

from .line import Connection

MORE, LONG, COMMAND = 1, 2, 4
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Signature, version 3.0, no security, 64 bytes together."""
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"ROUTER"
HANDSHAKE = 10.0
PARTS = 4
"""Parts of a message: what a client puts before the empty one comes back before the answer, at most ``ENVELOPE`` bytes each."""
ENVELOPE = 256


class Broken(Exception):
    """The other side does not keep to the protocol; the connection is closed."""


class Peer(Connection):
    """One client. Iterated, it gives the bodies of its requests; ``send`` answers the latest.

    Args:
        limit: bytes of a body.
        patience: seconds that a message may take once it began, and that a client may take to fetch an answer.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int, patience: float = 60.0) -> None:
        self.reader, self.writer, self.limit, self.patience = reader, writer, limit, patience
        self._envelope: list[bytes] = []
        tcp = writer.get_extra_info("socket")
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a client whose machine has gone without a word is noticed after 50 seconds
            for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
                tcp.setsockopt(socket.IPPROTO_TCP, option, value)

    async def greet(self) -> None:
        """Shake hands.

        Raises:
            Broken: no ZMTP 3 client without security, or no REQ or DEALER socket.
        """
        self.writer.write(GREETING)
        try:
            async with asyncio.timeout(HANDSHAKE):
                theirs = await self.reader.readexactly(10)
                if theirs[:1] != b"\xff" or theirs[9] != 0x7F:
                    raise Broken("no greeting of ZeroMQ came")
                theirs += await self.reader.readexactly(54)
                if theirs[10] < 3 or theirs[12:32].rstrip(b"\0") != b"NULL":
                    raise Broken("the client speaks ZMTP before 3, or with a security mechanism")
                flags, body = await self._frame(ENVELOPE)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise Broken("the client left before it had greeted") from None
        length, kind = body.partition(b"\x0bSocket-Type")[2][:4], body.partition(b"\x0bSocket-Type")[2][4:]
        if not flags & COMMAND or not body.startswith(b"\x05READY") or kind[: int.from_bytes(length, "big")] not in (b"REQ", b"DEALER"):
            reason = b"only REQ and DEALER are served"
            self._put(b"\x05ERROR" + bytes([len(reason)]) + reason, COMMAND)
            raise Broken("the client is no REQ or DEALER socket")
        self._put(READY, COMMAND)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                body = await self._message()
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
                return
            yield body
            await asyncio.sleep(0)  # what a flood has put into the buffer is not read in one go

    async def send(self, body: bytes) -> None:
        """Answer the latest request.

        Raises:
            ConnectionError: the client has gone, or does not fetch what it asked for.
        """
        for part in self._envelope:
            self._put(part, MORE)
        self._put(body, 0)
        await self._flushed()

    def close(self) -> None:
        """Close when what was answered has been fetched."""
        self.writer.close()

    def abort(self) -> None:
        """Close at once."""
        self.writer.transport.abort()

    async def _message(self) -> bytes:
        """The body of the next request; commands are answered on the way."""
        envelope: list[bytes] = []
        while True:
            delimited = b"" in envelope
            flags, body = await self._frame(self.limit if delimited else ENVELOPE, patient=not envelope)
            if flags & COMMAND:
                if body.startswith(b"\x04PING"):
                    self._put(b"\x04PONG" + body[7:], COMMAND)
                    await self._flushed()
                await asyncio.sleep(0)
            elif flags & MORE:
                envelope.append(body)
                if len(envelope) == PARTS or delimited:
                    raise Broken("a message has too many parts")
            elif delimited:
                self._envelope = envelope
                return body
            else:
                raise Broken("a message lacks the empty part before its body")

    async def _frame(self, limit: int, patient: bool = False) -> tuple[int, bytes]:
        """Flags and body of the next frame. Only the first byte of a message may take as long as it likes."""
        flags = (await self.reader.readexactly(1))[0] if patient else None
        async with asyncio.timeout(self.patience):
            if flags is None:
                flags = (await self.reader.readexactly(1))[0]
            if flags & ~(MORE | LONG | COMMAND):
                raise Broken("a frame has flags that ZMTP 3 does not know")
            size = struct.unpack(">Q", await self.reader.readexactly(8))[0] if flags & LONG else (await self.reader.readexactly(1))[0]
            if size > limit:
                raise Broken(f"a part of {size} bytes is over the limit of {limit}")
            return flags, await self.reader.readexactly(size)

    async def _flushed(self) -> None:
        try:
            async with asyncio.timeout(self.patience):
                await self.writer.drain()
        except TimeoutError:
            raise ConnectionResetError("the client does not fetch its answer") from None

    def _put(self, body: bytes, flags: int) -> None:
        if len(body) > 255:
            self.writer.write(struct.pack(">BQ", flags | LONG, len(body)))
        else:
            self.writer.write(struct.pack(">BB", flags, len(body)))
        self.writer.write(body)

"""One connection as a dialect sees it, and what it may cost."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from triune_client.wire import Limits, WireError, pack, unpack
from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, Frame, Opcode

from .exchange import Refusal
from .keys import Keys
from .security import Rate, Room, Token

FRAGMENTS = 4096
"""Parts of one message. A part may be empty, so the bytes of a message do not bound them."""
PINGS = 8
"""Pings of a client that does not read. Answers to pings wait in memory, and asyncio counts what waits at each write."""


class Bounded(ServerConnection):
    """A connection that takes its place in ``room``, and ends when its client neither reads nor ends the message that it began.

    Args:
        room: where there is none the connection ends at once.
        silence: seconds that bytes may wait for the client to read, and a message for its end.
    """

    def __init__(self, *args: Any, room: Room, silence: float, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.room, self.silence = room, silence
        self._entered = False
        self._pings = 0
        self._stalled: asyncio.TimerHandle | None = None
        self._parts = 0
        self._unended: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where the client is, without its port."""
        return self._address

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        remote = transport.get_extra_info("peername")
        self._address = str(remote[0]) if remote else "unknown"
        self._entered = self.room.enter(self._address)
        if not self._entered:
            self._cut()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._entered:
            self.room.leave(self._address)
        for timer in (self._stalled, self._unended):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pings = 0
        self._stalled = self.loop.call_later(self.silence, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def process_event(self, event: Any) -> None:
        super().process_event(event)
        if not isinstance(event, Frame):
            return
        if event.opcode in DATA_OPCODES:
            self._went_on(event.fin)
        elif self.paused and event.opcode is Opcode.PING:
            self._pings += 1
            if self._pings > PINGS:
                self._cut()

    def _went_on(self, ended: bool) -> None:
        """A part of a message came, or all of it."""
        self._parts = 0 if ended else self._parts + 1
        if self._unended is not None and ended:
            self._unended.cancel()
            self._unended = None
        elif self._parts == 1:
            self._unended = self.loop.call_later(self.silence, self._drips)
        elif self._parts > FRAGMENTS:
            self._send_away(f"a message came in more than {FRAGMENTS} parts")

    def _drips(self) -> None:
        """A message has not ended for long."""
        if self.transport.is_reading():
            self._send_away(f"a message did not end within {self.silence:g} s")
        else:  # it is we who do not fetch the rest: other messages come first
            self._unended = self.loop.call_later(self.silence, self._drips)

    def _send_away(self, reason: str) -> None:
        self._ending = self._ending or self.loop.create_task(self.close(1008, reason))

    def _cut(self) -> None:
        """End at once, in the kernel too, which would keep for minutes what was not fetched."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Connection(Protocol):
    """What carries frames: a connection of ``websockets``, or a ``zmtp.Peer``."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    async def send(self, message: Any, /) -> None: ...


def word(value: object) -> str:
    """A client's word as a sentence may repeat it; of anything but text only what it is."""
    return value[:40] if isinstance(value, str) else f"({type(value).__name__})"


@dataclass
class Line:
    """Frames in and out.

    Attributes:
        name: of the connection, unique while the server runs; names of sessions begin with it.
        seed: of the first session that it begins without one.
        token: for protocols that have it in their messages.
        keys: names that clients of other protocols have for cameras, state and instruction.
        in_flight: requests that it may have under way.
        deadline: seconds for requests that bring none.
        timed: is told what a stage of a message took, in milliseconds.
    """

    connection: Connection
    name: str
    address: str
    seed: int
    limits: Limits
    rate: Rate
    token: Token
    keys: Keys
    in_flight: int = 16
    deadline: float | None = None
    timed: Callable[[str, float], None] = lambda stage, ms: None
    decoded: float = 0.0

    async def frames(self) -> AsyncIterator[bytes | str]:
        """Frames as they come, until the other side closes."""
        async for frame in self.connection:
            yield frame

    def decode(self, frame: bytes | str, also: Callable[[dict[Any, Any]], object] | None = None) -> Any:
        """The message in a frame; ``decoded`` is how many milliseconds that took.

        Args:
            also: another codec's words, see ``triune_client.wire.unpack``.

        Raises:
            Refusal: too many requests, text, or no message within the limits.
        """
        if not self.rate.allows(self.address):
            raise Refusal("busy", f"more than {self.rate.per_second:g} requests per second come from this address; ask less often")
        if isinstance(frame, str):
            raise Refusal("bad_request", "this server takes binary frames of msgpack, and a text frame came")
        began = time.perf_counter()
        try:
            message = unpack(frame, self.limits, also)
        except WireError as error:
            raise Refusal("bad_request", str(error)) from None
        self.decoded = 1e3 * (time.perf_counter() - began)
        self.timed("decode", self.decoded)
        return message

    async def send(self, message: Any) -> None:
        """Send one message."""
        began = time.perf_counter()
        frame = pack(message)
        spent = 1e3 * (time.perf_counter() - began)
        await self.connection.send(frame)
        self.timed("encode", spent)

"""A websocket that is bounded in what it holds and in how long it may stand still, and that reads large messages into where they stay.

``websockets`` does the protocol. A large message that comes in one frame goes past its parser: it is read from the socket into memory of
its own size and unmasked there, which is one pass over its bytes where the parser makes six.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from triune_client.websocket import WHOLE, header, mask
from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, CloseCode, Frame, Opcode
from websockets.protocol import State

from .line import Connection
from .security import Room

FRAGMENTS = 4096
"""Parts of one message. A part may be empty, so the bytes of a message do not bound them."""
PINGS = 8
"""Pings of a client that does not read. Answers to pings wait in memory, and asyncio counts what waits at each write."""
MASKED = 0x80
"""In a frame's second byte: that it is masked, as a client's must be (RFC 6455, 5.1)."""
LENGTHS = {126: struct.Struct("!H"), 127: struct.Struct("!Q")}
"""What a third byte and further ones hold, where the second says so: the length. The key of the mask follows, four bytes."""
LONGEST = 14
"""Bytes of the longest header."""
ALIGNED = 16
"""Bytes at whose multiples arrays begin in memory, as they do in a message (``triune_client.outofband``)."""
WAITING = 2
"""Messages that may wait until the last is dealt with; then the client is read no further."""


class Bounded(ServerConnection, asyncio.BufferedProtocol, Connection):
    """A connection that takes its place in ``room``, and ends when its client neither reads nor ends the message that it began.

    Args:
        room: where there is none the connection ends at once.
        silence: seconds that bytes may wait for the client to read, and a message for its end.
        limit: bytes of a message, as the protocol has it too.
    """

    def __init__(self, *args: Any, room: Room, silence: float, limit: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.room, self.silence, self.limit = room, silence, limit
        self._entered = False
        self._pings = 0
        self._stalled: asyncio.TimerHandle | None = None
        self._parts = 0
        self._unended: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        self._frame: _Large | None = None
        self._usual = 0
        self._ahead: memoryview | None = None
        self._pieces: list[Any] = []
        self._text = False
        self._messages: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._hear: Callable[[Any], Awaitable[None] | None] | None = None
        self._over: asyncio.Future[None] = self.loop.create_future()
        self._later: asyncio.Future[None] | None = None

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
        if self._hear is not None:
            self._hand_on(self._hear)
        self._wake()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pings = 0
        self._stalled = self.loop.call_later(self.silence, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where what comes next is to be written: where a large message stays, also before anything says that it is one."""
        if self._frame is not None:
            return self._frame.rest
        if not self._usual:
            return self.room.desk
        self._ahead = self._memory(LONGEST, self._usual)
        return self._ahead

    def buffer_updated(self, nbytes: int) -> None:
        """So much was written there."""
        if self._frame is None:
            self._sort(nbytes)
        else:
            self._frame.grown(nbytes)
            if not self._frame.rest:
                self._end_frame(self._frame)

    def _sort(self, size: int) -> None:
        """Take the beginning of a large message for what it is, and give all else to the parser."""
        protocol, ahead, self._ahead = self.protocol, self._ahead, None
        data = (self.room.desk if ahead is None else ahead)[:size]
        between = protocol.state is State.OPEN and not self._pieces and not protocol.reader.buffer
        if between and size > LONGEST and data[0] == WHOLE and data[1] - MASKED in LENGTHS:
            form = LENGTHS[data[1] - MASKED]
            (length,), begin = form.unpack_from(data, 2), 2 + form.size + 4
            if size - begin <= length <= self.limit:
                if ahead is None or len(ahead) != begin + length:
                    ahead = self._memory(begin, length)
                    ahead[:size] = data
                self._usual = length if begin == LONGEST else 0
                self._frame = _Large(ahead, begin, size)
                if not self._frame.rest:
                    self._end_frame(self._frame)
                return
        self.data_received(bytes(data))

    def _memory(self, begin: int, length: int) -> memoryview:
        """For a frame whose message of ``length`` bytes begins at ``begin``: arrays in it lie at multiples of ``ALIGNED``."""
        return memoryview(self.room.memory(ALIGNED + length))[ALIGNED - begin :]

    def _end_frame(self, frame: "_Large") -> None:
        self._frame = None
        self.process_event(Frame(Opcode.BINARY, frame.unmasked()))

    def process_event(self, event: Any) -> None:
        if not isinstance(event, Frame):
            super().process_event(event)
        elif event.opcode in DATA_OPCODES:
            self._put(event)
            self._went_on(event.fin)
        else:
            super().process_event(event)
            self._pinged(event)

    def _put(self, frame: Frame) -> None:
        """Take a part of a message. It is kept here: ``websockets`` would copy it once more."""
        if frame.opcode is not Opcode.CONT:
            self._text = frame.opcode is Opcode.TEXT
        self._pieces.append(frame.data)
        if not frame.fin:
            return
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        try:
            self._messages.append(bytes(whole).decode() if self._text else whole)
        except UnicodeDecodeError as error:
            self._send_away(error.reason, CloseCode.INVALID_DATA)
            return
        if self._hear is not None:
            self._hand_on(self._hear)
        if len(self._messages) >= WAITING:
            self.transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def listen(self, hear: Callable[[Any], Awaitable[None] | None]) -> None:
        self._hear, self._over = hear, self.loop.create_future()
        self._hand_on(hear)
        try:
            await self._over
        finally:
            self._hear = None
            if self._later is not None:
                self._later.cancel()

    def _hand_on(self, hear: Callable[[Any], Awaitable[None] | None]) -> None:
        """Give messages to who listens, until one has to be waited for, and then the end."""
        while self._messages and self._later is None and not self._over.done():
            message = self._messages.popleft()
            if not self._messages:
                self.transport.resume_reading()
            try:
                later = hear(message)
            except Exception as error:  # noqa: BLE001 (for who listens, not for the transport)
                self._over.set_exception(error)
                return
            if later is not None:
                self._later = asyncio.ensure_future(later)
                self._later.add_done_callback(self._waited)
        if self.protocol.state is State.CLOSED and self._later is None and not self._over.done():
            self._over.set_result(None)

    def _waited(self, later: asyncio.Future[None]) -> None:
        self._later = None
        if later.cancelled() or self._hear is None or self._over.done():
            return
        error = later.exception()
        if error is None:
            self._hand_on(self._hear)
        else:
            self._over.set_exception(error)

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Messages as they come, until the connection has ended. Binary ones are something to read bytes from."""
        while True:
            while self._messages:
                message = self._messages.popleft()
                if not self._messages:
                    self.transport.resume_reading()
                yield message
            if self.protocol.state is State.CLOSED:
                return
            self._reader = self.loop.create_future()
            await self._reader

    async def send(self, message: Any, text: bool | None = None) -> None:
        """Send a message; raises as ``websockets`` does."""
        if not isinstance(message, bytes) or text is not None or not self.send_now(message):
            await (super().send(message) if text is None else super().send(message, text))
        elif self.paused:
            await self.drain()

    def send_now(self, message: bytes) -> bool:
        if self.protocol.state is not State.OPEN or self.paused:
            return False
        self.transport.write(header(len(message), masked=False) + message)  # the library's way to the same takes 20 us more
        return True

    def _pinged(self, event: Frame) -> None:
        if self.paused and event.opcode is Opcode.PING:
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

    def _send_away(self, reason: str, code: int = CloseCode.POLICY_VIOLATION) -> None:
        self._ending = self._ending or self.loop.create_task(self.close(code, reason))

    def _cut(self) -> None:
        """End at once, in the kernel too, which would keep for minutes what was not fetched."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class _Large:
    """A frame on its way into memory of its own. Pages are taken as they are written, so one that is only announced takes none.

    Args:
        memory: as large as the frame; begin: of its message, where the key of the mask ends; come: bytes that are there already.
    """

    def __init__(self, memory: memoryview, begin: int, come: int) -> None:
        self._key, self._message, self.rest = bytes(memory[begin - 4 : begin]), memory[begin:], memory[come:]

    def grown(self, size: int) -> None:
        """So much more has come."""
        self.rest = self.rest[size:]

    def unmasked(self) -> memoryview:
        """The message, once it is all there."""
        if any(self._key):  # our own client has none where nobody on the way could read it
            mask(np.frombuffer(self._message, np.uint8), self._key)
        return self._message

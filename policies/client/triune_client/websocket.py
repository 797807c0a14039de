"""A websocket that is read by whoever waits for a message: no thread stands between the socket and who asked.

The protocol is that of ``websockets``, without its input and output. Messages go out by a way of their own: from where their parts lie,
where the library makes four copies. Masks keep scripts in browsers from writing what a proxy on the way takes for requests of its own (RFC
6455, 10.3), so they are zero where nobody on the way can read: within this computer, and under TLS.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import threading
import time
from os import urandom
from typing import Any, Mapping, Sequence

import numpy as np
from websockets.client import ClientProtocol
from websockets.frames import DATA_OPCODES, Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from .stream import Stream

WHOLE = 0x80 | Opcode.BINARY
"""First byte of a frame that is a whole binary message."""


class WebSocket:
    """A connection of messages. Any thread may send; one at a time may receive.

    Args:
        headers: of the request.
        context: of TLS; None for none.
        wait: seconds to connect and to be let in.
        stuck: seconds after which sending gives up on a server that no longer reads.
        limit: bytes of a message that may come.

    Raises:
        websockets.exceptions.InvalidHandshake: it answers, but does not let us in.
        OSError: no connection; ``ssl.SSLError`` and ``TimeoutError`` are among them.
    """

    def __init__(self, url: str, headers: Mapping[str, str], context: ssl.SSLContext | None, wait: float, stuck: float, limit: int) -> None:
        uri, until = parse_uri(url), time.monotonic() + wait
        self._protocol, self._limit = ClientProtocol(uri, max_size=limit), limit
        self._state, self._sending = threading.Lock(), threading.Lock()
        self._room = np.empty(0, np.uint8)
        self._parts: list[Any] = []
        self._text = False
        self._came: list[str | bytes] = []
        self._stream = Stream(uri.host, uri.port, context, wait, stuck)
        self._plain = self._stream.private
        try:
            request = self._protocol.connect()
            request.headers.update(headers)
            self._protocol.send_request(request)
            self._write()
            while self._protocol.state is State.CONNECTING:
                self._came += self._read(until - time.monotonic())
                if self._protocol.handshake_exc is not None:
                    raise self._protocol.handshake_exc
        except BaseException:
            self._stream.close()
            raise

    def send(self, parts: Sequence[Any]) -> None:
        """Send a binary message, whose bytes lie in several places.

        Raises:
            ConnectionError: the connection has ended; other ``OSError``: it ends now.
        """
        with self._sending:
            if self._protocol.state is not State.OPEN:
                raise ConnectionError(self._why())
            self._stream.send(self._frame(parts))

    def receive(self, timeout: float) -> list[str | bytes]:
        """The messages that are whole once something came: often one, none where it was a part or a ping.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
            ConnectionError: the server has ended the connection, and its reason.
        """
        if self._came:
            came, self._came = self._came, []
            return came
        if self._protocol.state is not State.OPEN:
            raise ConnectionError(self._why())
        return self._read(timeout)

    def first(self, timeout: float) -> str | bytes:
        """The next message, while no other is expected; raises as ``receive``."""
        until = time.monotonic() + timeout
        while not (came := self.receive(until - time.monotonic())):
            pass
        self._came = came[1:]
        return came[0]

    def goodbye(self) -> None:
        """Tell the server that we leave, if it can be told; further messages cannot be sent."""
        with self._state:
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
        with contextlib.suppress(OSError):  # it has gone
            self._write()

    def last(self, wait: float) -> None:
        """Wait until the server has left too; nobody else may receive."""
        until = time.monotonic() + wait
        with contextlib.suppress(OSError):  # it does not leave
            while self._protocol.state is not State.CLOSED:
                self._read(until - time.monotonic())

    def end(self) -> None:
        """Let who waits see the end now."""
        self._stream.end()

    def close(self) -> None:
        """Give the connection back to the system; nobody may receive or send any more."""
        self._stream.close()

    def _read(self, timeout: float) -> list[str | bytes]:
        """Take what comes next, and answer what the protocol wants answered."""
        try:
            data = self._stream.receive(max(0.0, timeout))
        except TimeoutError:
            raise
        except OSError:
            data = b""
        message = self._whole(data)
        if message is not None:
            return [message]
        with self._state:
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            events = self._protocol.events_received()
        with contextlib.suppress(OSError):  # the next look finds the end
            self._write()
        whole: list[str | bytes] = []
        for event in events:
            if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
                self._parts.append(event.data)
                self._text = event.opcode is Opcode.TEXT or (self._text and event.opcode is Opcode.CONT)
                if event.fin:
                    message = b"".join(self._parts)
                    whole.append(message.decode("utf-8", "replace") if self._text else message)
                    self._parts = []
        return whole

    def _whole(self, data: bytes) -> bytes | None:
        """The one binary message that all of ``data`` is, if it is: the parser takes longer to find that out than all else that we do."""
        protocol = self._protocol
        between = protocol.state is State.OPEN and not self._parts and not protocol.reader.buffer
        if not between or len(data) < 4 or data[0] != WHOLE or data[1] > 126:
            return None
        begin, size = (4, data[2] << 8 | data[3]) if data[1] == 126 else (2, data[1])
        return data[begin:] if len(data) == begin + size and size <= self._limit else None

    def _write(self) -> None:
        """Send what the protocol wants to be sent."""
        with self._state:
            writes = self._protocol.data_to_send()
        for data in filter(None, writes):  # an empty one would be the end of the bytes, which comes when the connection is closed
            with self._sending:
                self._stream.send([data])

    def _frame(self, parts: Sequence[Any]) -> list[Any]:
        """The frame of a binary message (RFC 6455, 5.2 and 5.3)."""
        size = sum(map(len, parts))
        head = header(size, masked=True)
        if self._plain:
            return [head + bytes(4), *parts]
        key = urandom(4)
        if len(self._room) < size:
            self._room = np.empty(size + size // 4, np.uint8)
        room, end = self._room[:size], 0
        for part in parts:
            room[end : end + len(part)] = np.frombuffer(part, np.uint8)
            end += len(part)
        mask(room, key)
        return [head + key, room]

    def _why(self) -> str:
        """Why the connection has ended."""
        said, broken = self._protocol.close_rcvd, self._protocol.parser_exc
        if said is not None:
            return f"{said.code} {said.reason}".strip()
        return "it went without a word" if broken is None or isinstance(broken, EOFError) else f"it broke the protocol: {broken}"


def header(size: int, masked: bool) -> bytes:
    """What stands before ``size`` bytes of a whole binary message, without the mask's key (RFC 6455, 5.2)."""
    flag = 0x80 if masked else 0
    if size < 126:
        return struct.pack("!BB", WHOLE, flag | size)
    return struct.pack("!BBH", WHOLE, flag | 126, size) if size < 1 << 16 else struct.pack("!BBQ", WHOLE, flag | 127, size)


def mask(data: np.ndarray[Any, Any], key: bytes) -> None:
    """Mask bytes where they are, or unmask them, which is the same: four by four with ``key`` (RFC 6455, 5.3)."""
    words, four = len(data) // 4 * 4, np.frombuffer(key, np.uint8)
    data[:words].view(np.uint32)[:] ^= four.view(np.uint32)
    data[words:] ^= four[: len(data) - words]

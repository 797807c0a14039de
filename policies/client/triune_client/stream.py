"""Bytes to a server and back: TCP, and TLS where the address asks for it.

One thread may read while another writes. A socket of ``ssl`` would let only one of them in at a time, so TLS is done in memory.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any, Sequence

PIECE = 1 << 16
"""Bytes that are read at once."""
SCATTERED = hasattr(socket.socket, "sendmsg")
"""Whether the system sends from several places at once; Windows does not."""
MOST = 512
"""Places that it takes."""


class Stream:
    """A connection of bytes.

    Args:
        context: of TLS; None for none.
        wait: seconds to connect, and to agree on TLS.
        stuck: seconds after which sending gives up on a server that no longer reads.

    Raises:
        OSError: no connection, ``ssl.SSLError`` and ``TimeoutError`` among them.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, wait: float, stuck: float) -> None:
        until = time.monotonic() + wait
        try:
            self._out = socket.create_connection((host, port), timeout=wait)
        except socket.timeout:  # no TimeoutError before Python 3.10
            raise TimeoutError from None
        self._in = self._out.dup()  # with a timeout of its own
        self._room = memoryview(bytearray(PIECE))
        self._tls = None if context is None else _Tls(context, host)
        try:
            self._out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._out.settimeout(stuck)
            if self._tls is not None:
                self._agree(self._tls, until)
        except BaseException:
            self.close()
            raise

    @property
    def private(self) -> bool:
        """Whether nobody on the way could read what is sent: it is sealed, or does not leave this computer."""
        return self._tls is not None or ipaddress.ip_address(self._out.getpeername()[0].split("%")[0]).is_loopback

    def send(self, parts: Sequence[Any]) -> None:
        """Send bytes that lie in several places. One thread at a time.

        Raises:
            OSError: it cannot be done. What was sent may end anywhere, so the connection is over.
        """
        try:
            if self._tls is not None:
                self._out.sendall(self._tls.seal(b"".join(parts)))
            elif SCATTERED:
                self._scattered([memoryview(part) for part in parts])
            else:
                self._out.sendall(b"".join(parts))
        except socket.timeout:
            self.end()
            raise TimeoutError("nothing is read there any more") from None
        except BaseException:
            self.end()
            raise

    def receive(self, timeout: float) -> bytes:
        """What comes next; nothing where the other side has ended. One thread at a time.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds. All other ``OSError`` are ends too.
        """
        until = time.monotonic() + timeout
        while self._tls is None or not self._tls.ended:
            data = self._receive(max(0.0, until - time.monotonic()))
            opened = data if self._tls is None else self._tls.open(data)
            if opened is not None:
                return opened
        return b""

    def end(self) -> None:
        """Let who reads and who writes see the end now."""
        with contextlib.suppress(OSError):  # it has ended
            self._out.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back to the system; nobody may read or write any more."""
        self.end()
        self._in.close()
        self._out.close()

    def _scattered(self, parts: list[memoryview]) -> None:
        while parts:
            sent = self._out.sendmsg(parts[:MOST])
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]

    def _agree(self, tls: _Tls, until: float) -> None:
        while not tls.agreed():
            self._out.sendall(tls.seal(b""))
            tls.put(self._receive(max(0.0, until - time.monotonic())))
        self._out.sendall(tls.seal(b""))

    def _receive(self, timeout: float) -> bytes:
        self._in.settimeout(timeout)
        try:
            return bytes(self._room[: self._in.recv_into(self._room)])
        except (socket.timeout, BlockingIOError):
            raise TimeoutError from None


class _Tls:
    """TLS between two buffers in memory.

    Attributes:
        ended: the other side said that it writes no more.
    """

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._lock = threading.Lock()
        self.ended = False

    def agreed(self) -> bool:
        """Whether both sides have agreed. What is to be sent for it, ``seal`` gives."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def put(self, data: bytes) -> None:
        """Take what came; nothing is the end."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def seal(self, data: Any) -> bytes:
        """What is to be sent so that the other side reads ``data``."""
        with self._lock:
            if len(data):
                self._object.write(data)
            return self._outgoing.read()

    def open(self, data: bytes) -> bytes | None:
        """What the other side wrote: nothing at its end, None before a record is whole. What is to be answered, the next ``seal`` gives."""
        with self._lock:
            self.put(data)
            parts = []
            try:
                while part := self._object.read(PIECE):
                    parts.append(part)
            except ssl.SSLWantReadError:
                return b"".join(parts) or None
            except ssl.SSLEOFError:
                pass
            self.ended = True
            return b"".join(parts)

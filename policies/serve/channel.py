"""Messages between the server and the process of its policy: headers through a socket, arrays through memory that both share. No pickle.

Each side writes arrays into a memory of its own, from the start again for each message; the other side copies them out. That is safe
because the two take turns: nothing is sent before the answer to what was sent last.
"""

import mmap
import os
import socket
import struct
import tempfile
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

HEADER = struct.Struct("<I")
SHARED, INLINE = 1, 2  # kinds of msgpack extension: an array in the shared memory, or in the message
SMALL = 4096
"""Bytes below which an array travels in the message."""


class Arena:
    """Shared memory of ``size`` bytes. Pages are taken when they are first written, so a large one costs nothing."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self._map = mmap.mmap(fd, size)
        self.memory = np.frombuffer(self._map, np.uint8)

    @classmethod
    def new(cls, size: int) -> "Arena":
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryFile(dir=folder) as file:
            fd = os.dup(file.fileno())
        os.ftruncate(fd, size)
        return cls(fd, size)

    def close(self) -> None:
        """Give the memory back now: the mapping has a file of its own, which waits for a garbage collection otherwise."""
        del self.memory
        self._map.close()


@dataclass
class Coder:
    """Objects of msgpack, in which arrays may stand, to bytes and back.

    Attributes:
        mine: where this side's arrays are written; theirs: where the other side's are read.
    """

    mine: Arena
    theirs: Arena
    used: int = 0

    def __post_init__(self) -> None:
        self._packer, self._places = msgpack.Packer(default=self._put), msgpack.Packer()  # making one takes longer than packing

    def encode(self, message: Any) -> bytes:
        """Header and body of a message."""
        self.used = 0
        body: bytes = self._packer.pack(message)
        return HEADER.pack(len(body)) + body

    def decode(self, body: bytes | memoryview) -> Any:
        """The message whose body that is; its arrays are copies of their own."""
        return msgpack.unpackb(body, ext_hook=self._get, strict_map_key=False)

    def _put(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} cannot be sent to another process")
        array = np.ascontiguousarray(value)
        end = self.used + array.nbytes
        if array.nbytes < SMALL or end > self.mine.size:
            return msgpack.ExtType(INLINE, self._places.pack([array.dtype.str, array.shape, array.tobytes()]))
        np.copyto(self.mine.memory[self.used : end], array.reshape(-1).view(np.uint8))
        place = msgpack.ExtType(SHARED, self._places.pack([array.dtype.str, array.shape, self.used]))
        self.used = -(-end // 64) * 64
        return place

    def _get(self, kind: int, data: bytes) -> np.ndarray:
        dtype, shape, where = msgpack.unpackb(data)
        if kind == INLINE:
            return np.frombuffer(where, dtype).reshape(shape).copy()
        return np.ndarray(shape, dtype, self.theirs.memory.data, where).copy()


def receive(sock: socket.socket) -> memoryview | None:
    """The body of the next message, None where the other side has gone. Nothing follows it: the sides take turns."""
    data, end = bytearray(), HEADER.size
    while len(data) < end:
        try:
            got = sock.recv(max(end - len(data), 1 << 14))
        except ConnectionResetError:
            return None
        if not got:
            return None
        data += got
        if len(data) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(data)[0]
    return memoryview(data)[HEADER.size :]

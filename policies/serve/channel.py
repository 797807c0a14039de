"""Messages between the server and the process of its policy: headers through a socket, arrays through memory that both share. No pickle.

Each side lays arrays into a memory of its own. The two take turns: what a message brought stays where it is until it is answered, and
longer where the other side says in its answer that it still reads it, as a policy does that keeps pictures.
"""

import contextlib
import mmap
import os
import select
import socket
import struct
import sys
import tempfile
import weakref
from typing import Any

import msgpack
import numpy as np
from triune_client.outofband import describe, described

HEADER, PLACE = struct.Struct("<I"), struct.Struct("<Q")
SHARED, INLINE = 1, 2  # kinds of msgpack extension: an array in the shared memory, or in the message
SMALL = 4096
"""Bytes below which an array travels in the message."""
APART = 64
"""Blocks begin at multiples of this."""


class Arena:
    """Shared memory of ``size`` bytes. Pages are taken when they are first written, so a large one costs nothing."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self._map = mmap.mmap(fd, size)
        self.memory = np.frombuffer(self._map, np.uint8)
        self.begin = int(self.memory.ctypes.data)
        self._blocks: list[tuple[int, int, weakref.ref[np.ndarray]]] = []

    @classmethod
    def new(cls, size: int) -> "Arena":
        """Memory that needs no room in a file system: who writes into a full one is killed, and a container's ``/dev/shm`` has 64 MiB."""
        if sys.platform == "linux":
            fd = os.memfd_create("triune")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, size)
        return cls(fd, size)

    def take(self, size: int, end: int | None = None) -> tuple[int, np.ndarray] | None:
        """The lowest block (size,) of uint8 that is free, below ``end``, and its place: it is taken for as long as it or a memoryview of
        it is referred to. None where there is none."""
        self._blocks = [block for block in self._blocks if block[2]() is not None]
        at, place = 0, 0
        for begin, after, _ in self._blocks:
            if at + size <= begin:
                break
            at, place = -(-after // APART) * APART, place + 1
        if at + size > (self.size if end is None else end):
            return None
        block = self.block(at, size)
        self._blocks.insert(place, (at, at + size, weakref.ref(block)))
        return at, block

    def block(self, place: int, size: int) -> np.ndarray:
        """The memory (size,) at ``place``. All views of it, and views of those, refer to it: a slice of an array would be passed over."""
        return np.frombuffer(self._map, np.uint8, size, place)

    def place(self, array: np.ndarray) -> int | None:
        """Where a contiguous array lies in here, if it does."""
        at = int(array.__array_interface__["data"][0]) - self.begin
        return at if at >= 0 and at + array.nbytes <= self.size else None

    def close(self) -> None:
        """Give the memory back now, or when the last who reads in it lets go: the mapping has a file of its own, which would wait for a
        garbage collection otherwise."""
        del self.memory
        with contextlib.suppress(BufferError):  # somebody still reads
            self._map.close()


class Coder:
    """Objects of msgpack, in which arrays may stand, to bytes and back.

    Args:
        mine: where this side's arrays are; theirs: where the other side's are read.
        in_place: give arrays as read-only views of ``theirs``, not as copies of their own.
    """

    def __init__(self, mine: Arena, theirs: Arena, in_place: bool = False) -> None:
        self.mine, self.theirs, self.in_place = mine, theirs, in_place
        self._packer = msgpack.Packer(default=self._put)  # making one takes longer than packing
        self._number = 0
        self._lending: list[np.ndarray] = []
        self._lent: dict[int, list[np.ndarray]] = {}  # by the number of a message
        self._view: memoryview | None = None
        self._lease: weakref.ref[np.ndarray] | None = None
        self._read: list[tuple[int, weakref.ref[np.ndarray]]] = []

    def encode(self, message: Any) -> bytes:
        """Header and body of a message. Arrays that lie in ``mine`` already stay where they are."""
        self._read = [(number, lease) for number, lease in self._read if lease() is not None]
        self._number += 1
        self._lending = []
        body: bytes = self._packer.pack([self._number, [number for number, _ in self._read], message])
        if self._lending:
            self._lent[self._number], self._lending = self._lending, []
        return HEADER.pack(len(body)) + body

    def decode(self, body: bytes | memoryview) -> Any:
        """The message whose body that is, which answers what was sent last."""
        self._view = self._lease = None
        number, read, message = msgpack.unpackb(body, ext_hook=self._get, strict_map_key=False)
        self._lent = {lent: self._lent[lent] for lent in read}
        if self._lease is not None:
            self._read.append((number, self._lease))
            self._view = self._lease = None
        return message

    def _put(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} cannot be sent to another process")
        array, form = np.ascontiguousarray(value), describe(value)
        if form is None:
            raise TypeError(f"an array of {value.dtype} cannot be sent to another process")
        place = self._lend(array) if array.nbytes >= SMALL else None
        if place is None:
            return msgpack.ExtType(INLINE, bytes([len(form)]) + form + array.tobytes())
        return msgpack.ExtType(SHARED, PLACE.pack(place) + form)

    def _lend(self, array: np.ndarray) -> int | None:
        """Where the array lies in the shared memory, once it does; None where there is no room."""
        place = self.mine.place(array)
        if place is None:
            taken = self.mine.take(array.nbytes)
            if taken is None:
                return None
            place, block = taken
            block[:] = array.reshape(-1).view(np.uint8)
            array = block
        self._lending.append(array)
        return place

    def _get(self, kind: int, data: bytes) -> np.ndarray:
        if kind == INLINE:
            end = 1 + data[0]
            dtype, shape = described(data[1:end])
            return np.ndarray(shape, dtype, data, end).copy()
        dtype, shape = described(data[PLACE.size :])
        place = PLACE.unpack_from(data)[0]
        if not self.in_place:
            return np.ndarray(shape, dtype, self.theirs.memory.data, place).copy()
        if self._view is None:
            everything = self.theirs.block(0, self.theirs.size)
            self._view, self._lease = memoryview(everything).toreadonly(), weakref.ref(everything)
        return np.ndarray(shape, dtype, self._view, place)


def receive(sock: socket.socket) -> memoryview | None:
    """The body of the next message, None where the other side has gone. Nothing follows it: the sides take turns."""
    coming = select.poll()  # who sleeps in ``recv`` is also woken when the other side reads
    coming.register(sock, select.POLLIN)
    data, end = bytearray(), HEADER.size
    while len(data) < end:
        coming.poll()
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

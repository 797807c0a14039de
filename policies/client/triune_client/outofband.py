"""Messages whose arrays are out of band: behind the msgpack instead of in it, so that nobody copies them to write or to read.

    0xC1, 3 bytes of zero   msgpack never begins with this byte
    uint32                  bytes of the head
    head                    msgpack; an array is extension 1 (dtype as numpy writes it, 3 bytes, then each length of its shape as uint32),
                            an encoded image extension 2 (format, 4 bytes, height, width, channels and bytes as uint32)
    arrays                  their bytes in C order, in the order in which the head names them, each from a multiple of 16 on

All numbers are little-endian. A head is at most ``Limits.items`` bytes long, and an entry of a list or map takes one at least: so a parser
in C may read it without counting for us.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import numpy as np

from .wire import DEFAULT, DIMENSIONS, DTYPES, EncodedImage, Limits, WireError, check_depth, image, pack, parse

FIRST = 0xC1
_BEGIN = struct.Struct("<B3xI")
_ARRAY, _IMAGE = 1, 2
_PLACE = struct.Struct("<4s4I")
_SHAPES = [struct.Struct(f"<3s{rank}I") for rank in range(DIMENSIONS + 1)]
_SHAPES_BY_SIZE = {shape.size: shape for shape in _SHAPES}
_KINDS = {name.encode(): dtype for name, dtype in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _KINDS.items()}
_ALIGNED = 16
_NO_OPENERS = bytes(i for i in range(256) if not (0x80 <= i <= 0x9F or 0xDC <= i <= 0xDF))
"""Bytes with which no list and no map begins: where there are few others, nothing lies deep."""


def is_out_of_band(data: Any) -> bool:
    """Whether a frame has its arrays behind it."""
    return len(data) > 0 and data[0] == FIRST


def describe(array: np.ndarray[Any, Any]) -> bytes | None:
    """Kind and shape of an array as the head has them; None where it has no word for them."""
    name = _NAMES.get(array.dtype)
    return None if name is None or array.ndim > DIMENSIONS else _SHAPES[array.ndim].pack(name, *array.shape)


def described(form: bytes) -> tuple[np.dtype[Any], list[int]]:
    """What ``describe`` said.

    Raises:
        WireError: it cannot have said that.
    """
    reader = _SHAPES_BY_SIZE.get(len(form))
    if reader is None:
        raise WireError("the shape of an array cannot be read")
    name, *shape = reader.unpack(form)
    kind = _KINDS.get(name)
    if kind is None:
        raise WireError(f"an array of type {name!r} is not accepted: only bool, integers and floats are")
    return kind, shape


def pack_parts(message: object) -> list[Any]:
    """The bytes of a message, in parts of which arrays are their own memory.

    A message with texts in arrays, or with a head that is too long, is packed as ``wire.pack`` does. Scalars of numpy go as numbers.

    Raises:
        WireError: as ``wire.pack``.
    """
    behind = _Behind()
    try:
        head: bytes = msgpack.packb(message, default=behind.put)
    except (_InBand, struct.error, TypeError, ValueError, OverflowError):
        return [pack(message)]  # or it says what is wrong
    if len(head) > DEFAULT.items:
        return [pack(message)]
    parts, at = [_BEGIN.pack(FIRST, len(head)) + head], _BEGIN.size + len(head)
    for data in behind.data:
        if at % _ALIGNED and len(data):
            parts.append(bytes(-at % _ALIGNED))
            at += -at % _ALIGNED
        parts.append(data)
        at += len(data)
    return parts


def unpack(data: bytes | memoryview, limits: Limits = DEFAULT) -> Any:
    """The message in ``data``, which begins with ``FIRST``. Arrays are views of ``data``, read-only.

    Raises:
        WireError: not such a message, or beyond a limit.
    """
    if len(data) > limits.frame:
        raise WireError(f"a message of {len(data)} bytes is over the limit of {limits.frame}")
    view = memoryview(data).toreadonly()
    size = _BEGIN.unpack_from(view)[1] if len(view) >= _BEGIN.size else len(view)
    end = _BEGIN.size + size
    if end > len(view):
        raise WireError("not a message: its head is not whole")
    if size > limits.items:
        raise WireError(f"the head of a message is {size} bytes long, over the limit of {limits.items}")
    head, places = bytes(view[_BEGIN.size : end]), _Places(view, end, limits)
    message = parse(head, limits, places.take, _SHAPES[-1].size)
    if places.at != len(view):
        raise WireError(f"{len(view) - places.at} bytes of a message belong to no array")
    if len(head.translate(None, _NO_OPENERS)) > limits.depth:
        check_depth(message, limits.depth)
    return message


class _InBand(Exception):
    """Something that only the other form has."""


class _Behind:
    """Gathers what will stand behind the head."""

    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data: list[Any] = []

    def put(self, thing: object) -> object:
        """What stands in the head for it."""
        if isinstance(thing, np.ndarray) and (form := describe(thing)) is not None:
            self.data.append(np.ascontiguousarray(thing).reshape(-1).view(np.uint8).data)
            return msgpack.ExtType(_ARRAY, form)
        if isinstance(thing, EncodedImage) and len(thing.shape) == 3:
            self.data.append(thing.data)
            return msgpack.ExtType(_IMAGE, _PLACE.pack(thing.format.encode(), *thing.shape, len(thing.data)))
        if isinstance(thing, np.generic) and thing.dtype.str in DTYPES:
            return thing.item()
        raise _InBand


class _Places:
    """Takes what stands behind the head, one after the other, so that no bytes are taken twice."""

    __slots__ = ("arrays", "at", "limits", "pixels", "view")

    def __init__(self, view: memoryview, at: int, limits: Limits) -> None:
        self.view, self.at, self.limits = view, at, limits
        self.arrays = self.pixels = 0

    def take(self, code: int, place: bytes) -> object:
        """What the place in the head stands for."""
        self.arrays += 1
        if self.arrays > self.limits.arrays:
            raise WireError(f"more than {self.limits.arrays} arrays in one message")
        if code == _ARRAY:
            kind, shape = described(place)
            if shape and max(shape) > self.limits.array:
                raise WireError("the shape of an array holds something that is no length")
            return np.ndarray(shape, kind, self.view, self._next(math.prod(shape) * kind.itemsize))
        if code == _IMAGE and len(place) == _PLACE.size:
            return self._image(*_PLACE.unpack(place))
        raise WireError(f"msgpack extension {code} is not accepted")

    def _image(self, form: bytes, height: int, width: int, channels: int, size: int) -> EncodedImage:
        begin = self._next(size)
        data = bytes(self.view[begin : begin + size])
        made = image(data, form.rstrip(b"\0").decode("latin-1"), [height, width, channels], self.limits)
        self.pixels += height * width * channels
        if self.pixels > self.limits.frame:
            raise WireError(f"the images have more than {self.limits.frame} bytes together when decoded")
        return made

    def _next(self, size: int) -> int:
        """Where the next ``size`` bytes begin."""
        begin = -(-self.at // _ALIGNED) * _ALIGNED if size else self.at
        if size > self.limits.array:
            raise WireError(f"an array of {size} bytes is over the limit of {self.limits.array}")
        if begin + size > len(self.view):
            raise WireError("the arrays of a message are not whole")
        self.at = begin + size
        return begin

"""Messages with arrays behind them: what is packed comes back, nothing is copied, and nothing else is read."""

import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from triune_client import EncodedImage, Limits, WireError, pack
from triune_client import unpack as unpack_in_band
from triune_client.outofband import is_out_of_band, pack_parts, unpack

from .messages import messages
from .test_wire import TREES, same


def joined(message: object) -> bytes:
    return b"".join(pack_parts(message))


def made(head: object, behind: bytes = b"", size: int | None = None) -> bytes:
    """A message by hand."""
    packed = msgpack.packb(head)
    pad = bytes(-(8 + len(packed)) % 16) if behind else b""
    return struct.pack("<B3xI", 0xC1, len(packed) if size is None else size) + packed + pad + behind


def array(kind: bytes, *shape: int) -> msgpack.ExtType:
    return msgpack.ExtType(1, kind + struct.pack(f"<{len(shape)}I", *shape))


@pytest.mark.parametrize("index", [i for i in range(len(messages())) if i not in (5, 6)])
def test_what_is_packed_is_unpacked(index: int) -> None:
    frame = joined(messages()[index])
    assert is_out_of_band(frame) and same(messages()[index], unpack(frame))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES)
def test_any_message_comes_back(message: object) -> None:
    assert same(message, unpack(joined(message), Limits(depth=64)))


def test_the_bytes_are_those_of_the_description() -> None:
    frame = joined({"a": np.array([1, 2], "<u2"), "b": np.zeros((0, 3), bool), "c": EncodedImage(b"file", "png", (5, 4, 3))})
    head = b"\x83\xa1a" + b"\xc7\x07\x01<u2\x02\0\0\0" + b"\xa1b" + b"\xc7\x0b\x01|b1\0\0\0\0\x03\0\0\0"
    head += b"\xa1c" + b"\xc7\x14\x02png\0" + struct.pack("<4I", 5, 4, 3, 4)
    begin = b"\xc1\0\0\0" + struct.pack("<I", len(head)) + head
    assert frame == begin + bytes(-len(begin) % 16) + b"\x01\0\x02\0" + bytes(12) + b"file"


def test_arrays_are_not_copied_to_write_and_read_only_views_when_read() -> None:
    image, odd = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), np.arange(6.0)[::2]
    parts = pack_parts({"image": image, "odd": odd})
    assert sum(isinstance(p, memoryview) and np.shares_memory(np.frombuffer(p, np.uint8), image) for p in parts) == 1
    room = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
    got = unpack(memoryview(room))
    assert np.array_equal(got["image"], image) and np.array_equal(got["odd"], odd)
    assert np.shares_memory(got["image"], room) and not got["image"].flags.writeable
    assert all(a.ctypes.data % 8 == room.ctypes.data % 8 for a in got.values())


def test_numbers_of_numpy_become_numbers() -> None:
    message = {"time": np.float32(0.5), "step": np.int64(3), "done": np.bool_(True)}
    assert unpack(joined(message)) == {"time": 0.5, "step": 3, "done": True}


@pytest.mark.parametrize("message", [{"words": np.array(["a"])}, {"text": "x" * 40_000}, {"many": list(range(300)) * 200}])
def test_what_has_no_place_there_goes_in_band(message: dict[str, Any]) -> None:
    frame = joined(message)
    assert not is_out_of_band(frame) and frame == pack(message)
    assert same(message["words"], unpack_in_band(frame)["words"]) if "words" in message else True


@pytest.mark.parametrize("thing", [object(), {1, 2}, np.array([1j]), 2**64, "\ud800"])
def test_what_cannot_be_packed_is_said(thing: object) -> None:
    with pytest.raises(WireError, match="cannot be packed"):
        pack_parts({"thing": thing})


DEEP: Any = {}
for _ in range(20):
    DEEP = {"a": DEEP}
TINY = Limits(frame=4000, array=1000, arrays=3, length=20, items=300, text=50)
WRONG = {
    "nothing": (b"\xc1", "head is not whole"),
    "no head": (made({}, size=50), "head is not whole"),
    "long head": (made({"a": [1] * 20, "b": "x" * 49, **{str(i): "y" * 49 for i in range(8)}}), "over the limit of 300"),
    "no msgpack": (made({}, size=0), "not a message"),
    "two": (struct.pack("<B3xI", 0xC1, 2) + b"\x80\x80", "not a message"),
    "lies about entries": (struct.pack("<B3xI", 0xC1, 5) + b"\xdd\xff\xff\xff\xff", "not a message"),
    "less than it says": (made({"a": array(b"|u1", 100)}, bytes(99)), "not whole"),
    "more than it says": (made({"a": array(b"|u1", 100)}, bytes(101)), "1 bytes of a message belong to no array"),
    "bytes of nothing": (made({}, b"x"), "belong to no array"),
    "twice the same": (made({"a": array(b"|u1", 64), "b": array(b"|u1", 64)}, bytes(64)), "not whole"),
    "a large array": (made({"a": array(b"<f4", 251)}, bytes(1004)), "over the limit of 1000"),
    "a large number": (made({"a": array(b"<f8", 2**31, 2**31)}), "no length"),
    "large beside none": (made({"a": array(b"<f8", 0, 2**31)}), "no length"),
    "an object": (made({"a": array(b"|O8", 1)}, bytes(8)), "not accepted"),
    "half a shape": (made({"a": msgpack.ExtType(1, b"|u1\0")}), "shape of an array cannot be read"),
    "nine dimensions": (made({"a": array(b"|u1", *[1] * 9)}, b"x"), "not a message"),
    "many arrays": (made([array(b"|u1", 0)] * 4), "more than 3 arrays"),
    "another extension": (made({"a": msgpack.ExtType(9, b"")}), "extension 9 is not accepted"),
    "half an image": (made({"a": msgpack.ExtType(2, b"png")}), "extension 2 is not accepted"),
    "an unknown image": (made({"a": msgpack.ExtType(2, b"tiff" + struct.pack("<4I", 1, 1, 1, 3))}, b"abc"), "png, jpeg or raw"),
    "a large image": (made({"a": msgpack.ExtType(2, b"png\0" + struct.pack("<4I", 999, 999, 3, 3))}, b"abc"), "at most 1000"),
    "no image": (made({"a": msgpack.ExtType(2, b"png\0" + struct.pack("<4I", 0, 9, 3, 3))}, b"abc"), "height, width, channels"),
    "a long text": (made({"a": "x" * 51}), "not a message"),
    "depth": (made(DEEP), "too deep"),
    "a number for a key": (made({1: 2}), "not a message"),
    "a long message": (made({}, bytes(5000)), "over the limit of 4000"),
}


@pytest.mark.parametrize(("frame", "said"), WRONG.values(), ids=WRONG.keys())
def test_nothing_else_is_read(frame: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said):
        unpack(frame, TINY)


def test_images_together_are_bounded() -> None:
    one = msgpack.ExtType(2, b"png\0" + struct.pack("<4I", 30, 30, 1, 3))
    with pytest.raises(WireError, match="together"):
        unpack(made([one] * 3, (b"abc" + bytes(13)) * 2 + b"abc"), Limits(frame=2000))

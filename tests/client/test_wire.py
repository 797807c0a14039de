"""The codec: the peers' bytes, everything a message may hold, and nothing else."""

import contextlib
import random
import struct
import subprocess
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from triune_client import EncodedImage, Limits, WireError, decode_image, pack, unpack
from triune_client.wire import DTYPES, MODES

import triune

from .messages import messages

PEERS = Path(triune.__file__).parent / ".venv-peers" / "bin" / "python"
VECTOR = (
    "82b16f62736572766174696f6e2f737461746584c40b5f5f6e6461727261795f5fc3c40464617461c4080000803f00000040"
    "c4056474797065a33c6634c40573686170659102a670726f6d7074a26869"
)


def same(a: object, b: object) -> bool:
    """Equal in value, type and shape; tuples are lists and NaN is NaN."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, float) and a != a:
        return isinstance(b, float) and b != b
    return type(a) is type(b) and a == b


def peer_frames(peer: str) -> list[bytes]:
    assert PEERS.exists(), "make venv builds .venv-peers"
    script = Path(__file__).with_name("messages.py")
    done = subprocess.run([PEERS, script, peer], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [bytes.fromhex(line) for line in done.stdout.splitlines()]


def test_the_reference_vector_of_openpi() -> None:
    assert pack({"observation/state": np.array([1.0, 2.0], np.float32), "prompt": "hi"}).hex() == VECTOR


def test_openpi_packs_the_same_bytes() -> None:
    frames = peer_frames("openpi")
    assert [pack(message) for message in messages()] == frames
    assert all(len(frame) < 10_000 or unpack(frame)["state"].shape == (14,) for frame in frames)


@pytest.mark.parametrize("form", ["raw", "png"])
def test_frames_of_the_harness_are_read(form: str) -> None:
    frames = peer_frames(f"harness-{form}")
    plain = [1, 3, 4, 6, 7, 8]  # the others hold images and numpy scalars, which it turns into other things
    assert all(same(messages()[index], unpack(frames[index])) for index in plain)
    for name, sent in messages()[2].items():
        image = unpack(frames[2])[name]
        if form == "png" and sent.shape[2] in MODES:
            assert isinstance(image, EncodedImage) and image.format == form and image.shape == sent.shape
            image = decode_image(image)
        assert np.array_equal(image, sent)


@pytest.mark.parametrize("index", range(len(messages())))
def test_what_is_packed_is_unpacked(index: int) -> None:
    message = messages()[index]
    if index == 5:  # numpy's own floats and words are Python's, and msgpack sends them as such (so does openpi)
        message = {**message, "f8": 0.1, "word": "ab"}
    assert same(message, unpack(pack(message)))


SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(lambda name: hnp.arrays(np.dtype(name), SHAPES))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(), ARRAYS)
WORDS = st.text(max_size=8).filter(lambda word: not word.startswith("__"))
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES)
def test_any_message_comes_back(message: object) -> None:
    assert same(message, unpack(pack(message), Limits(depth=64)))


def test_arrays_are_read_only_views() -> None:
    got = unpack(pack({"a": np.arange(6).reshape(2, 3)}))["a"]
    assert not got.flags.writeable and not got.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        got[0, 0] = 1


@pytest.mark.parametrize(
    "thing", [np.array([1j]), np.array([object()]), np.zeros(2, "V4"), np.array(["2026"], "M8[D]"), object(), {1, 2}, 2**64, "\ud800"]
)
def test_what_cannot_be_packed_is_said(thing: object) -> None:
    with pytest.raises(WireError, match="cannot be packed"):
        pack({"thing": thing})


def marked(data: object = b"\0" * 8, dtype: object = "<f4", shape: object = (2,), **more: object) -> bytes:
    return msgpack.packb({"__ndarray__": True, "data": data, "dtype": dtype, "shape": shape, **more})


def generic(data: object, dtype: object) -> bytes:
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


def picture(**change: object) -> bytes:
    return msgpack.packb({"__image__": True, "format": "raw", "data": bytes(12), "shape": [2, 2, 3], **change})


HOSTILE = {
    "nothing": b"",
    "half a message": pack({"a": np.zeros(9)})[:-3],
    "two messages": pack({}) + pack({}),
    "a text frame": "text",
    "a number as key": msgpack.packb({1: 2}),
    "a list as key": b"\x81\x90\x01",
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "bad UTF-8": b"\xa2\xff\xfe",
    "extension": msgpack.packb(msgpack.ExtType(5, b"abc")),
    "empty extension": b"\xc7\x00\x05",
    "timestamp": msgpack.packb(msgpack.Timestamp(5, 5)),
    "reserved byte": b"\xc1",
    "announced list": b"\xdd\xff\xff\xff\xff",
    "announced map": b"\xdf\xff\xff\xff\xff",
    "announced bytes": b"\xc6\xff\xff\xff\xff",
    "announced text": b"\xdb\xff\xff\xff\xff",
    "long text": pack("a" * 70_000),
    "long list": pack(list(range(2000))),
    "deep lists": b"\x91" * 100 + b"\x90",
    "deeper lists": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 50 + b"\x80",
    "deep announced lists": b"\xdc\x04\x00" * 1020,
    "many entries": pack([[0] * 1000] * 100),
    "many maps": pack([[{}] * 1000] * 100),
    "many arrays": pack([np.zeros(1)] * 65),
    "objects": marked(dtype="|O"),
    "void": marked(dtype="|V8", shape=(1,)),
    "complex": marked(dtype="<c8", shape=(1,)),
    "dates": marked(dtype="<M8[s]", shape=(1,)),
    "raw strings": marked(dtype="|S8", shape=(1,)),
    "record": marked(dtype="f4,f4", shape=(1,)),
    "record as list": marked(dtype=[["a", "<f4"]], shape=(2,)),
    "wide text": marked(dtype="<U99999", shape=(1,)),
    "no text": marked(dtype="<U0", shape=(1,)),
    "no character": marked(data=b"\xff" * 8, dtype="<U1"),
    "half a character": marked(data=struct.pack("<II", 0xD800, 65), dtype="<U1"),
    "too few bytes": marked(shape=(3,)),
    "too many bytes": marked(shape=(1,)),
    "negative": marked(shape=(-2,)),
    "two negatives": marked(shape=(-1, -2)),
    "huge": marked(shape=(2**62, 4)),
    "overflow": marked(shape=(2**32, 2**32, 2)),
    "huge and empty": marked(data=b"", shape=(0, 2**40)),
    "a truth as length": marked(shape=(True, 2)),
    "a float as length": marked(shape=(2.0,)),
    "shape is a number": marked(shape=2),
    "many dimensions": marked(shape=(1,) * 9 + (2,)),
    "data is text": marked(data="12345678"),
    "data is a list": marked(data=[0] * 8),
    "no shape": msgpack.packb({"__ndarray__": True, "data": b"", "dtype": "<f4"}),
    "keys of both kinds": msgpack.packb({b"__ndarray__": True, "data": b"\0" * 4, "dtype": "<f4", "shape": [1]}),
    "scalar out of range": generic(300, "|u1"),
    "float out of range": generic(1e300, "<f2"),
    "integer beyond floats": generic(2**63, "<f2"),
    "scalar of text": generic("7", "<i4"),
    "scalar of bool": generic(True, "<i4"),
    "scalar without type": generic(1, None),
    "scalar of objects": generic(1, "|O"),
    "image of no format": picture(format="gif"),
    "image of text": picture(data="x" * 12),
    "image too short": picture(data=b""),
    "image of two channels": picture(shape=[2, 3, 2]),
    "image without size": picture(shape=[0, 2, 3], data=b""),
    "image that is huge": picture(format="png", shape=[100_000, 100_000, 3]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused(name: str) -> None:
    with pytest.raises(WireError) as refused:
        unpack(HOSTILE[name])  # type: ignore[arg-type]
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


def test_a_frame_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(WireError, match="over the limit of 100"):
        unpack(bytes(101), Limits(frame=100))
    with pytest.raises(WireError, match="exceeds"):
        unpack(pack(np.zeros(200)), Limits(array=1000))


@pytest.mark.parametrize(
    "frame",
    [b"\xdc\x04\x00" * 1020, (b"\xdc\x04\x00" + b"\xa2ab" * 1023) * 400, b"\xdc\x04\x00" + b"\xdc\x04\x00" * 1023, b"\x91" * 2**20],
)
def test_a_lying_message_costs_little(frame: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(WireError):
        unpack(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20


def test_mutated_frames_are_read_or_refused() -> None:
    rng = random.Random(0)
    seeds = [pack(message) for message in messages()[:9]] + [
        frame for frame in HOSTILE.values() if isinstance(frame, bytes) and len(frame) < 4000
    ]
    read = longest = 0
    for _ in range(10_000):
        frame = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(frame) + 1)
            act = rng.randrange(4)
            if act == 0 and at < len(frame):
                frame[at] = rng.choice([0, 1, 0x7F, 0x80, 0x90, 0xC1, 0xC4, 0xC6, 0xC7, 0xD9, 0xDC, 0xDD, 0xDF, 0xFF, rng.randrange(256)])
            elif act == 1:
                del frame[at : at + rng.randint(1, 8)]
            elif act == 2:
                frame[at:at] = rng.randbytes(rng.randint(1, 5))
            else:
                other = rng.choice(seeds)
                begin = rng.randrange(len(other) + 1)
                frame[at : at + 20] = other[begin : begin + rng.randint(1, 60)]
        try:
            unpack(bytes(frame))
            read += 1
        except WireError as refused:
            longest = max(longest, len(str(refused)))
    assert longest < 300
    assert 100 < read < 9000  # both ways were walked


def encoded(form: str, shape: tuple[int, int, int] = (16, 12, 3)) -> EncodedImage:
    from io import BytesIO

    from PIL import Image

    pixels = (np.arange(int(np.prod(shape))) % 256).astype(np.uint8).reshape(shape)
    out = BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, format=form.upper())
    return EncodedImage(out.getvalue(), form, shape)


@pytest.mark.parametrize(("form", "channels"), [("png", 1), ("png", 3), ("png", 4), ("jpeg", 1), ("jpeg", 3)])
def test_images_are_decoded(form: str, channels: int) -> None:
    image = unpack(pack({"image": encoded(form, (16, 12, channels))}))["image"]
    pixels = decode_image(image)
    assert pixels.shape == (16, 12, channels) and pixels.dtype == np.uint8
    if form == "png":
        assert np.array_equal(pixels.ravel(), (np.arange(pixels.size) % 256).astype(np.uint8))


def test_images_that_lie_are_refused_before_they_are_decoded() -> None:
    png = encoded("png")
    with pytest.raises(WireError, match="12 x 16 pixels but its message says 13 x 16"):
        decode_image(EncodedImage(png.data, "png", (16, 13, 3)))
    with pytest.raises(WireError, match="jpeg image cannot be decoded"):
        decode_image(EncodedImage(png.data, "jpeg", (16, 12, 3)))
    bomb = png.data.replace(struct.pack(">II", 12, 16), struct.pack(">II", 60_000, 60_000))
    for size in (12, 60_000):
        with pytest.raises(WireError):
            decode_image(EncodedImage(bomb, "png", (size, size, 3)))


def test_mutated_images_are_decoded_or_refused() -> None:
    rng = random.Random(1)
    for image in (encoded("png"), encoded("jpeg")):
        for _ in range(1500):
            data = bytearray(image.data)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            cut = bytes(data[: rng.randint(len(data) // 2, len(data))])
            with contextlib.suppress(WireError):
                assert decode_image(EncodedImage(cut, image.format, image.shape)).shape == image.shape

"""Frames that are almost right: valid ones, changed byte by byte or as msgpack trees, and kept where they reach new lines of code."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any

import msgpack

HEADERS = [bytes([b]) for b in range(0x80, 0xE0)] + [b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff", b"\xdd\xff\xff\xff\xff"]
HEADERS += [b"\xdf\x00\x01\x00\x00", b"\xdc\xff\xff", b"\xc7\x00\x01", b"\xd6\xff\x00\x00\x00\x00", b"\x91" * 40, b"\x00", b"\xff"]
NUMBERS = [0, 1, -1, 2, 255, 65536, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.5, 1e308, 5e-324]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    "a",
    "lift",
    "hello",
    "reset",
    "infer",
    "end",
    "agentview",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "x" * 300,
    "../../etc/passwd",
    "é" * 40,
]
TYPES = [
    "|u1",
    "<f4",
    ">f4",
    "<f8",
    "<f2",
    "|b1",
    "<i8",
    "<U3",
    ">U1",
    "<U0",
    "|O",
    "<M8[s]",
    "|V8",
    "|S4",
    "<c8",
    "<f16",
    "f4,f4",
    "\u0661",
]
SHAPES = [[], [0], [1], [-1], [8], [2**31, 2**31], [0, 2**62], [8, 8, 3], [1] * 9, [True], [8.0], ["8"], None]
OTHERS = [None, True, False, b"", b"\x00" * 32, [], [[[]]], [1.0, 2.0], [[1], [1, 2]], {}, {"a": 1}, {b"__ndarray__": True}, [None] * 200]
OTHERS += [{"__image__": True, "format": f, "data": b"\x89PNG\r\n\x1a\n", "shape": [8, 8, 3]} for f in ("png", "jpeg", "raw", "gif")]
OTHERS += [msgpack.ExtType(1, place) for place in (b"", b"|u1", b"|O8", b"<f4\x02\0\0\0", b"|u1" + b"\xff" * 8, b"|u1" + bytes(36))]
OTHERS += [msgpack.ExtType(2, b"png\0" + bytes(16)), msgpack.ExtType(2, b"raw\0" + b"\x08\0\0\0" * 4), msgpack.ExtType(3, b"")]
VALUES = [*NUMBERS, *TEXTS, *TYPES, *SHAPES, *OTHERS]


class Mutator:
    """An endless supply of frames, the same for the same seed and history.

    Args:
        corpus: frames to change; ``keep`` adds one.
    """

    def __init__(self, corpus: list[bytes], seed: int) -> None:
        self.corpus, self.random = list(corpus), random.Random(seed)

    def keep(self, frame: bytes) -> None:
        self.corpus.append(frame)

    def __next__(self) -> bytes:
        frame = self.random.choice(self.corpus)
        change = self._bytes if self.random.random() < 0.4 else self._tree
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            frame = change(frame)
        return frame

    def __iter__(self) -> Iterator[bytes]:
        return self

    def _bytes(self, frame: bytes) -> bytes:
        rng = self.random
        start = rng.randrange(len(frame) + 1) if rng.random() < 0.5 else min(rng.randrange(64), len(frame))
        end = min(len(frame), start + rng.choice((0, 1, 2, 8, 64)))
        other = rng.choice(self.corpus)
        middle = rng.choice(
            [
                rng.choice(HEADERS),
                rng.randbytes(rng.choice((1, 2, 9))),
                bytes(b ^ (1 << rng.randrange(8)) for b in frame[start:end]),
                frame[start:end] * rng.choice((0, 2, 50)),
                other[rng.randrange(len(other) + 1) :],
            ]
        )
        return frame[:start] + middle + (b"" if rng.random() < 0.1 else frame[end:])

    def _tree(self, frame: bytes) -> bytes:
        try:
            head, behind = _apart(frame)
            tree = msgpack.unpackb(head, strict_map_key=False)
            places = list(_places(tree))
            if not places:
                return msgpack.packb(self.random.choice(VALUES))
            holder, key = self.random.choice(places)
            self._change(holder, key, places)
            return _joined(msgpack.packb(tree), behind)
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            return self._bytes(frame)  # no tree any more

    def _change(self, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
        rng = self.random
        what = rng.randrange(6)
        if what <= 2:
            holder[key] = rng.choice(VALUES)
        elif what == 3:
            other, there = rng.choice(places)
            holder[key] = msgpack.unpackb(msgpack.packb(other[there]), strict_map_key=False)
        elif isinstance(holder, dict):
            value = holder.pop(key)
            if what == 4:
                holder[rng.choice([*TEXTS, *holder, b"data", b"shape", b"dtype", "__ndarray__", b"__npgeneric__", "__image__"])] = value
        else:
            holder[key : key + 1] = holder[key : key + 1] * rng.choice((0, 2, 3))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (map or list, key) in a tree."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _apart(frame: bytes) -> tuple[bytes, bytes | None]:
    """The msgpack of a frame, and the arrays behind it (``triune_client.outofband``)."""
    if frame[:1] != b"\xc1" or len(frame) < 8:
        return frame, None
    end = 8 + int.from_bytes(frame[4:8], "little")
    return frame[8:end], frame[end + -end % 16 :]


def _joined(head: bytes, behind: bytes | None) -> bytes:
    if behind is None:
        return head
    return b"\xc1\0\0\0" + len(head).to_bytes(4, "little") + head + bytes(-(8 + len(head)) % 16) + behind


@contextmanager
def new_lines(modules: list[ModuleType]) -> Iterator[Callable[[], int]]:
    """Within, the function tells how many lines of ``modules`` have run that had not since it was asked last. Each line is told once,
    so watching costs next to nothing. Nothing is told by a Python before 3.12."""
    if sys.version_info < (3, 12):
        yield lambda: 0
        return
    watch, tool, seen = sys.monitoring, sys.monitoring.PROFILER_ID, [0]

    def line(code: CodeType, number: int) -> object:
        seen[0] += 1
        return watch.DISABLE

    def taken() -> int:
        count, seen[0] = seen[0], 0
        return count

    watch.use_tool_id(tool, "mutants")
    watch.register_callback(tool, watch.events.LINE, line)
    names = {module.__file__ for module in modules}
    codes = [code for module in modules for code in _codes(vars(module), names)]
    for code in codes:
        watch.set_local_events(tool, code, watch.events.LINE)
    try:
        yield taken
    finally:
        for code in codes:
            watch.set_local_events(tool, code, watch.events.NO_EVENTS)
        watch.free_tool_id(tool)
        watch.restart_events()


def _codes(named: dict[str, Any] | Any, names: set[str | None]) -> Iterator[CodeType]:
    """The code of functions and methods that are written in files of ``names``."""
    for thing in list(named.values()):
        if isinstance(thing, type) and thing.__module__ != "builtins":
            yield from _codes({n: v for n, v in vars(thing).items() if not isinstance(v, type)}, names)
        code = getattr(getattr(thing, "__wrapped__", thing), "__code__", None)
        if isinstance(code, CodeType) and code.co_filename in names:
            yield code

"""Messages as bytes: msgpack with numpy arrays, written in openpi's form, read with limits and without trust.

An array is a msgpack map with the keys ``__ndarray__`` (true), ``data`` (bytes in C order), ``dtype`` and ``shape``, a numpy scalar one
with ``__npgeneric__``, ``data`` and ``dtype``. openpi writes these keys as bin, vla-evaluation-harness as str: bin is written, both are
read. ``__image__`` maps (vla-evaluation-harness) are read as ``EncodedImage`` and decoded by who wants their pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Callable, Mapping

import msgpack
import numpy as np

NUMBERS = ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")
DTYPES = {dtype.str: dtype for order in "<>" for dtype in (np.dtype(order + name) for name in NUMBERS)}
DIMENSIONS = 8
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class WireError(ValueError):
    """A message cannot be written or must not be read; one sentence says why."""


@dataclass(frozen=True)
class Limits:
    """What one message may hold; each is checked before memory is taken for it.

    Attributes:
        frame: bytes of the message, and of all its images when decoded.
        array: bytes of one array, of one binary string, and of one image when decoded.
        arrays: arrays, numpy scalars and encoded images together.
        length: entries of one list or map. A parser takes 8 bytes for every entry that a header announces, at each of at most 1,024
            depths, so this one bounds what lies can cost.
        items: entries of all lists and maps together.
        depth: lists and maps inside each other.
        text: bytes of one string.
    """

    frame: int = 64 * 2**20
    array: int = 32 * 2**20
    arrays: int = 64
    length: int = 1024
    items: int = 32768
    depth: int = 16
    text: int = 64 * 2**10


DEFAULT = Limits()


@dataclass(frozen=True)
class EncodedImage:
    """An image as it came or will go: not decoded.

    Attributes:
        data: bytes of a PNG or JPEG file, or pixels in C order (``raw``).
        format: ``png``, ``jpeg`` or ``raw``.
        shape: (height, width, channels) of the uint8 pixels; channels is 1, 3 (RGB) or 4 (RGBA).
    """

    data: bytes
    format: str
    shape: tuple[int, int, int]


def pack(message: object) -> bytes:
    """A message of maps, lists, str, bytes, numbers, None, numpy arrays and scalars, ``EncodedImage``.

    Raises:
        WireError: it holds something else, or an array of other kinds than bool, integers, floats and text.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_plain)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"the message cannot be packed: {error}") from None
    return packed


def _plain(thing: object) -> object:
    """What msgpack does not know, in words that it does. Bytes of an array are not copied here."""
    if isinstance(thing, (np.ndarray, np.generic)) and thing.dtype.str not in DTYPES and thing.dtype.kind != "U":
        raise WireError(f"an array of {thing.dtype} cannot be packed: only bool, integers, floats and text can")
    if isinstance(thing, np.ndarray):
        data = thing.data if thing.flags.c_contiguous and thing.dtype.kind != "U" else thing.tobytes()
        return {b"__ndarray__": True, b"data": data, b"dtype": thing.dtype.str, b"shape": thing.shape}
    if isinstance(thing, np.generic):
        return {b"__npgeneric__": True, b"data": thing.item(), b"dtype": thing.dtype.str}
    if isinstance(thing, EncodedImage):
        image = {"__image__": True, "format": thing.format, "data": thing.data, "shape": thing.shape}
        return {**image, "dtype": "|u1"} if thing.format == "raw" else image
    raise WireError(f"{type(thing).__name__} cannot be packed: use maps, lists, text, numbers and numpy arrays")


def unpack(data: bytes | memoryview, limits: Limits = DEFAULT, also: Callable[[dict[Any, Any]], object] | None = None) -> Any:
    """The message in ``data``. Arrays are read-only; keys of maps are str (or bytes, of which only other codecs make use).

    Args:
        also: another codec's words: called with each map that has no marker of ours, gives the map or what it stands for.

    Raises:
        WireError: not msgpack, not allowed here, or beyond a limit.
    """
    if len(data) > limits.frame:
        raise WireError(f"a message of {len(data)} bytes is over the limit of {limits.frame}")
    reader = _Reader(limits, also)
    message = parse(data, limits, _no_extension, 0, object_pairs_hook=reader.map, list_hook=reader.sequence)
    if reader.containers > limits.depth:
        check_depth(message, limits.depth)
    return message


def parse(data: bytes | memoryview, limits: Limits, extension: Callable[[int, bytes], object], longest: int, **hooks: Any) -> Any:
    """What msgpack makes of ``data`` within the limits that it knows itself.

    Args:
        extension: makes something of an extension, of ``longest`` bytes at most; hooks: further ones of its parser.

    Raises:
        WireError: not msgpack, or beyond one of them.
    """
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=limits.text,
            max_bin_len=limits.array,
            max_array_len=limits.length,
            max_map_len=limits.length,
            max_ext_len=longest,
            ext_hook=extension,
            **hooks,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {str(error) or type(error).__name__}") from None


def _no_extension(code: int, data: bytes) -> object:
    raise WireError(f"msgpack extension {code} is not accepted")


def check_depth(message: object, left: int) -> None:
    """Refuse more than ``left`` lists and maps inside each other."""
    if isinstance(message, (dict, list)):
        if not left:
            raise WireError("lists and maps lie too deep inside each other")
        for inner in message.values() if isinstance(message, dict) else message:
            if isinstance(inner, (dict, list)):
                check_depth(inner, left - 1)


class _Reader:
    """Counts what one message holds and turns marked maps into what they stand for."""

    __slots__ = ("also", "arrays", "containers", "items", "limits", "pixels")

    def __init__(self, limits: Limits, also: Callable[[dict[Any, Any]], object] | None) -> None:
        self.limits, self.also = limits, also
        self.arrays = self.containers = self.items = self.pixels = 0

    def count(self, entries: int) -> None:
        self.containers += 1
        self.items += entries + 1
        if self.items > self.limits.items:
            raise WireError(f"lists and maps have more than {self.limits.items} entries together: send numbers as arrays")

    def sequence(self, values: list[Any]) -> list[Any]:
        self.count(len(values))
        return values

    def map(self, pairs: list[tuple[Any, Any]]) -> object:
        self.count(len(pairs))
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise WireError("a map has a key twice")
        for marker, make in _MARKED:
            if marker in entries:
                self.arrays += 1
                if self.arrays > self.limits.arrays:
                    raise WireError(f"more than {self.limits.arrays} arrays in one message")
                made = make(entries, isinstance(marker, bytes), self.limits)
                if isinstance(made, EncodedImage):
                    self.pixels += math.prod(made.shape)
                    if self.pixels > self.limits.frame:
                        raise WireError(f"the images have more than {self.limits.frame} bytes together when decoded")
                return made
        return entries if self.also is None else self.also(entries)


def array(data: object, dtype: object, shape: object, limits: Limits = DEFAULT) -> np.ndarray[Any, Any]:
    """A read-only array over ``data``, once all three agree.

    Raises:
        WireError: they do not, or the type is not among bool, integers, floats and text.
    """
    if not isinstance(data, bytes):
        raise WireError(f"the data of an array must be bytes, not {type(data).__name__}")
    kind = _dtype(dtype)
    if not isinstance(shape, (list, tuple)) or len(shape) > DIMENSIONS:
        raise WireError(f"the shape of an array must be a list of at most {DIMENSIONS} lengths")
    for length in shape:
        if type(length) is not int or not 0 <= length <= limits.array:
            raise WireError("the shape of an array holds something that is no length")
    if math.prod(shape) * kind.itemsize != len(data):
        raise WireError(f"{len(data)} bytes are not an array of {kind} and shape {tuple(shape)}")
    made: np.ndarray[Any, Any] = np.ndarray(shape, kind, data)
    if kind.kind == "U" and data:
        codes = np.frombuffer(data, kind.str[0] + "u4")
        if codes.max() > 0x10FFFF or ((codes >= 0xD800) & (codes <= 0xDFFF)).any():
            raise WireError("an array of text holds something that is no character")
    return made


def _dtype(name: object) -> np.dtype[Any]:
    known = DTYPES.get(name) if isinstance(name, str) else None
    if known is not None:
        return known
    if isinstance(name, str) and name[:2] in ("<U", ">U") and len(name) <= 6 and name.isascii() and name[2:].isdecimal() and int(name[2:]):
        return np.dtype(name)
    raise WireError(f"an array of type {str(name)[:20]!r} is not accepted: only bool, integers, floats and text are")


def _field(entries: Mapping[Any, Any], name: str, bin_keys: bool) -> Any:
    key: Any = name.encode() if bin_keys else name
    if key not in entries:
        raise WireError(f"a marked map lacks '{name}'")
    return entries[key]


def _array(entries: Mapping[Any, Any], bin_keys: bool, limits: Limits) -> np.ndarray[Any, Any]:
    return array(_field(entries, "data", bin_keys), _field(entries, "dtype", bin_keys), _field(entries, "shape", bin_keys), limits)


def _scalar(entries: Mapping[Any, Any], bin_keys: bool, limits: Limits) -> object:
    value, kind = _field(entries, "data", bin_keys), _dtype(_field(entries, "dtype", bin_keys))
    fits: tuple[type, ...] = {"b": (bool,), "i": (int,), "u": (int,), "f": (float, int), "U": (str,)}[kind.kind]
    if type(value) not in fits:
        raise WireError(f"a {type(value).__name__} is not a scalar of {kind}")
    if kind.kind in "iu" and not int(np.iinfo(kind).min) <= value <= int(np.iinfo(kind).max):
        raise WireError(f"{value} is out of the range of {kind}")
    if kind.kind == "f" and math.isfinite(value) and abs(value) > float(np.finfo(kind).max):
        raise WireError(f"{value} is out of the range of {kind}")
    return kind.type(value)


def _image(entries: Mapping[Any, Any], bin_keys: bool, limits: Limits) -> EncodedImage:
    data, form, shape = (_field(entries, name, bin_keys) for name in ("data", "format", "shape"))
    return image(data, form, shape, limits)


def image(data: object, form: object, shape: object, limits: Limits = DEFAULT) -> EncodedImage:
    """An encoded image, once all three agree as far as they can before it is decoded.

    Raises:
        WireError: they do not, or it is too large.
    """
    if not isinstance(data, bytes) or form not in ("png", "jpeg", "raw"):
        raise WireError("an encoded image must be bytes of format png, jpeg or raw")
    if not isinstance(shape, list) or len(shape) != 3 or any(type(length) is not int or length < 1 for length in shape):
        raise WireError("the shape of an encoded image must be [height, width, channels]")
    height, width, channels = shape
    if channels not in MODES or height * width * channels > limits.array:
        raise WireError(f"an image of shape {tuple(shape)} is not accepted: 1, 3 or 4 channels and at most {limits.array} bytes")
    if form == "raw" and height * width * channels != len(data):
        raise WireError(f"{len(data)} bytes are not an image of shape {tuple(shape)}")
    return EncodedImage(data, form, (height, width, channels))


_MARKED: tuple[tuple[Any, Callable[[Mapping[Any, Any], bool, Limits], object]], ...] = (
    (b"__ndarray__", _array),
    ("__ndarray__", _array),
    (b"__npgeneric__", _scalar),
    ("__npgeneric__", _scalar),
    ("__image__", _image),
)


def decode_image(image: EncodedImage, limits: Limits = DEFAULT) -> np.ndarray[Any, Any]:
    """The pixels of ``image``: uint8 of its shape. Needs Pillow, except for ``raw``.

    Raises:
        WireError: the file is broken, of another format or size than it says (known from its header, before anything is decoded), or
            larger than ``limits.array`` when decoded.
    """
    if image.format == "raw":
        return array(image.data, "|u1", image.shape, limits)
    from PIL import Image

    height, width, channels = image.shape
    if height * width * channels > limits.array:
        raise WireError(f"an image of shape {image.shape} is over the limit of {limits.array} bytes")
    try:
        with Image.open(BytesIO(image.data), formats=(image.format.upper(),)) as opened:
            if opened.size != (width, height):
                raise WireError(f"the image is {opened.size[0]} x {opened.size[1]} pixels but its message says {width} x {height}")
            mode = MODES[channels]
            return np.asarray(opened if opened.mode == mode else opened.convert(mode)).reshape(image.shape)
    except WireError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise WireError(f"the {image.format} image cannot be decoded: {type(error).__name__}") from None

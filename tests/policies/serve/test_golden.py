"""Bytes of the peers' own packers: what their clients send is read, what their servers answer is written."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triune_client.wire import DEFAULT, EncodedImage, decode_image, pack, unpack

from triune.policies.serve.dialects.groot import Codec
from triune.policies.serve.dialects.harness import packed

from .golden import said

FRAMES = {k: base64.b64decode(v) for k, v in json.loads((Path(said.__file__).with_name("dialects.json")).read_text())["frames"].items()}


def same(a: Any, b: Any) -> bool:
    """Equal in value, shape and type of numbers; tuples are lists and pictures are decoded."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, EncodedImage):
        b = decode_image(b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("name", said.openpi())
def test_openpi_and_starvla(name: str) -> None:
    message = said.openpi()[name]
    assert same(message, unpack(FRAMES[name])) and pack(message) == FRAMES[name]


@pytest.mark.parametrize("name", said.harness())
def test_harness(name: str) -> None:
    kind, payload, number = said.harness()[name]
    message = {"type": kind, "payload": payload, "seq": number, "timestamp": said.TIME}
    assert same(message, unpack(FRAMES[name]))
    if name in ("harness action", "harness error"):
        assert packed(kind, payload, number, said.TIME) == FRAMES[name]


@pytest.mark.parametrize("name", [name for name in FRAMES if name.startswith("n1.")])
def test_groot(name: str) -> None:
    version, _, what = name.partition(" ")
    codec, message = Codec(DEFAULT), said.groot()[what]
    assert same(message, unpack(FRAMES[name], also=codec.read))
    if codec.arrays:
        assert codec.kind == ("nd" if version == "n1.7" else "npy")

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: written(inner) for key, inner in value.items()}
        return codec.write(value) if isinstance(value, np.ndarray) else [written(v) for v in value] if isinstance(value, list) else value

    assert pack(written(message)) == FRAMES[name]

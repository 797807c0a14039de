"""Messages that both sides of a byte test make: run by an interpreter of the peers, it prints them packed by the peer, one a line.

python messages.py openpi|harness-raw|harness-png
"""

from __future__ import annotations

import sys

import numpy as np


def messages() -> list[dict]:
    """Every kind that a robot sends or gets, equal under numpy 1 and 2."""
    image = (np.arange(5 * 4 * 3) % 251).astype(np.uint8).reshape(5, 4, 3)
    numbers = [np.arange(6).reshape(2, 3).astype(kind) for kind in ("?", "i1", "u2", "<i4", ">i4", "u8", "<f2", "<f4", ">f8")]
    return [
        {},
        {"observation/state": np.array([1.0, 2.0], np.float32), "prompt": "hi"},
        {"image": image, "chw": image.transpose(2, 0, 1), "flipped": image[::-1, :, ::-1], "fortran": np.asfortranarray(image)},
        {str(index): array for index, array in enumerate(numbers)},
        {"empty": np.zeros((0, 7), np.float32), "scalar": np.array(3.5, np.float32), "bool": np.array(True)},
        {
            "f4": np.float32(0.1),
            "f8": np.float64(0.1),
            "i8": np.int64(-3),
            "u1": np.uint8(200),
            "truth": np.bool_(True),
            "word": np.str_("ab"),
        },
        {"words": np.array(["pick", "up é"]), "nothing": np.array([np.nan, np.inf])},
        {"plain": [1, -1, 2**40, 1.5, None, True, "text", b"bytes", {"deep": [[]]}], "tuple": (1, 2)},
        {"actions": np.linspace(-1, 1, 350).reshape(50, 7), "policy_timing": {"infer_ms": 12.5}},
        {"images": {"a": np.zeros((224, 224, 3), np.uint8), "b": np.full((224, 224, 3), 7, np.uint8)}, "state": np.zeros(14)},
    ]


def printed(peer: str) -> None:
    if peer == "openpi":
        from openpi_client import msgpack_numpy

        packer = msgpack_numpy.Packer()
        frames = [packer.pack(message) for message in messages()]
    else:
        import msgpack
        from vla_eval.protocol import numpy_codec

        numpy_codec.set_image_format(peer.split("-")[1])
        frames = [msgpack.packb(message, default=numpy_codec.encode_ndarray) for message in messages()]
    for frame in frames:
        print(frame.hex())


if __name__ == "__main__":
    printed(sys.argv[1])

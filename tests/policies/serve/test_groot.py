"""GR00T's protocol: sockets of libzmq with the bytes of the authors' clients, and strangers at the port."""

import asyncio
import io
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio
from pydantic import ValidationError
from triune_client.wire import DEFAULT, Limits, WireError, pack, unpack

from triune.policies.serve import Serve, Server
from triune.policies.serve.dialects.groot import Codec, npy
from triune.policies.serve.zmtp import GREETING, READY

from .conftest import served
from .golden import said
from .talking import IMAGES, answered
from .test_golden import FRAMES

pytestmark = pytest.mark.usefixtures("fakes")
KEYS = {
    "cameras": {name: f"video.{name}" for name in said.CAMERAS},
    "state": ["state.arm", "state.grip"],
    "actions": {"arm": 31, "grip": 1},
}


@asynccontextmanager
async def client(server: Server, kind: int = zmq.REQ) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, 20_000)
    socket.connect(f"tcp://127.0.0.1:{server.port_of('groot_port')}")
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def ask(socket: zmq.asyncio.Socket, message: Any) -> Any:
    await socket.send(message if isinstance(message, bytes) else pack(message))
    return unpack(await socket.recv(), also=Codec(DEFAULT).read)


def together(parts: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([parts["arm"], parts["grip"]], axis=-1)


def test_three_versions_are_answered_as_they_ask() -> None:
    async def work(server: Server) -> None:
        for seed, version in enumerate(("n1.5", "n1.6", "n1.7")):
            flat = version == "n1.5"
            async with client(server) as socket:
                assert await ask(socket, FRAMES[f"{version} ping"]) == said.groot()["pong"]
                await socket.send(FRAMES[f"{version} {'flat' if flat else 'nested'}"])
                codec = Codec(DEFAULT)
                answer = unpack(await socket.recv(), also=codec.read)
                assert codec.kind == ("nd" if version == "n1.7" else "npy")
                parts = {key.removeprefix("action."): value for key, value in answer.items()} if flat else answer[0]
                assert parts["grip"].shape == ((50, 1) if flat else (1, 50, 1))
                np.testing.assert_array_equal(together(parts).reshape(50, 32), answered(seed, 0))
                config = (await ask(socket, FRAMES[f"{version} modality"]))["action"]
                steps = json.loads(config["as_json"]) if flat else config["as_json"]
                assert config["__ModalityConfig_class__"] is True and config["__ModalityConfig__"] is True
                assert steps == {
                    "delta_indices": list(range(50)),
                    "modality_keys": ["action.arm", "action.grip"] if flat else ["arm", "grip"],
                }
                if not flat:
                    assert await ask(socket, FRAMES[f"{version} reset"]) == {}
                    again = await ask(socket, FRAMES[f"{version} nested"])
                    np.testing.assert_array_equal(together(again[0])[0], answered(seed + 1, 0))
        while server.service.sessions or server.connections:
            await asyncio.sleep(0.01)

    served(work)(groot_port=0, keys=KEYS)


def test_batches_flat_keys_and_what_is_refused() -> None:
    async def work(server: Server) -> None:
        async with client(server) as socket:
            two = said.groot(2)["nested"]
            second = {name: said.picture(i + 1) for i, name in enumerate(said.CAMERAS)}
            answer = await ask(socket, packed(two))
            np.testing.assert_array_equal(together(answer[0]), [answered(0, 0), answered(1, 0, said.state() + 1, second)])
            seen = two["data"]["observation"]
            flat = {f"{m}.{k}": v for m in ("video", "state") for k, v in seen[m].items()} | {"task": ["lift", "lift"]}
            answer = await ask(socket, packed({"endpoint": "get_action", "data": {"observation": flat}}))
            assert answer[0]["action.arm"].shape == (2, 50, 31)
            lone = {"video": {name: image[None] for name, image in IMAGES.items()}, "state": {"arm": said.state()[:7], "grip": [0.5]}}
            pickle = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"cos\nsystem"}
            for message, sentence in (
                (FRAMES["n1.6 kill"], "kill is not served"),
                (b"\x00", "a message must be a map"),
                (b"\xc1", "not a message"),
                ({"endpoint": "load"}, "there is no endpoint 'load'"),
                ({"endpoint": "get_action"}, "needs data"),
                ({"data": {"observation": 3}}, "must be a map"),
                ({"data": {"observation": lone}}, "lacks an instruction"),
                (
                    {"data": {"observation": said.groot(3)["nested"]["data"]["observation"] | {"language": {"task": [["a"], ["b"]]}}}},
                    "places",
                ),
                ({"data": {"observation": seen | {"state": lone["state"]}}}, "with the same B"),
                (said.groot(17)["nested"], "a batch has 17 places"),
                ({"data": pickle}, "no objects"),
            ):
                answer = await ask(socket, message if isinstance(message, bytes) else packed(message))
                assert sentence in answer["error"] and "Traceback" not in answer["error"]
            assert (await ask(socket, FRAMES["n1.7 nested"]))[0]["arm"].shape == (1, 50, 31)

    served(work)(groot_port=0, keys=KEYS)


def packed(message: Any) -> bytes:
    """A message with arrays as N1.6 has them."""
    data: bytes = msgpack.packb(message, default=Codec(DEFAULT).write)
    return data


def test_the_token_and_hosts_that_others_reach(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")

    async def work(server: Server) -> None:
        async with client(server) as socket:
            for wrong in ({}, {"api_token": "0123456789abcdeX"}, {"api_token": 3}):
                assert await ask(socket, {"endpoint": "ping"} | wrong) == {"error": "Unauthorized: Invalid API token"}
            assert (await ask(socket, {"endpoint": "ping", "api_token": "0123456789abcdef"}))["status"] == "ok"

    served(work)(groot_port=0, token_file=str(tmp_path / "token"))
    with pytest.raises(ValidationError, match="allow_plain_zmq=true"):
        Serve(host="0.0.0.0", groot_port=5555, token_file="token")
    with pytest.raises(ValidationError, match="needs a token"):
        Serve(host="0.0.0.0", groot_port=5555, allow_plain_zmq=True)
    Serve(host="0.0.0.0", groot_port=5555, allow_plain_zmq=True, token_file="token")


def test_numpy_files_are_measured_before_anything_is_made_of_them() -> None:
    def saved(values: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, values)
        return file.getvalue()

    rows = np.arange(6.0).reshape(2, 3)
    for values in (rows, np.asfortranarray(rows.astype(">i2")), np.array(True), np.zeros((0, 3)), np.zeros(3, np.uint8)):
        np.testing.assert_array_equal(npy(saved(values), DEFAULT), values)
    good = saved(np.zeros(4, np.float32))
    for bad, sentence in (
        (b"", "NumPy file"),
        (b"\x93NUMPY\x03\x00" + good[8:], "version 1 or 2"),
        (good[:-1], "are not an array"),
        (good.replace(b"(4,)", b"(9,)"), "are not an array"),
        (good.replace(b"(4,), }" + b" " * 30, b"(99999999999999999999999999999999,), }"[:37]), "not one of a plain array"),
        (good.replace(b"'<f4'", b"'|O8'"), "is not accepted"),
        (good.replace(b"False", b"exit("), "plain array"),
        (good[:8] + b"\xff\xff" + good[10:], "plain array"),
        (3, "NumPy file"),
    ):
        with pytest.raises(WireError, match=sentence):
            npy(bad, DEFAULT)
    with pytest.raises(WireError, match="more than 2 arrays"):
        unpack(pack([{"__ndarray_class__": True, "as_npy": good}] * 3), also=Codec(Limits(arrays=2)).read)


def test_strangers_at_the_port_are_sent_away() -> None:
    def frame(body: bytes, flags: int = 0) -> bytes:
        return struct.pack(">BB", flags, len(body)) + body

    def ready(kind: bytes) -> bytes:
        return frame(b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind, 4)

    async def strange(server: Server, *sent: bytes) -> bytes:
        """What comes back until the server closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port_of("groot_port"))
        writer.write(b"".join(sent))
        try:
            async with asyncio.timeout(5):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()

    hello = GREETING + ready(b"REQ")
    wrong = (
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(60),),
        (GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32),),
        (GREETING, ready(b"PUB")),
        (GREETING, frame(b"\x05READY", 4)),
        (GREETING, b"\x06" + struct.pack(">Q", 1 << 40)),
        (hello, frame(b"", 1), b"\x02" + struct.pack(">Q", (1 << 20) + 1)),
        (hello, frame(b"x", 1) * 4),
        (hello, frame(b"", 1), frame(b"", 1)),
        (hello, frame(b"body without a delimiter")),
        (hello, b"\xff\xff"),
    )

    async def work(server: Server) -> None:
        for sent in wrong:
            await strange(server, *sent)
        async with client(server, zmq.DEALER) as socket:
            await socket.send_multipart([b"number 7", b"", FRAMES["n1.6 ping"]])
            envelope, empty, body = await socket.recv_multipart()
            assert (envelope, empty) == (b"number 7", b"") and unpack(body)["status"] == "ok"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port_of("groot_port"))
        writer.write(hello + frame(b"\x04PING\x00\x00hi", 4))
        assert await reader.readexactly(len(GREETING) + 2 + len(READY)) == GREETING + frame(READY, 4)
        assert await reader.readexactly(9) == frame(b"\x04PONGhi", 4)
        writer.close()
        while server.connections:
            await asyncio.sleep(0.01)

    served(work)(groot_port=0, frame_mib=1)


def test_stopping_answers_what_was_asked() -> None:
    async def work(server: Server) -> None:
        async with client(server) as socket:
            question = said.groot()["nested"]
            question["data"]["observation"]["language"] = {"task": [["sleep 0.5"]]}
            asked = asyncio.create_task(ask(socket, packed(question)))
            await asyncio.sleep(0.2)
            await server.stop()
            assert (await asked)[0]["arm"].shape == (1, 50, 31)

    served(work)(groot_port=0, keys=KEYS)

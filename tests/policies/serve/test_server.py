"""Our own protocol over a real socket, and what operators ask over HTTP."""

import asyncio
import contextlib
import gc
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from triune_client import outofband
from triune_client.wire import EncodedImage, pack, unpack
from websockets.asyncio.client import ClientConnection, connect

from triune.policies.serve import Server

from .conftest import seen, served
from .fakes import expected

pytestmark = pytest.mark.usefixtures("fakes")


async def ask(socket: ClientConnection, **message: Any) -> dict[str, Any]:
    await socket.send(pack({"id": 1} | message))
    answer = unpack(await socket.recv())
    assert answer["id"] == message.get("id", 1)
    return answer


@contextlib.asynccontextmanager
async def greeted(server: Server, **hello: Any) -> AsyncIterator[ClientConnection]:
    async with connect(server.url + "/v1", compression=None, max_size=None) as socket:
        answer = await ask(socket, type="hello", protocol=1, client="test", **hello)
        assert answer["type"] == "welcome", answer
        yield socket


async def get(server: Server, path: str) -> tuple[int, bytes]:
    def fetch() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(server.url.replace("ws", "http", 1) + path, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(fetch)


def test_hello_reset_infer_end() -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            assert (await ask(socket, type="reset", session="a", seed=5))["type"] == "ready"
            for step in range(2):
                observation = seen(step)
                plan = await ask(socket, id=7 + step, type="infer", session="a", observation=observation, foresight=step == 0)
                np.testing.assert_array_equal(plan["actions"], expected(5, step, observation["state"], observation["images"]))
                assert plan["time"] == 0.25 and plan["rate"] == 50.0 and {"decode", "queue", "model"} <= plan["timing"].keys()
                assert ("foresight" in plan) == (step == 0)
            assert (await ask(socket, type="end", session="a"))["type"] == "ready"
            late = await ask(socket, type="infer", session="a", observation=seen())
            assert late["code"] == "bad_request" and "has not begun" in late["message"]
        while server.service.sessions or server.connections:
            await asyncio.sleep(0.01)

    served(work)()


@pytest.mark.parametrize("pictures", ["pixels", "files"])
def test_a_plan_comes_as_it_was_asked_for(pictures: str) -> None:
    """Large messages are read into memory that the policy's process shares; several at once do not meet there."""
    sent = [seen(step) for step in range(6)]

    def asked(number: int) -> dict[str, Any]:
        images = sent[number]["images"]
        if pictures == "files":
            images = {camera: EncodedImage(image.tobytes(), "raw", image.shape) for camera, image in images.items()}
        return {"type": "infer", "id": number, "session": f"s{number}", "observation": sent[number] | {"images": images}}

    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            for number in range(6):
                await ask(socket, type="reset", session=f"s{number}", seed=number)
            for number in range(6):
                await socket.send(b"".join(outofband.pack_parts(asked(number))) if number % 2 else pack(asked(number)))
            for _ in range(6):
                answer = await socket.recv()
                behind = outofband.is_out_of_band(answer)
                plan = outofband.unpack(answer) if behind else unpack(answer)
                number, observation = plan["id"], sent[plan["id"]]
                assert behind == number % 2
                np.testing.assert_array_equal(plan["actions"], expected(number, 0, observation["state"], observation["images"]))
            await socket.send(b"".join(outofband.pack_parts(asked(1) | {"session": "nobody"})))
            assert "has not begun" in unpack(await socket.recv())["message"]

    served(work)()


def test_sessions_of_a_client_that_leaves_end() -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            for name in "abc":
                await ask(socket, type="reset", session=name, seed=1)
            await socket.send(pack({"type": "infer", "id": 3, "session": "a", "observation": seen(instruction="sleep 0.2")}))
            assert len(server.service.sessions) == 3
        while server.service.sessions or server.connections:
            await asyncio.sleep(0.01)

    served(work)()


def test_an_answer_to_a_client_that_has_left_is_no_defect() -> None:
    async def work(server: Server) -> None:
        heard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
        for deadline in (1e-4, None):  # refused and answered, both after it left
            async with greeted(server) as socket:
                await ask(socket, type="reset", session="a", seed=1)
                for number in range(16):
                    asked = {"session": "a", "observation": seen(size=32), "deadline": deadline}
                    await socket.send(pack({"type": "infer", "id": number} | asked))
                socket.transport.abort()
            while server.service.sessions or server.connections:
                await asyncio.sleep(0.01)
        gc.collect()
        await asyncio.sleep(0.05)
        assert not heard

    served(work, size=32)()


def test_pictures_may_come_encoded() -> None:
    from io import BytesIO

    from PIL import Image

    async def work(server: Server) -> None:
        observation = seen()
        encoded = dict(observation["images"])
        file = BytesIO()
        Image.fromarray(encoded["wrist"]).save(file, "png")
        encoded["wrist"] = EncodedImage(file.getvalue(), "png", (224, 224, 3))
        async with greeted(server) as socket:
            await ask(socket, type="reset", session="a", seed=5)
            plan = await ask(socket, type="infer", session="a", observation=observation | {"images": encoded})
            np.testing.assert_array_equal(plan["actions"], expected(5, 0, observation["state"], observation["images"]))

    served(work)()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"type": "infer", "session": "a", "observation": {"images": {}}}, "state must be an array"),
        ({"type": "infer", "session": "a"}, "has an observation"),
        ({"type": "infer", "session": "a", "observation": seen() | {"state": np.full(8, np.nan, np.float32)}}, "finite"),
        ({"type": "infer", "session": "a", "observation": seen(), "deadline": "soon"}, "deadline must be"),
        ({"type": "infer", "session": "a", "observation": seen(), "delay": -1}, "delay must be"),
        ({"type": "infer", "session": "a", "observation": seen() | {"state": [[1.0], [1.0, 2.0]]}}, "state must be an array"),
        ({"type": "infer", "session": "a", "observation": seen() | {"images": {b"wrist": 1}}}, "names of cameras"),
        ({"type": "infer", "session": "b", "observation": seen()}, "has not begun"),
        ({"type": "infer", "observation": seen()}, "names its session"),
        ({"type": "reset", "session": "x" * 200}, "names its session"),
        ({"type": "reset", "session": "b", "seed": -1}, "seed must be"),
        ({"type": "kill"}, "there is no message 'kill'"),
        ({"type": "infer", "session": "a", "observation": seen(instruction="mistake")}, "too long for policy.json"),
    ],
)
def test_bad_messages_get_a_sentence_and_the_connection_goes_on(message: dict[str, Any], said: str) -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            await ask(socket, type="reset", session="a", seed=5)
            answer = await ask(socket, **message)
            assert answer["type"] == "error" and answer["code"] == "bad_request" and said in answer["message"]
            assert "/srv" not in answer["message"]
            assert (await ask(socket, type="infer", session="a", observation=seen()))["type"] == "plan"

    served(work)()


def test_a_robot_that_does_not_fit_is_refused_with_the_mend() -> None:
    async def work(server: Server) -> None:
        contract = server.service.contract.model_dump(mode="json")
        async with greeted(server, contract=contract):
            pass
        contract["cameras"] = contract["cameras"][:1]
        async with connect(server.url + "/v1") as socket:
            answer = await ask(socket, type="hello", protocol=1, contract=contract)
            assert answer["code"] == "contract" and "wrist" in answer["message"] and "map the robot" in answer["message"]
        async with connect(server.url + "/v1") as socket:
            assert "install the triune-client" in (await ask(socket, type="hello", protocol=9))["message"]

    served(work)()


def test_operators_are_answered_while_the_policy_thinks() -> None:
    async def work(server: Server) -> None:
        assert await get(server, "/healthz") == (200, b"OK\n")
        assert await get(server, "/readyz") == (200, b"ready\n")
        assert (await get(server, "/nowhere"))[0] == 404
        async with greeted(server) as socket:
            await ask(socket, type="reset", session="a", seed=5)
            thinking = asyncio.create_task(ask(socket, type="infer", session="a", observation=seen(instruction="sleep 1")))
            times = []
            while not thinking.done():
                began = asyncio.get_running_loop().time()
                await get(server, "/healthz")
                times.append(asyncio.get_running_loop().time() - began)
            assert len(times) > 10 and sorted(times)[len(times) // 2] < 0.1

    served(work)()


def test_stopping_answers_what_was_asked() -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            await ask(socket, type="reset", session="a", seed=5)
            thinking = asyncio.create_task(ask(socket, type="infer", session="a", observation=seen(instruction="sleep 0.5")))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(server.stop())
            assert (await thinking)["type"] == "plan"
            await stopping

    served(work)()


def test_while_it_stops_the_server_says_that_it_is_not_ready_and_takes_no_more_requests() -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket, greeted(server) as other:
            for line in (socket, other):
                await ask(line, type="reset", session="a", seed=5)
            thinking = asyncio.create_task(ask(socket, type="infer", session="a", observation=seen(instruction="sleep 0.7")))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.1)
            assert await get(server, "/readyz") == (503, b"not ready\n") and (await get(server, "/healthz"))[0] == 200
            assert (await get(server, "/v1"))[0] == 503
            refused = await ask(other, type="infer", session="a", observation=seen())
            assert refused["code"] == "worker" and "is stopping" in refused["message"]
            assert (await thinking)["type"] == "plan"
            await stopping

    served(work)()

"""vla-evaluation-harness: its own runner and connection, and what goes wrong."""

import asyncio
import json
import urllib.request

import numpy as np
import pytest
from websockets.asyncio.client import connect

from triune.data import Camera, Contract
from triune.data.contract import Vector
from triune.policies.serve import Server
from triune.policies.serve.dialects.harness import action_spec, observation_spec

from .conftest import served
from .golden import said
from .talking import answered, ask, run_peer
from .test_golden import FRAMES

pytestmark = pytest.mark.usefixtures("fakes")


def test_the_unmodified_runner_of_the_harness_drives_the_server() -> None:
    def chunk(seed: int, step: int, shown: int) -> np.ndarray:
        image = np.full((32, 32, 3), shown, np.uint8)
        return answered(seed, step, np.full(8, shown / 10, np.float32), {"agentview": image, "wrist": 255 - image})

    async def work(server: Server) -> None:
        url = server.url.rsplit(":", 1)[0] + f":{server.port_of('harness_port')}"
        found = await run_peer("harness_drives.py", url)
        assert found["info"]["model_server"] == "fake" and found["info"]["protocol_version"] == 1
        assert found["info"]["observation_params"] == {"send_wrist_image": True, "send_state": True}
        assert "send episode_start before the first observation" in found["error"]
        for seed, episode in enumerate(found["episodes"]):
            assert episode["steps"] == 30
            np.testing.assert_array_equal(np.float32(episode["told"][:25]), chunk(seed, 0, 0)[:25])
            np.testing.assert_array_equal(np.float32(episode["told"][25:]), chunk(seed, 1, 25)[:5])
        assert found["warnings"] == []  # the contract of the fake says nothing that could differ

        def read(path: str) -> dict[str, object]:
            with urllib.request.urlopen(url.replace("ws", "http") + path, timeout=10) as answer:
                found: dict[str, object] = json.load(answer)
                return found

        assert await asyncio.to_thread(read, "/health") == {"status": "ok"}
        changed = await asyncio.to_thread(read, "/config?max_batch_size=99")
        assert changed == {"applied": {}, "config": {"max_batch_size": 8, "max_wait_time": 0.02}, "read_only": True}

    served(work)(harness_port=0)


def test_its_bytes_and_what_goes_wrong() -> None:
    async def work(server: Server) -> None:
        async with connect(server.url + "/harness", compression=None) as socket:
            assert (await ask(socket, FRAMES["harness hello"]))["payload"]["capabilities"] == {}
            await socket.send(FRAMES["harness start"])
            answer = await ask(socket, FRAMES["harness observation"])
            assert (answer["type"], answer["seq"]) == ("action", 3)
            np.testing.assert_array_equal(answer["payload"]["actions"], answered(0, 0, said.state().astype(np.float32))[0])
            message = {"payload": {}, "seq": 5, "timestamp": 0.0}
            for wrong, sentence in (
                (b"\x00", "a message is a map"),
                (message, "a message is a map of type"),
                (message | {"type": "kill"}, "there is no message 'kill'"),
                (message | {"type": "hello", "payload": {"protocol_version": 2}}, "speaks version 1"),
                (message | {"type": "action", "seq": "x"}, "its seq a whole number"),
            ):
                answer = await ask(socket, wrong)
                assert answer["type"] == "error" and sentence in answer["payload"]["error"]
            await socket.send(FRAMES["harness end"])
            answer = await ask(socket, FRAMES["harness observation"])
            assert answer["type"] == "error" and answer["seq"] == 3
            assert not server.service.sessions

    served(work)()


def test_conventions_are_said_in_the_words_of_the_harness() -> None:
    names = tuple("abcdefg")
    action = Vector(names=names, rotation="axis_angle", gripper="-1 opens, +1 closes", mode="relative")
    assert {key: value["format"] for key, value in action_spec(action).items()} == {
        "position": "delta_xyz",
        "rotation": "axis_angle",
        "gripper": "binary_close_positive",
    }
    assert action_spec(Vector(names=names)) == {} == action_spec(action.model_copy(update={"names": names[:5]}))
    state = Vector(names=(*names, "h"), rotation="axis_angle")
    spec = observation_spec(Contract(cameras=(Camera(name="top"), Camera(name="side", optional=True)), state=state, action=action))
    assert spec["state"]["format"] == "eef_pos3_axisangle3_gripper2" and spec["state"]["dims"] == 8
    assert set(spec) == {"top", "language", "state"}

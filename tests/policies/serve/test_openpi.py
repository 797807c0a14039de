"""openpi's and StarVLA's protocol: openpi's own client, StarVLA's own bytes."""

import asyncio
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from triune.policies.serve import Server

from .conftest import served
from .golden import said
from .talking import IMAGES, answered, ask, run_peer
from .test_golden import FRAMES

pytestmark = pytest.mark.usefixtures("fakes")
SEEN: dict[str, Any] = {"images": IMAGES, "state": said.state(), "prompt": "lift"}


def test_the_unmodified_client_of_openpi_drives_the_server() -> None:
    def seen(step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rng = np.random.default_rng(step)
        images = {name: rng.integers(0, 255, (32, 32, 3), np.uint8) for name in said.CAMERAS}
        return images, rng.standard_normal(8)

    async def work(server: Server) -> None:
        found = await run_peer("openpi_drives.py", server.url)
        chunks = [answered(0, step, seen(step)[1], seen(step)[0]) for step in range(4)]
        np.testing.assert_array_equal(np.float32(found["actions"]), chunks[:2])
        np.testing.assert_array_equal(np.float32(found["steps"]), [chunks[2][0], chunks[2][24], chunks[3][0]])
        assert found["timing"] == [["infer_ms", "infer_ms"], ["infer_ms", "prev_total_ms", "infer_ms"]]
        assert "lacks a picture of camera 'agentview'; it has prompt" in found["error"] and "Traceback" not in found["error"]
        assert found["metadata"]["action_chunk_size"] == 50 and found["metadata"]["action_horizon"] == 25
        assert found["metadata"]["available_unnorm_keys"] == ["fake"] and found["metadata"]["state_keys"][0] == "state.s0"
        while server.service.sessions:
            await asyncio.sleep(0.01)

    served(work)()


def test_starvla() -> None:
    async def work(server: Server) -> None:
        async with connect(server.url + "/", compression=None) as socket:
            await socket.recv()
            answer = await ask(socket, FRAMES["starvla flat"])
            assert (answer["status"], answer["ok"], answer["type"], answer["request_id"]) == ("ok", True, "inference_result", "default")
            np.testing.assert_array_equal(answer["data"]["actions"], answered(0, 0)[None])
            answer = await ask(socket, FRAMES["starvla typed"])
            second = {name: said.picture(i + 1) for i, name in enumerate(said.CAMERAS)}
            assert answer["request_id"] == "r1"
            np.testing.assert_array_equal(answer["data"]["actions"], [answered(0, 1), answered(1, 0, images=second)])
            assert await ask(socket, FRAMES["starvla ping"]) == said.openpi()["starvla pong"]
            assert (await ask(socket, {"type": "infer", "payload": SEEN}))["data"]["actions"].shape == (1, 50, 32)
            for message, sentence in (
                ({"type": "infer", "payload": 3}, "payload must be a map"),
                ({"type": "unload"}, "there is no message 'unload'"),
                ({"examples": []}, "examples must be a list"),
                ({"examples": [{"image": [said.picture(0)] * 3, "lang": "lift"}]}, "in order: agentview, wrist"),
                ({"examples": [{"image": [said.picture(0)], "lang": "lift", "state": said.state()}]}, "camera 'wrist'"),
                ({"type": "infer", "payload": SEEN | {"unnorm_key": "bridge"}}, "the one unnorm_key of this policy is 'fake'"),
            ):
                answer = await ask(socket, message)
                assert answer["ok"] is False and answer["status"] == "error" and sentence in answer["error"]["message"]

    served(work)()


def test_errors_are_a_sentence_and_the_session_goes_on() -> None:
    async def work(server: Server) -> None:
        async with connect(server.url + "/", compression=None) as socket:
            await socket.recv()
            for message, sentence in (
                (b"\xc1", "not a message"),
                ([1], "a message must be a map"),
                (SEEN | {"prompt": "mistake"}, "the text is too long for policy.json"),
                (SEEN | {"prompt": "raise"}, "the policy failed"),
                (SEEN | {"state": np.zeros(7)}, "the state has 7 numbers (state: 7), the policy takes 8"),
                (SEEN | {"state": np.full(8, np.nan)}, "finite"),
                (SEEN | {"images": {name: np.zeros((4, 4, 1), np.uint8) for name in IMAGES}}, "must be a uint8 array"),
                (SEEN | {"images.wrist": IMAGES["wrist"]}, "the same path 'images/wrist'"),
                (SEEN | {b"key": 1}, "must be text"),
                ({key: SEEN[key] for key in ("images", "state")}, "lacks an instruction"),
            ):
                answer = await ask(socket, message)
                assert isinstance(answer, str) and sentence in answer and "Traceback" not in answer and "/home" not in answer
            np.testing.assert_array_equal((await ask(socket, SEEN))["actions"], answered(0, 0))

    served(work)()


def test_keys_of_the_config_and_the_token(tmp_path: Any) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    keys = {"cameras": {"agentview": "cam.front"}, "state": ["joints", "grip"], "instruction": "lift"}

    async def work(server: Server) -> None:
        with pytest.raises(InvalidStatus):
            await connect(server.url + "/")
        for header in ("Api-Key 0123456789abcdef", "Basic eDowMTIzNDU2Nzg5YWJjZGVm"):
            async with connect(server.url + "/", additional_headers={"Authorization": header}) as socket:
                await socket.recv()
                numbers = {"joints": said.state()[:7], "grip": said.state()[7]}
                front = {
                    "cam": {"front": IMAGES["agentview"].transpose(2, 0, 1)},
                    "observation.images.wrist": IMAGES["wrist"][None] / 255.0,
                }
                answer = await ask(socket, numbers | front)
                assert not isinstance(answer, str), answer
                assert answer["actions"].shape == (50, 32)
                assert "camera 'agentview'" in await ask(socket, numbers | {"agentview": IMAGES["agentview"], "wrist": IMAGES["wrist"]})

    served(work)(keys=keys, token_file=str(tmp_path / "token"))

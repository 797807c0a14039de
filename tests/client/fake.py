"""A small server of protocol ``triune 1`` that thinks nothing, for tests of the client; also on Python 3.8, without pytest.

Session names say what it does: ``slow`` thinks 0.3 s, ``never`` does not answer, ``bad`` is refused, ``gone`` ends the connection,
``junk`` is answered by what is no message, ``flat`` by actions of one dimension, ``draining`` by a farewell. ``act`` answers in place of
the ramp of ``plan``: it is called with each reset and each request.
"""

import asyncio
import contextlib
import threading
from http import HTTPStatus

import numpy as np
from triune_client import EncodedImage, decode_image, pack, unpack
from websockets.asyncio.server import serve

CONTRACT = {
    "cameras": [{"name": "agentview"}, {"name": "wrist", "optional": True}],
    "state": {"names": ["x", "y", "z"]},
    "action": {"names": ["dx", "dy"]},
    "rate": 20.0,
    "chunk": 4,
    "executed": 2,
}


class Fake:
    """Serves in a thread of its own while it is entered. ``seen`` has what clients sent."""

    def __init__(self, token=None, contract=None, welcome=None, ssl=None, port=0, act=None):
        self.act = act
        self.token, self.contract, self.welcome, self.ssl, self.port = token, contract or CONTRACT, welcome or {}, ssl, port
        self.seen, self.sessions = [], {}

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)
        self.url = f"{'wss' if self.ssl else 'ws'}://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def _run(self, ready):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve(ready))
        self.loop.close()

    async def _serve(self, ready):
        self.over = asyncio.Event()
        options = {"compression": None, "max_size": None, "ssl": self.ssl, "process_request": self._admit, "close_timeout": 1}
        async with serve(self._speak, "127.0.0.1", self.port, **options) as server:
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self.over.wait()

    def _admit(self, connection, request):
        if self.token is not None and request.headers.get("Authorization") != "Bearer " + self.token:
            return connection.respond(HTTPStatus.UNAUTHORIZED, "this server asks for its token\n")
        if request.path != "/v1":
            return connection.respond(HTTPStatus.NOT_FOUND, "nothing here\n")
        return None

    async def _speak(self, connection):
        tasks = set()
        with contextlib.suppress(Exception):
            async for frame in connection:
                message = unpack(frame)
                self.seen.append(message)
                task = asyncio.ensure_future(self._answer(connection, message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()

    async def _answer(self, connection, message):
        kind, number, session = message["type"], message["id"], message.get("session")
        if kind == "hello":
            hello = {"type": "welcome", "id": 0, "protocol": 1, "server": "fake 1", "policy": "ramp", "contract": self.contract}
            more = {"limits": None, "realtime": {"prefix": 2, "guided": True}, "executed": 2, "chunk": 4, "rate": 20.0}
            declared = message["contract"]
            if declared is not None and declared["action"] != self.contract["action"]:
                refused = {"type": "error", "id": 0, "code": "contract", "message": "actions differ: retrain the policy"}
                await connection.send(pack(refused))
                return await connection.close()
            return await connection.send(pack({**hello, **more, **self.welcome}))
        if kind == "reset":
            self.sessions[session] = [message["seed"], 0]
            if self.act is not None:
                self.act(message)
        if kind in ("reset", "end"):
            return await connection.send(pack({"type": "ready", "id": number}))
        if session == "never":
            return None
        if session == "gone":
            return await connection.close(1011, "the worker died")
        if session == "junk":
            return await connection.send(b"\xc1\xc1")
        if session == "draining":
            await connection.send(pack({"type": "error", "id": 0, "code": "busy", "message": "the server stops: connect again"}))
            return await connection.close(1001, "going away")
        if session == "bad":
            return await connection.send(pack({"type": "error", "id": number, "code": "bad_request", "message": "no camera wrist"}))
        if session == "slow":
            await asyncio.sleep(0.3)
        actions = self.act(message) if self.act is not None else plan(self.sessions.setdefault(session, [0, 0]), message["observation"])
        reply = {"type": "plan", "id": number, "actions": actions, "rate": 20.0, "time": message["observation"].get("timestamp", 0.0)}
        reply.update(timing={"queue": 0.1}, events={"clamp": 1}, value=0.5)
        if message["foresight"]:
            reply["foresight"] = {camera: np.zeros_like(_pixels(image)) for camera, image in message["observation"]["images"].items()}
        if session == "flat":
            reply["actions"] = actions[0]
        return await connection.send(pack(reply))


def plan(session, observation):
    """(4, 2) actions: a function of the session's seed and step, the state, and every camera's pixels."""
    seed, step = session
    session[1] += 1
    pixels = sum(float(_pixels(image).mean()) for image in observation["images"].values())
    start = seed + step + float(np.sum(observation["state"])) + pixels
    return (start + np.arange(8)).reshape(4, 2).astype(np.float32)


def _pixels(image):
    return decode_image(image) if isinstance(image, EncodedImage) else image

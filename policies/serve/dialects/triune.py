"""Our own protocol, version 1: the client speaks first and says what it has; sessions, deadlines and settled actions have words.

Several requests may be under way on one connection; an answer carries the ``id`` of its question. Messages are msgpack maps:

    hello {protocol, client, contract?}                                 -> welcome {contract, limits, realtime, ...}
    reset {session, seed?}, end {session}                               -> ready
    infer {session, observation, prefix?, delay?, samples?, deadline?, foresight?} -> plan {actions, rate, time, timing, events, ...}

and ``error {id, code, message}`` instead of any of the answers.
"""

import asyncio
import contextlib
import logging
import math
import time
from typing import Any

import numpy as np
from triune_client.wire import EncodedImage, WireError, decode_image
from websockets.exceptions import ConnectionClosed

from ....config import parse
from ....data import ActionChunk, Contract, Observation
from ....errors import UserError
from ...base import Request
from ..exchange import Refusal, Reply
from ..line import Line
from ..security import public
from ..service import Service

logger = logging.getLogger(__name__)

PROTOCOL = 1
LONGEST = 100
"""Characters of a session's name."""
SESSIONS = 64
"""Sessions of one connection."""
SAMPLES = 16
"""Chunks of one request."""


async def speak(line: Line, service: Service, welcome: dict[str, Any]) -> None:
    """Serve one connection until it closes; then its sessions end.

    Args:
        welcome: what every client is told of this server.
    """
    greeted = False
    loop, sessions = asyncio.get_running_loop(), dict[str, str]()
    tasks: set[asyncio.Task[None]] = set()
    try:
        async for frame in line.frames():
            number = 0
            try:
                message = line.decode(frame)
                kind, number = _head(message)
                if kind == "hello":
                    _greet(message, service)
                    greeted = True
                    await line.send({"type": "welcome", "id": number} | welcome)
                    continue
                if not greeted:
                    raise Refusal("bad_request", f"the first message must be hello, and '{kind[:20]}' came")
                if len(tasks) >= line.in_flight:
                    raise Refusal("busy", f"{len(tasks)} requests of this connection are under way; wait for an answer before the next")
                work = await _work(kind, message, line, service, sessions)
            except Refusal as refusal:
                service.refused(refusal, line.name)
                await line.send(_error(number, refusal))
                if not greeted:
                    return
                continue
            task = asyncio.Task(_answer(number, work, line), loop=loop, eager_start=True)  # a turn of the loop sooner
            if not task.done():
                tasks.add(task)
                task.add_done_callback(tasks.discard)
    finally:
        await asyncio.sleep(0)  # a task that is cancelled before its first step forgets what it was to do
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name in [name for name in service.sessions if name.startswith(f"{line.name}/")]:
            await service.close(name)


def _head(message: Any) -> tuple[str, int]:
    """Kind and number of a message."""
    if not isinstance(message, dict) or not isinstance(message.get("type"), str) or not isinstance(message.get("id"), int):
        raise Refusal("bad_request", "a message is a map with a text 'type' and a whole number 'id'")
    return message["type"], message["id"]


def _greet(message: dict[str, Any], service: Service) -> None:
    """Refuse a client of another protocol, or one whose robot is not what the policy was made for."""
    theirs = message.get("protocol")
    if theirs != PROTOCOL:
        raise Refusal(
            "bad_request",
            f"this server speaks protocol {PROTOCOL}, the client {message.get('protocol')}; install the triune-client of its version",
        )
    declared = message.get("contract")
    if declared is None:
        return
    try:
        robot = parse(Contract, declared, "the contract in hello")
    except UserError as error:
        raise Refusal("bad_request", public(str(error))) from None
    if found := service.contract.conflicts(robot):
        mend = "map the robot's cameras and numbers to what the policy was trained on, or serve a policy that was trained on this robot"
        raise Refusal("contract", f"the client does not fit the policy: {'; '.join(found)}. To mend it, {mend}")


async def _work(kind: str, message: dict[str, Any], line: Line, service: Service, sessions: dict[str, str]) -> Any:
    """What a message asks for, as a coroutine of the answer. Sessions begin and end in the order of messages."""
    if kind not in ("reset", "end", "infer"):
        raise Refusal("bad_request", f"there is no message '{kind[:20]}'; known: hello, reset, infer, end")
    name = message.get("session")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST or not name.isprintable():
        raise Refusal("bad_request", f"a message names its session, a text of 1 to {LONGEST} printable characters")
    if kind == "reset":
        seed = message.get("seed", line.seed + len(sessions))
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise Refusal("bad_request", "seed must be a whole number from 0 to 2^63 - 1")
        if name not in sessions and len(sessions) >= SESSIONS:
            raise Refusal("busy", f"this connection has {SESSIONS} sessions; end some before you begin others")
        sessions[name] = f"{line.name}/{name}"
        return _ready(service.reset(sessions[name], seed))
    if name not in sessions:
        raise Refusal("bad_request", f"session '{name}' has not begun: send a reset before the first request")
    if kind == "end":
        return _ready(service.close(sessions.pop(name)))
    request, decoded = await _request(message, sessions[name], service.contract, line)
    deadline = _number(message, "deadline", line.deadline, least=0.0)
    if any(isinstance(image, EncodedImage) for image in message["observation"]["images"].values()):
        line.timed("pictures", decoded)
    timing = {"decode": line.decoded + decoded}
    return _plan(service.plan(request, deadline, foresight=message.get("foresight") is True), timing)


async def _request(message: dict[str, Any], session: str, contract: Contract, line: Line) -> tuple[Request, float]:
    """The request in a message, and the milliseconds that its pictures took."""
    began = time.perf_counter()
    seen = message.get("observation")
    if not isinstance(seen, dict) or not isinstance(seen.get("images"), dict):
        raise Refusal("bad_request", "an infer message has an observation: images by camera, state, instruction, timestamp")
    images = dict(seen["images"])
    if not all(isinstance(camera, str) for camera in images):
        raise Refusal("bad_request", "the names of cameras are texts")
    try:
        for camera, image in images.items():
            if isinstance(image, EncodedImage):
                images[camera] = await asyncio.to_thread(decode_image, image, line.limits)
        words = {key: seen[key] for key in ("instruction", "embodiment", "subtask") if seen.get(key) is not None}
        if not all(isinstance(said, str) for said in words.values()):
            raise Refusal("bad_request", f"{', '.join(words)} must be texts")
        state, stamp = _array(seen.get("state"), "state"), _number(seen, "timestamp", 0.0)
        observation = Observation(images=images, state=state, timestamp=stamp or 0.0, **({"instruction": ""} | words))
        prefix = message.get("prefix")
        chunk = None if prefix is None else ActionChunk(_array(prefix, "prefix"), contract.rate or 0.0, observation.timestamp)
    except (UserError, WireError) as error:
        raise Refusal("bad_request", public(str(error))) from None
    delay, samples = message.get("delay", 0), message.get("samples", 1)
    for what, number, least, most in (("delay", delay, 0, 1000), ("samples", samples, 1, SAMPLES)):
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise Refusal("bad_request", f"{what} must be a whole number from {least} to {most}")
    return Request(session, observation, chunk, delay, samples), 1e3 * (time.perf_counter() - began)


def _array(value: Any, what: str) -> np.ndarray:
    if isinstance(value, list):
        numbers = all(isinstance(number, int | float) for number in value)
        value = np.array(value, np.float64) if numbers else None
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise Refusal("bad_request", f"{what} must be an array of numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
        return value.astype(np.float32, copy=False)


def _number(tree: dict[str, Any], key: str, default: float | None, least: float = -math.inf) -> float | None:
    value = tree.get(key, default)
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least):
        raise Refusal("bad_request", f"{key} must be a finite number" + (f" of at least {least:g}" if least > -math.inf else ""))
    return None if value is None else float(value)


async def _ready(done: Any) -> dict[str, Any]:
    await done
    return {"type": "ready"}


async def _plan(asked: Any, timing: dict[str, float]) -> dict[str, Any]:
    reply: Reply = await asked
    out = {"type": "plan", "actions": reply.actions, "rate": reply.rate, "time": reply.time, "timing": timing | reply.timing}
    out |= {"value": reply.value, "events": reply.events}
    out |= {} if reply.samples is None else {"samples": reply.samples}
    return out | ({"foresight": reply.foresight} if reply.foresight else {})


async def _answer(number: int, work: Any, line: Line) -> None:
    try:
        message = {"id": number} | await work
    except Refusal as refusal:
        message = _error(number, refusal)
    except Exception:  # a client that gets no answer waits for ever
        logger.exception("%s got no answer to request %d", line.name, number)
        message = _error(number, Refusal("internal", "the server failed on this request; its log says where"))
    with contextlib.suppress(ConnectionClosed, ConnectionError):  # the client left before its answer
        await line.send(message)


def _error(number: int, refusal: Refusal) -> dict[str, Any]:
    return {"type": "error", "id": number, "code": refusal.code, "message": public(str(refusal))}

"""Our own protocol, version 1: the client speaks first and says what it has; sessions, deadlines and settled actions have words.

Several requests may be under way on one connection; an answer carries the ``id`` of its question. Messages are msgpack maps:

    hello {protocol, client, contract?}                                 -> welcome {contract, limits, realtime, ...}
    reset {session, seed?}, end {session}                               -> ready
    infer {session, observation, prefix?, delay?, samples?, deadline?, foresight?} -> plan {actions, rate, time, timing, events, ...}

and ``error {id, code, message}`` instead of any of the answers. Arrays stand in the msgpack as openpi has them, or out of band
(``triune_client.outofband``) after a welcome that has ``out_of_band``; a plan comes as it was asked for.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from typing import Any

import numpy as np
from triune_client.outofband import is_out_of_band
from triune_client.wire import EncodedImage, WireError, decode_image
from websockets.exceptions import ConnectionClosed

from ....config import parse
from ....data import ActionChunk, Contract, Observation
from ....errors import UserError
from ...base import Request
from ..exchange import Refusal, Reply
from ..line import Line
from ..question import Question
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
FAILED = Refusal("internal", "the server failed on this request; its log says where")


async def speak(line: Line, service: Service, welcome: dict[str, Any]) -> None:
    """Serve one connection until it closes; then its sessions end.

    Args:
        welcome: what every client is told of this server.
    """
    talk = Talk(line, service, welcome)
    try:
        await line.listen(talk.hear)
    finally:
        await talk.end()


class Talk:
    """One connection. What needs no waiting is done in the turn of the event loop in which a message comes."""

    def __init__(self, line: Line, service: Service, welcome: dict[str, Any]) -> None:
        self.line, self.service, self.welcome = line, service, welcome
        self.greeted = False
        self.sessions: dict[str, str] = {}
        self.asked: set[_Asked] = set()
        self.tasks: set[asyncio.Future[None]] = set()

    def hear(self, frame: Any) -> Awaitable[None] | None:
        """Do what a message asks for. Gives what has to be waited for before the next message."""
        number, behind = 0, is_out_of_band(frame)
        try:
            message = self.line.decode(frame, out_of_band=behind)
            kind, number = _head(message)
            if kind == "hello":
                _greet(message, self.service)
                self.greeted = True
                return self.line.say({"type": "welcome", "id": number} | self.welcome)
            if not self.greeted:
                raise Refusal("bad_request", f"the first message must be hello, and '{kind[:20]}' came")
            under_way = len(self.asked) + len(self.tasks)
            if under_way >= self.line.in_flight:
                raise Refusal("busy", f"{under_way} requests of this connection are under way; wait for an answer before the next")
            return self._do(kind, number, message, behind)
        except Refusal as refusal:
            return self._refuse(number, refusal)

    async def end(self) -> None:
        """The client has gone."""
        for asked in self.asked:
            asked.question.give_up()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for name in [name for name in self.service.sessions if name.startswith(f"{self.line.name}/")]:
            await self.service.close(name)

    def _do(self, kind: str, number: int, message: dict[str, Any], behind: bool) -> Awaitable[None] | None:
        """Sessions begin and end in the order of messages."""
        if kind not in ("reset", "end", "infer"):
            raise Refusal("bad_request", f"there is no message '{kind[:20]}'; known: hello, reset, infer, end")
        name, sessions = message.get("session"), self.sessions
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST or not name.isprintable():
            raise Refusal("bad_request", f"a message names its session, a text of 1 to {LONGEST} printable characters")
        if kind == "reset":
            seed = message.get("seed", self.line.seed + len(sessions))
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
                raise Refusal("bad_request", "seed must be a whole number from 0 to 2^63 - 1")
            if name not in sessions and len(sessions) >= SESSIONS:
                raise Refusal("busy", f"this connection has {SESSIONS} sessions; end some before you begin others")
            sessions[name] = f"{self.line.name}/{name}"
            self._start(self._ready(number, self.service.reset(sessions[name], seed)))
            return None
        if name not in sessions:
            raise Refusal("bad_request", f"session '{name}' has not begun: send a reset before the first request")
        if kind == "end":
            self._start(self._ready(number, self.service.close(sessions.pop(name))))
            return None
        seen = message.get("observation")
        if not isinstance(seen, dict) or not isinstance(seen.get("images"), dict):
            raise Refusal("bad_request", "an infer message has an observation: images by camera, state, instruction, timestamp")
        if any(isinstance(image, EncodedImage) for image in seen["images"].values()):
            return self._infer_decoded(number, message, sessions[name], behind)
        self._infer(number, message, sessions[name], behind, seen["images"])
        return None

    async def _infer_decoded(self, number: int, message: dict[str, Any], session: str, behind: bool) -> None:
        """``_infer`` of pictures that have to be decoded first."""
        began, images = time.perf_counter(), dict(message["observation"]["images"])
        try:
            for camera, image in images.items():
                if isinstance(image, EncodedImage):
                    images[camera] = await asyncio.to_thread(decode_image, image, self.line.limits)
            spent = 1e3 * (time.perf_counter() - began)
            self.line.timed("pictures", spent)
            self._infer(number, message, session, behind, images, spent)
        except WireError as error:
            later = self._refuse(number, Refusal("bad_request", public(str(error))))
        except Refusal as refusal:
            later = self._refuse(number, refusal)
        else:
            return
        if later is not None:
            await later

    def _infer(
        self, number: int, message: dict[str, Any], session: str, behind: bool, images: dict[str, Any], pictures: float = 0.0
    ) -> None:
        decoded = self.line.decoded  # of this message: the next is not read before
        request = _request(message, session, images, self.service.contract)
        deadline = _number(message, "deadline", self.line.deadline, least=0.0)
        asked = _Asked(self, number, behind, decoded + pictures)
        self.asked.add(asked)
        asked.question = self.service.ask(request, asked.answered, deadline, message.get("foresight") is True)

    async def _ready(self, number: int, done: Awaitable[None]) -> None:
        try:
            await done
            message: dict[str, Any] = {"id": number, "type": "ready"}
        except Refusal as refusal:
            message = _error(number, refusal)
        except Exception:  # a client that gets no answer waits for ever
            logger.exception("%s got no answer to request %d", self.line.name, number)
            message = _error(number, FAILED)
        await self.line.send(message)

    def say(self, message: dict[str, Any], behind: bool = False) -> None:
        """Answer."""
        later = self.line.say(message, behind)
        if later is not None:
            self._start(later)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ConnectionClosed | ConnectionError):  # the client left before its answer
            logger.error("%s got no answer", self.line.name, exc_info=error)

    def _refuse(self, number: int, refusal: Refusal) -> Awaitable[None] | None:
        self.service.refused(refusal, self.line.name)
        said = _error(number, refusal)
        return self.line.say(said) if self.greeted else self._send_away(said)

    async def _send_away(self, said: dict[str, Any]) -> None:
        await self.line.send(said)
        raise ConnectionAbortedError("what is no client of this protocol is not listened to")


class _Asked:
    """A request under way."""

    __slots__ = ("behind", "decode", "number", "question", "talk")

    question: Question

    def __init__(self, talk: Talk, number: int, behind: bool, decode: float) -> None:
        self.talk, self.number, self.behind, self.decode = talk, number, behind, decode

    def answered(self, reply: Reply | Refusal) -> None:
        """The reply, or the refusal, is there."""
        self.talk.asked.discard(self)
        try:
            message = _error(self.number, reply) if isinstance(reply, Refusal) else _plan(self.number, reply, self.decode)
            self.talk.say(message, self.behind)
        except Exception:  # a client that gets no answer waits for ever
            logger.exception("%s got no answer to request %d", self.talk.line.name, self.number)
            self.talk.say(_error(self.number, FAILED))


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


def _request(message: dict[str, Any], session: str, images: dict[str, Any], contract: Contract) -> Request:
    """The request in a message, whose pictures are ``images``."""
    seen = message["observation"]
    try:
        words = {"instruction": ""}
        for key in ("instruction", "embodiment", "subtask"):
            if (said := seen.get(key)) is not None:
                if not isinstance(said, str):
                    raise Refusal("bad_request", f"{key} must be a text")
                words[key] = said
        for camera in images:
            if not isinstance(camera, str):
                raise Refusal("bad_request", "the names of cameras are texts")
        state, stamp = _array(seen.get("state"), "state"), _number(seen, "timestamp", 0.0)
        observation = Observation(images=images, state=state, timestamp=stamp or 0.0, **words)
        prefix = message.get("prefix")
        chunk = None if prefix is None else ActionChunk(_array(prefix, "prefix"), contract.rate or 0.0, observation.timestamp)
    except UserError as error:
        raise Refusal("bad_request", public(str(error))) from None
    delay, samples = message.get("delay", 0), message.get("samples", 1)
    for what, number, least, most in (("delay", delay, 0, 1000), ("samples", samples, 1, SAMPLES)):
        if type(number) is not int or not least <= number <= most:
            raise Refusal("bad_request", f"{what} must be a whole number from {least} to {most}")
    return Request(session, observation, chunk, delay, samples)


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


def _plan(number: int, reply: Reply, decode: float) -> dict[str, Any]:
    out = {"id": number, "type": "plan", "actions": reply.actions, "rate": reply.rate, "time": reply.time}
    out |= {"timing": {"decode": decode} | reply.timing, "value": reply.value, "events": reply.events}
    if reply.samples is not None:
        out["samples"] = reply.samples
    if reply.foresight:
        out["foresight"] = reply.foresight
    return out


def _error(number: int, refusal: Refusal) -> dict[str, Any]:
    return {"type": "error", "id": number, "code": refusal.code, "message": public(str(refusal))}

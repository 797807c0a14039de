"""openpi's protocol and StarVLA's, which share a path: msgpack with arrays, one request after the other, no sessions.

The server speaks first: a map about itself, in which each finds its own keys. Then, for openpi,

    observation without a type -> {actions (C, A), policy_timing {infer_ms}, server_timing {infer_ms, prev_total_ms}}

or a text frame with one sentence, which openpi's client raises as an error. After that openpi's server closes the connection; this one
leaves it open: what was wrong with one request (late, busy, a camera that was missing) is no reason to lose the session. For StarVLA

    {type: infer | ping, request_id, payload}, or the payload alone -> {status, ok, type, request_id, data {actions (B, C, A)} | error}

with a payload of ``examples``, maps of ``image`` (a list, in the order of the policy's cameras), ``lang`` and ``state``, or of one
observation as openpi has it. Each connection is a session, each further example of a payload one more. Neither says that an episode
begins. A chunk broker of openpi's cuts every array of a reply into steps, so ``actions`` is the only one.
Sources: openpi ``serving/websocket_policy_server.py``, starVLA ``deployment/model_server/tools/websocket_policy_server.py``.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ....data import Contract, Observation
from ..exchange import Refusal
from ..keys import Keys
from ..line import Line, word
from ..security import public
from ..service import Service
from .sessions import Sessions

INFER = ("infer", "predict_action")


async def speak(line: Line, service: Service, welcome: dict[str, Any]) -> None:
    """Serve one connection until it closes; then its sessions end."""
    sessions = Sessions(line, service)
    before: float | None = None
    told = about(line.keys, service.contract, welcome)
    await line.send(told)
    try:
        async for frame in line.frames():
            began = time.perf_counter()
            message: Any = None
            try:
                message = line.decode(frame)
                if not isinstance(message, dict):
                    raise Refusal("bad_request", "a message must be a map: an observation, or a typed message")
                if _is_typed(message):
                    answer = await _typed(message, line, sessions, told["default_unnorm_key"])
                else:
                    answer = await _observed(message, line, sessions, before)
            except Refusal as refusal:
                service.refused(refusal, line.name)
                await _refuse(message, public(str(refusal)), line)
            else:
                await line.send(answer)
                before = 1e3 * (time.perf_counter() - began)
    finally:
        await sessions.close()


def about(keys: Keys, contract: Contract, welcome: Mapping[str, Any]) -> dict[str, Any]:
    """The map that clients get first."""
    return {
        "server": welcome["server"],
        "policy": welcome["policy"],
        "cameras": list(contract.camera_names),
        "rate": contract.rate,
        "action_horizon": contract.executed or contract.chunk,
        "action_chunk_size": contract.chunk,
        "state_keys": [f"state.{key}" for key in keys.state_parts(contract)],
        "action_keys": [f"action.{key}" for key in keys.action_parts(contract)],
        "available_unnorm_keys": [welcome["policy"]],
        "default_unnorm_key": welcome["policy"],
    }


async def _observed(message: dict[str, Any], line: Line, sessions: Sessions, before: float | None) -> dict[str, Any]:
    began = time.perf_counter()
    (reply,) = await sessions.plan([await line.keys.read(message, sessions.service.contract, line.limits)])
    whole = 1e3 * (time.perf_counter() - began)
    timing = {"infer_ms": whole} | ({} if before is None else {"prev_total_ms": before})
    return {"actions": reply.actions, "policy_timing": {"infer_ms": reply.timing["turn"]}, "server_timing": timing}


def _is_typed(message: Mapping[Any, Any]) -> bool:
    return "type" in message or "examples" in message


async def _typed(message: dict[str, Any], line: Line, sessions: Sessions, unnorm_key: str) -> dict[str, Any]:
    kind = word(message.get("type", "infer"))
    if kind == "ping":
        return _head(message, "ping")
    if kind not in INFER:
        raise Refusal("bad_request", f"there is no message '{kind}'; known: infer, ping")
    payload = message.get("payload", {key: value for key, value in message.items() if key not in ("type", "request_id")})
    if not isinstance(payload, dict):
        raise Refusal("bad_request", "payload must be a map")
    if payload.get("unnorm_key") is not None and word(payload["unnorm_key"]) != word(unnorm_key):
        raise Refusal("bad_request", f"the one unnorm_key of this policy is '{unnorm_key}'; send it, or none")
    contract = sessions.service.contract
    if "examples" in payload:
        seen = await _examples(payload["examples"], line, contract)
    else:
        seen = [await line.keys.read(payload, contract, line.limits)]
    replies = await sessions.plan(seen)
    return _head(message, "inference_result") | {"data": {"actions": np.stack([reply.actions for reply in replies])}}


async def _examples(examples: Any, line: Line, contract: Contract) -> list[Observation]:
    """What is seen in each of StarVLA's examples, whose pictures have no names."""
    if not isinstance(examples, list) or not 0 < len(examples) <= line.in_flight or not all(isinstance(e, dict) for e in examples):
        raise Refusal("bad_request", f"examples must be a list of 1 to {line.in_flight} maps of image, lang and state")
    keys, cameras = Keys(instruction=line.keys.instruction), contract.camera_names
    seen = []
    for example in examples:
        pictures = example.get("image", [])
        pictures = pictures if isinstance(pictures, list) else [pictures]
        if len(pictures) > len(cameras):
            order = ", ".join(cameras) or "none"
            raise Refusal("bad_request", f"an example has {len(pictures)} images, and the cameras of the policy are, in order: {order}")
        tree = {"images": dict(zip(cameras, pictures, strict=False)), "state": example.get("state"), "lang": example.get("lang")}
        seen.append(await keys.read(tree, contract, line.limits))
    return seen


def _head(message: Mapping[Any, Any], kind: str, status: str = "ok") -> dict[str, Any]:
    number = message.get("request_id")
    return {"status": status, "ok": status == "ok", "type": kind, "request_id": number if isinstance(number, str | int) else "default"}


async def _refuse(message: Any, sentence: str, line: Line) -> None:
    if not isinstance(message, dict) or not _is_typed(message):
        await line.connection.send(sentence)
        return
    kind = "inference_result" if word(message.get("type", "infer")) in INFER else "unknown"
    await line.send(_head(message, kind, "error") | {"error": {"message": sentence}})

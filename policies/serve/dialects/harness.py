"""vla-evaluation-harness: one connection runs episode after episode, and each observation gets one action.

Messages are msgpack maps {type, payload, seq, timestamp}; an answer carries the ``seq`` of its question. The client speaks first:

    hello {harness_version, protocol_version, benchmark?} -> hello {model_server, capabilities, observation_params, action_spec, ...}
    episode_start {task, ...}, episode_end {...}           no answer, unless it fails
    observation {images {camera}, task_description, states?} -> action {actions (A,)}

and ``error {error}`` instead; the connection stays. The chunk is kept here: the policy is asked when what it wants executed is used up.
``*_spec`` say in the harness's words (``vla_eval/specs.py``) what the contract says; what it does not say is left out, since the harness
warns of everything that is not the same. Source: vla_eval 0.8.0 ``model_servers/serve.py``, ``protocol/{messages,numpy_codec}.py``.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from triune_client.chunks import ChunkBroker
from triune_client.wire import pack

from ....data import Contract
from ....data.contract import Vector
from ...base import Request
from ..exchange import Refusal
from ..line import Line, word
from ..security import public
from ..service import Service

PROTOCOL = 1
ROTATIONS: Mapping[str, tuple[str, str, int]] = {
    "axis_angle": ("axis_angle", "axisangle3", 3),
    "euler_xyz": ("euler_xyz", "euler3", 3),
    "quat_xyzw": ("quaternion_xyzw", "quat4", 4),
}
"""Rotation in a contract -> format of an action's rotation, word in the format of a state, numbers."""
GRIPPERS: Mapping[str, str] = {
    "-1 opens, +1 closes": "binary_close_positive",
    "-1 closes, +1 opens": "binary_close_negative",
    "opening, 0 closed, 1 open": "continuous_01",
}


async def speak(line: Line, service: Service, welcome: dict[str, Any]) -> None:
    """Serve one connection until it closes; then its episode ends."""
    session, episodes = f"{line.name}/0", 0
    broker: ChunkBroker | None = None
    try:
        async for frame in line.frames():
            number = 0
            try:
                message = line.decode(frame)
                kind, payload, number = _head(message)
                if kind == "hello":
                    await _send(line, "hello", _hello(payload, service.contract, welcome), number)
                elif kind == "episode_start":
                    await service.reset(session, line.seed + episodes)
                    episodes, broker = episodes + 1, ChunkBroker(service.contract.executed)
                elif kind == "observation":
                    if broker is None:
                        raise Refusal("bad_request", "no episode has begun: send episode_start before the first observation")
                    if broker.due:
                        seen = await line.keys.read(payload, service.contract, line.limits)
                        reply = await service.plan(Request(session, seen), line.deadline)
                        try:
                            broker.put(reply.actions)
                        except ValueError as error:
                            raise Refusal("internal", f"the policy's answer is no chunk: {error}") from None
                    await _send(line, "action", {"actions": broker.next()}, number)
                elif kind == "episode_end":
                    broker = None
                    await service.close(session)
                elif kind != "error":  # a client's own; there is nobody here to tell
                    known = "hello, episode_start, observation, episode_end"
                    raise Refusal("bad_request", f"there is no message '{word(kind)}'; known: {known}")
            except Refusal as refusal:
                service.refused(refusal, line.name)
                await _send(line, "error", {"error": public(str(refusal))}, number)
    finally:
        await service.close(session)


def config(batch: int, window_ms: float) -> bytes:
    """What ``GET /config`` answers; where the harness's servers can be changed by it, this one cannot."""
    return json.dumps({"applied": {}, "config": {"max_batch_size": batch, "max_wait_time": window_ms / 1e3}, "read_only": True}).encode()


def observation_spec(contract: Contract) -> dict[str, Any]:
    """What the policy looks at, as the harness says it."""
    spec = {camera.name: _dims("image", 0, "rgb_hwc_uint8") for camera in contract.cameras if not camera.optional}
    spec["language"] = _dims("language", 0, "language")
    state = contract.state
    _, word, size = ROTATIONS.get(state.rotation or "", ("", "", 0))
    if word and state.size - 3 - size in (1, 2):
        spec["state"] = _dims("state", state.size, f"eef_pos3_{word}_gripper{state.size - 3 - size}")
    return spec


def action_spec(action: Vector) -> dict[str, Any]:
    """What an action is, where it is a position, a rotation and a gripper; otherwise empty, which the harness does not compare."""
    rotation, _, size = ROTATIONS.get(action.rotation or "", ("", "", 0))
    if not rotation or action.mode is None or action.size != 3 + size + 1:
        return {}
    return {
        "position": _dims("position", 3, "delta_xyz" if action.mode == "relative" else "absolute_xyz"),
        "rotation": _dims("rotation", size, rotation),
        "gripper": _dims("gripper", 1, GRIPPERS.get(action.gripper or "", "raw")),
    }


def _dims(name: str, dims: int, form: str) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": form}


def _head(message: Any) -> tuple[str, dict[Any, Any], int]:
    """Type, payload and number of a message."""
    if not isinstance(message, dict) or any(key not in message for key in ("type", "payload", "seq", "timestamp")):
        raise Refusal("bad_request", "a message is a map of type, payload, seq and timestamp")
    kind, payload, number = message["type"], message["payload"], message["seq"]
    if not isinstance(kind, str) or not isinstance(payload, dict) or not isinstance(number, int):
        raise Refusal("bad_request", "the type of a message is text, its payload a map, its seq a whole number")
    return kind, payload, number


def _hello(payload: Mapping[Any, Any], contract: Contract, welcome: Mapping[str, Any]) -> dict[str, Any]:
    theirs = payload.get("protocol_version", PROTOCOL)
    if not isinstance(theirs, int) or theirs != PROTOCOL:
        came = theirs if isinstance(theirs, int) else word(theirs)
        raise Refusal("bad_request", f"this server speaks version {PROTOCOL} of the harness's protocol, the client {came}")
    wrist = any("wrist" in name or "hand" in name for name in contract.camera_names)
    return {
        "harness_version": welcome["server"],
        "protocol_version": PROTOCOL,
        "model_server": welcome["policy"],
        "capabilities": {},
        "observation_params": {"send_wrist_image": wrist, "send_state": contract.state.size > 0},
        "action_spec": action_spec(contract.action),
        "observation_spec": observation_spec(contract),
    }


def packed(kind: str, payload: Mapping[str, Any], number: int, now: float) -> bytes:
    """A message in the harness's bytes: the keys of its arrays are text."""
    plain = {key: _words(value) if isinstance(value, np.ndarray) else value for key, value in payload.items()}
    return pack({"type": kind, "payload": plain, "seq": number, "timestamp": now})


def _words(values: np.ndarray) -> dict[str, Any]:
    return {"__ndarray__": True, "data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}


async def _send(line: Line, kind: str, payload: dict[str, Any], number: int) -> None:
    await line.connection.send(packed(kind, payload, number, time.time()))

"""Isaac-GR00T's protocol of N1.5, N1.6 and N1.7: ZeroMQ, one msgpack map asks and one answers.

    {endpoint, data, api_token?} -> the answer, or {error}

Endpoints: ``ping``; ``reset``; ``get_modality_config``; ``get_action``, which N1.5 asks with a flat observation (``video.<camera>``,
``state.<part>``, ``annotation.*``) and gets {action.<part>}, later versions with {observation, options}, nested (video, state, language) or
flat as their wrapper of simulators has it, and get [actions, info]. ``kill``, by which any client ends the authors' servers, is refused.
Arrays are NumPy files (N1.5, N1.6) or maps of msgpack-numpy (N1.7) and are answered as they came. Of several moments (T) the last is
taken: what a policy remembers it keeps itself. A connection is a session, and in a batch (B) each place is one.
Sources: NVIDIA/Isaac-GR00T ``gr00t/eval/service.py`` (N1.5), ``gr00t/policy/{server_client,gr00t_policy}.py`` (N1.6), N1.7's same files.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triune_client.wire import Limits, WireError, array, pack

from ....data import Contract
from ..exchange import Refusal
from ..keys import PROMPTS, ROOTS, Keys, bare, flatten
from ..line import Line, word
from ..security import public
from ..service import Service
from .sessions import Sessions

MODALITIES = ("video/", "state/", *ROOTS, *PROMPTS)
HEADER = re.compile(rb"\{'descr': '([^']{1,8})', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n")
"""What ``np.save`` writes of an array of numbers; anything else is refused, so nothing has to be parsed as Python."""
LANGUAGE = "annotation.human.task_description"


@dataclass
class Codec:
    """Arrays in one message and in its answer.

    Attributes:
        kind: ``npy`` or ``nd``, as the first array came; ``npy`` where none did.
    """

    limits: Limits
    kind: str = ""
    arrays: int = 0

    def read(self, entries: dict[Any, Any]) -> object:
        """What a map of a message stands for (``unpack(also=...)``)."""
        if "__ndarray_class__" in entries:
            return self._counted("npy", lambda: npy(entries.get("as_npy"), self.limits))
        if b"nd" in entries:
            return self._counted("nd", lambda: nd(entries, self.limits))
        return entries

    def write(self, values: np.ndarray) -> dict[Any, Any]:
        """An array in the codec of the question."""
        if self.kind == "nd":
            return {b"nd": True, b"type": values.dtype.str, b"kind": b"", b"shape": values.shape, b"data": values.tobytes()}
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    def _counted(self, kind: str, make: Callable[[], object]) -> object:
        self.kind = self.kind or kind
        self.arrays += 1
        if self.arrays > self.limits.arrays:
            raise WireError(f"more than {self.limits.arrays} arrays in one message")
        return make()


def npy(data: object, limits: Limits) -> np.ndarray:
    """The array in a NumPy file; its size is known from the header before anything is made of it.

    Raises:
        WireError: it is none, or not of numbers.
    """
    if not isinstance(data, bytes) or data[:6] != b"\x93NUMPY" or data[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise WireError("as_npy must be a NumPy file, version 1 or 2")
    begin = 10 if data[6] == 1 else 12
    end = begin + int.from_bytes(data[8:begin], "little")
    header = HEADER.fullmatch(data[begin:end]) if end - begin <= 512 else None
    if header is None:
        raise WireError("the header of a NumPy file is not one of a plain array")
    lengths = [int(n) for n in header[3].decode().replace(" ", "").split(",") if n]
    fortran = header[2] == b"True"
    made = array(data[end:], header[1].decode("latin-1"), lengths[::-1] if fortran else lengths, limits)
    return made.transpose() if fortran else made


def nd(entries: Mapping[Any, Any], limits: Limits) -> object:
    """The array or scalar in a map of msgpack-numpy. Its kinds ``O`` (a pickle) and ``V`` are refused.

    Raises:
        WireError: it is neither.
    """
    kind = entries.get(b"kind", b"")
    if not isinstance(kind, bytes | str) or kind:
        raise WireError("only plain arrays are accepted, no objects and no records")
    if entries[b"nd"] is True:
        return array(entries.get(b"data"), entries.get(b"type"), entries.get(b"shape"), limits)
    return array(entries.get(b"data"), entries.get(b"type"), [], limits)[()]


@dataclass
class Talk:
    """What is known of one client.

    Attributes:
        flat: it last spoke as N1.5 does, so its configs are text.
    """

    line: Line
    sessions: Sessions
    flat: bool = False
    codec: Codec = field(init=False)

    async def answer(self, frame: bytes | str) -> Any:
        """The answer to one message.

        Raises:
            Refusal: and why.
        """
        self.codec = Codec(self.line.limits)
        message = self.line.decode(frame, self.codec.read)
        if not isinstance(message, dict):
            raise Refusal("bad_request", "a message must be a map of endpoint, data and api_token")
        token = message.get("api_token")
        if not self.line.token.admits(token if isinstance(token, str) else None):
            raise Refusal("unauthorized", "Unauthorized: Invalid API token")
        endpoint, data = word(message.get("endpoint", "get_action")), message.get("data")
        contract, keys = self.sessions.service.contract, self.line.keys
        if not isinstance(endpoint, str):
            raise Refusal("bad_request", "an endpoint is a text")
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return modalities(keys, contract, self.flat)
        if endpoint == "reset":
            await self.sessions.reset()
            return {}
        if endpoint == "kill":
            raise Refusal("bad_request", "kill is not served: no client ends this server; whoever started it sends SIGTERM")
        if endpoint != "get_action":
            known = "ping, get_action, reset, get_modality_config"
            raise Refusal("bad_request", f"there is no endpoint '{endpoint}'; known: {known}")
        if not isinstance(data, dict):
            raise Refusal("bad_request", "get_action needs data: an observation")
        self.flat = "observation" not in data
        seen = data if self.flat else data["observation"]
        if not isinstance(seen, dict):
            raise Refusal("bad_request", "the observation must be a map")
        return await self._act(seen, keys, contract)

    async def _act(self, seen: dict[Any, Any], keys: Keys, contract: Contract) -> Any:
        dotted = any(isinstance(key, str) and key.startswith(("video.", "state.")) for key in seen)
        leaves = flatten(seen)
        count = batch(leaves, self.line.in_flight)
        trees = [leaves] if count is None else [{key: _place(key, value, i) for key, value in leaves.items()} for i in range(count)]
        replies = await self.sessions.plan([await keys.read(tree, contract, self.line.limits) for tree in trees])
        actions = np.stack([reply.actions for reply in replies]) if count is not None else replies[0].actions
        parts: dict[str, Any] = {}
        first = 0
        for name, size in keys.action_parts(contract).items():
            part = np.ascontiguousarray(actions[..., first : first + size])
            parts[f"action.{name}" if dotted else name] = self.codec.write(part)
            first += size
        return parts if self.flat else [parts, {}]


def batch(leaves: Mapping[str, Any], most: int) -> int | None:
    """Places in a batch: the first axis of pictures (B, T, H, W, 3) and states (B, T, D); None where there is no such axis.

    Raises:
        Refusal: they differ, or are too many.
    """
    axes = {"video/": 5, "state/": 3}
    arrays = {key: axes[key[:6]] for key, value in leaves.items() if key[:6] in axes and isinstance(value, np.ndarray)}
    sizes = {leaves[key].shape[0] for key, axis in arrays.items() if leaves[key].ndim == axis}
    if not sizes:
        return None
    if len(sizes) > 1 or any(leaves[key].ndim != axis for key, axis in arrays.items()):
        raise Refusal("bad_request", "all pictures must be (B, T, H, W, 3) and all states (B, T, D), with the same B")
    (count,) = sizes
    if not 0 < count <= most:
        raise Refusal("bad_request", f"a batch has {count} places, and this server answers 1 to {most} of one client at once")
    return int(count)


def _place(key: str, value: Any, place: int) -> Any:
    """What one place of a batch has; words that are given once are for all."""
    many = (isinstance(value, list) and len(value)) or (isinstance(value, np.ndarray) and value.ndim and len(value))
    if not key.startswith(MODALITIES) or not many:
        return value
    if place >= len(value) > 1:
        raise Refusal("bad_request", f"'{key[:60]}' has {len(value)} places, and the batch has more")
    return value[place] if len(value) > 1 else value[0]


def modalities(keys: Keys, contract: Contract, flat: bool) -> dict[str, Any]:
    """What is asked for and answered: modality -> names and the steps that they have, as N1.6 and N1.7 or, ``flat``, as N1.5 says it."""
    named = {
        "video": [bare(keys.cameras.get(name, name)) for name in contract.camera_names],
        "state": list(keys.state_parts(contract)),
        "action": list(keys.action_parts(contract)),
        "language": [keys.prompt or LANGUAGE],
    }
    said = {}
    for modality, names in named.items():
        full = [f"{modality}.{name}" for name in names] if flat and modality != "language" else names
        steps = range(contract.chunk or 1) if modality == "action" else [0]
        config = {"delta_indices": list(steps), "modality_keys": full}
        said[modality] = {"__ModalityConfig_class__": True, "__ModalityConfig__": True, "as_json": json.dumps(config) if flat else config}
    return said


async def speak(line: Line, service: Service, welcome: dict[str, Any]) -> None:
    """Serve one connection until it closes; then its sessions end."""
    talk = Talk(line, Sessions(line, service))
    try:
        async for frame in line.frames():
            try:
                answer = await talk.answer(frame)
            except Refusal as refusal:
                service.refused(refusal, line.name)
                answer = {"error": public(str(refusal))}
            await line.connection.send(pack(answer))
    finally:
        await talk.sessions.close()

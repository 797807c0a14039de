"""The same control loop against servers of openpi's websocket protocol (its ``websocket_policy_server.py``), its own or a peer's.

Such a server says nothing of cameras, rates or limits, keeps no sessions and takes no prefix, so what it wants is told here.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Mapping, Sequence
from urllib.parse import urlsplit

import numpy as np
from websockets import exceptions
from websockets.sync.client import connect

from .images import shrink
from .messages import Plan, ServerError, Welcome
from .wire import DEFAULT, Limits, WireError, pack, unpack


class OpenpiClient:
    """As ``Client``, for one robot: ``reset``, ``infer``, ``close``, ``welcome``.

    Args:
        url: ``ws://host:port``.
        rate: control steps a second that the policy was made for; executed: actions of a chunk to execute.
        images: camera of the robot -> key of the observation; ``observation/<camera>`` for those that are not named.
        state: key of the state; prompt: key of the instruction.
        token: sent as openpi's client does, ``Authorization: Api-Key``.
        resize: (height, width) that images are scaled down to fit in.
        timeout: seconds to wait for an answer, and for a connection.

    Raises:
        ConnectionError, TimeoutError: nobody answers, or not in openpi's words.
    """

    def __init__(
        self,
        url: str,
        rate: float,
        executed: int,
        images: Mapping[str, str] | None = None,
        state: str = "observation/state",
        prompt: str = "prompt",
        token: str | None = None,
        resize: tuple[int, int] | None = None,
        timeout: float = 30.0,
        limits: Limits = DEFAULT,
    ) -> None:
        if urlsplit(url).scheme not in ("ws", "wss"):
            raise ValueError(f"'{url}' is not the address of a server: write ws://host:port or wss://host:port")
        self.url, self.timeout, self.limits, self.resize = url, timeout, limits, resize
        self.images, self.state, self.prompt = dict(images or {}), state, prompt
        self._lock = threading.Lock()
        options: dict[str, Any] = {"compression": None, "max_size": limits.frame, "open_timeout": timeout}
        if token is not None:
            options["additional_headers"] = {"Authorization": f"Api-Key {token}"}
        try:
            self._socket = connect(url, **options).__enter__()
            self.metadata = self._receive()
        except (exceptions.InvalidHandshake, exceptions.ConnectionClosed, OSError) as error:
            raise ConnectionError(f"no server of openpi's protocol at {url}: {error}") from None
        self.welcome = Welcome("openpi", url, {}, None, 0, False, executed, executed, rate)

    def __enter__(self) -> OpenpiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, session: str = "robot", seed: int = 0) -> None:
        """openpi's protocol has no word for it."""

    def infer(
        self,
        observation: Mapping[str, Any],
        session: str = "robot",
        prefix: Sequence[Sequence[float]] | np.ndarray[Any, Any] | None = None,
        delay: int = 0,
        deadline: float | None = None,
        foresight: bool = False,
    ) -> Plan:
        """What to do next. Of ``prefix``, ``delay``, ``deadline`` and ``foresight``, which a control loop gives to any client, nothing is
        sent: openpi's protocol has no words for them.

        Raises:
            ServerError: the server failed; its text is the message.
            ConnectionError, TimeoutError: the connection was lost, or no answer came.
        """
        message: dict[str, Any] = {self.state: np.asarray(observation["state"], np.float32), self.prompt: observation["instruction"]}
        for camera, image in observation["images"].items():
            key = self.images.get(camera, f"observation/{camera}")
            message[key] = image if self.resize is None else shrink(image, self.resize)
        began = time.perf_counter()
        with self._lock:
            try:
                self._socket.send(pack(message))
                answer = self._receive()
            except exceptions.ConnectionClosed as closed:
                raise ConnectionError(f"{self.url} ended the connection: {closed}") from None
        spent = time.perf_counter() - began
        if not isinstance(answer, dict) or not isinstance(answer.get("actions"), np.ndarray):
            raise ConnectionError(f"{self.url} sent no actions")
        timing = {k: float(v) for part in ("policy_timing", "server_timing") for k, v in (answer.get(part) or {}).items()}
        actions = np.asarray(answer["actions"], np.float32)
        return Plan(actions, self.welcome.rate, float(observation.get("timestamp", 0.0)), timing, round_trip=spent)

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def _receive(self) -> Any:
        frame = self._socket.recv(timeout=self.timeout)
        if isinstance(frame, str):
            raise ServerError("internal", frame.strip().splitlines()[-1][:300] if frame.strip() else "the server gives no reason")
        try:
            return unpack(frame, self.limits)
        except WireError as error:
            raise ConnectionError(f"{self.url} sent what cannot be read: {error}") from None

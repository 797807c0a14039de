"""A connection to an action server of Triune: protocol ``triune 1``, any number of sessions and of requests in flight.

Every wait has an end: connecting, answers, and a server that no longer reads. A lost connection fails what waits for it at once; it is
made again by the next ``reset``, since what the server knew of the episode is gone, and never by ``infer``.
"""

from __future__ import annotations

import ipaddress
import threading
from typing import Any, Mapping
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from .images import shrink, to_jpeg
from .link import Asked, Link
from .messages import Plan, Welcome
from .wire import DEFAULT, Limits

PATH = "/v1"


class Client:
    """A robot's side of the protocol. All methods may be called from any thread.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        token: what the server asks for; sent as ``Authorization: Bearer``.
        contract: what this robot or world is, in the words of ``contract.json``; a server whose policy was made for something else refuses.
        ca: file of certificates to trust instead of the system's, for ``wss``.
        insecure: send the token without TLS to another computer, where everyone on the way may read it.
        timeout: seconds to wait for an answer.
        connect_timeout: seconds to wait for a connection and the server's welcome.
        jpeg: quality (1 to 95) to send images with; None sends pixels. Needs Pillow.
        resize: (height, width) that images are scaled down to fit in, as they are wide; never up. Needs Pillow.
        limits: what a message of the server may hold.

    Raises:
        ValueError: the arguments do not fit together.
        ConnectionError: no connection, or what answers is no action server of Triune.
        ServerError: the server refuses the token or the contract.
        TimeoutError: no welcome came in time.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        contract: Mapping[str, Any] | None = None,
        ca: str | None = None,
        *,
        insecure: bool = False,
        timeout: float = 30.0,
        connect_timeout: float = 10.0,
        jpeg: int | None = None,
        resize: tuple[int, int] | None = None,
        limits: Limits = DEFAULT,
    ) -> None:
        self.url = _address(url)
        parts = urlsplit(self.url)
        if ca is not None and parts.scheme != "wss":
            raise ValueError(f"`ca` needs TLS: write wss:// instead of ws:// in {url}")
        if token is not None and parts.scheme != "wss" and not insecure and not _loopback(parts.hostname or ""):
            raise ValueError(f"a token would go to {parts.hostname} in the clear: use wss://, or allow it with insecure=True")
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token and token):
            raise ValueError("a token is printable ASCII without blanks")
        if jpeg is not None and not 1 <= jpeg <= 95:
            raise ValueError(f"jpeg is a quality from 1 to 95, not {jpeg}")
        if resize is not None and min(resize) < 1:
            raise ValueError(f"resize is (height, width) in pixels, not {resize}")
        self.timeout, self.connect_timeout, self.jpeg, self.resize, self.limits = timeout, connect_timeout, jpeg, resize, limits
        self._token, self._contract, self._ca = token, None if contract is None else dict(contract), ca
        self._mending = threading.Lock()
        self._closed = False
        self._link, self.welcome = self._open()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._link.lost is None

    def reset(self, session: str = "robot", seed: int = 0) -> None:
        """Begin an episode: the server forgets what it knew of the session and keys its noise by ``seed``. Connects anew where the
        connection was lost.

        Raises:
            ConnectionError, ServerError, TimeoutError: as the constructor does; also where another policy answers than before.
        """
        with self._mending:
            if not self.connected and not self._closed:
                link, welcome = self._open()
                if welcome.contract != self.welcome.contract:
                    link.close()
                    raise ConnectionError(f"{self.url} serves another policy than before ({welcome.policy}): make a new Client")
                self._link, self.welcome = link, welcome
        self._ask({"type": "reset", "session": session, "seed": seed}).message()

    def infer(
        self,
        observation: Mapping[str, Any],
        session: str = "robot",
        prefix: np.ndarray[Any, Any] | None = None,
        delay: int = 0,
        deadline: float | None = None,
        foresight: bool = False,
    ) -> Plan:
        """What to do next.

        Args:
            observation: ``images`` (camera -> uint8 (H, W, 3), RGB), ``state`` (float32 (S,) in the units of the contract),
                ``instruction``, ``timestamp`` (seconds since the episode began).
            prefix: float32 (n, A): actions already committed for the coming steps.
            delay: control steps that will have been executed before the answer can take effect.
            deadline: seconds after which the answer is of no use: the server then answers ``late`` instead.
            foresight: ask for the frames that the policy expects to see.

        Raises:
            ServerError, ConnectionError, TimeoutError: see ``Asked.message``.
            WireError: the observation cannot be sent.
        """
        return self._ask(self._question(observation, session, prefix, delay, deadline, foresight, 1)).wait()

    def ask(
        self,
        observation: Mapping[str, Any],
        session: str = "robot",
        prefix: np.ndarray[Any, Any] | None = None,
        delay: int = 0,
        deadline: float | None = None,
        foresight: bool = False,
        samples: int = 1,
    ) -> Asked:
        """As ``infer``, without waiting: ``.wait()`` gives the plan."""
        return self._ask(self._question(observation, session, prefix, delay, deadline, foresight, samples), waits=False)

    def end(self, session: str = "robot") -> None:
        """Tell the server that a session will not go on; raises as ``reset`` does."""
        self._ask({"type": "end", "session": session}).message()

    def close(self) -> None:
        """Leave; what still waits fails with ``ConnectionError``."""
        self._closed = True
        self._link.close()

    def _question(
        self,
        observation: Mapping[str, Any],
        session: str,
        prefix: np.ndarray[Any, Any] | None,
        delay: int,
        deadline: float | None,
        foresight: bool,
        samples: int,
    ) -> dict[str, Any]:
        seen = dict(observation)
        if self.resize is not None or self.jpeg is not None:
            seen["images"] = {camera: self._image(image) for camera, image in seen.get("images", {}).items()}
        asked = {"observation": seen, "prefix": prefix, "delay": delay, "samples": samples, "deadline": deadline, "foresight": foresight}
        return {"type": "infer", "session": session, **asked}

    def _image(self, image: Any) -> object:
        small = image if self.resize is None else shrink(image, self.resize)
        return small if self.jpeg is None else to_jpeg(small, self.jpeg)

    def _ask(self, message: dict[str, Any], waits: bool = True) -> Asked:
        return self._link.ask(message, self.timeout, waits)

    def _open(self) -> tuple[Link, Welcome]:
        link = Link(self.url, self._token, self._ca, self.connect_timeout, self.timeout, self.limits)
        try:
            return link, link.hello(self._contract, self.connect_timeout)
        except BaseException:
            link.close()
            raise


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"'{url}' is not the address of a server: write ws://host:port or wss://host:port")
    return urlunsplit(parts if parts.path.strip("/") else parts._replace(path=PATH))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""One websocket connection, and which reply belongs to which request."""

from __future__ import annotations

import inspect
import itertools
import os
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateFuture
from contextlib import ExitStack
from typing import Any, Callable

from websockets import exceptions
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from .messages import PROTOCOL, Plan, ServerError, Welcome, read_plan, read_welcome, refusal
from .wire import Limits, WireError, pack, unpack


class Asked:
    """An answer under way; ``wait`` gives it."""

    def __init__(self, link: Link, number: int, reply: Future[Any], timeout: float) -> None:
        self._link, self._number, self._reply, self._timeout = link, number, reply, timeout
        self._begun = time.perf_counter()
        self._ended = 0.0
        reply.add_done_callback(self._stop)

    def _stop(self, reply: Future[Any]) -> None:
        self._ended = time.perf_counter()

    def message(self) -> dict[str, Any]:
        """The reply as it came.

        Raises:
            ServerError: the server refuses.
            ConnectionError: the connection was lost.
            TimeoutError: no answer came in time; one that comes later is dropped.
        """
        left = max(0.0, self._begun + self._timeout - time.perf_counter())
        try:
            return self._reply.result(left)
        except LateFuture:
            self._link.forget(self._number)
            raise TimeoutError(f"no answer within {self._timeout:g} s: the server hangs, or `timeout` is too short for it") from None

    def wait(self) -> Plan:
        """The plan; raises as ``message`` does, and ``ConnectionError`` where the reply is no plan."""
        return read_plan(self.message(), self._ended - self._begun)


class _Direct(ClientConnection):
    """A connection whose own thread hands a message on as soon as it is read, which saves waking another that waits in ``recv``.

    Attributes:
        hand: gets each message that came in one frame; what it leaves (False) is for ``recv``.
    """

    hand: Callable[[bytes], bool] | None = None

    def process_event(self, event: Any) -> None:
        whole = isinstance(event, Frame) and event.opcode is Opcode.BINARY and event.fin
        if not (whole and self.hand is not None and self.hand(event.data)):
            super().process_event(event)


class Link:
    """One connection: sends from any thread, and the thread that reads hands each reply to who waits for it."""

    def __init__(self, url: str, token: str | None, ca: str | None, wait: float, stuck: float, limits: Limits) -> None:
        self.url, self.limits = url, limits
        self.lost: Exception | None = None
        self._waiting: dict[int, Future[Any]] = {}
        self._farewell: Exception | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._leave = ExitStack()
        self._socket = _connect(self._leave, url, token, ca, wait, limits)
        _bound(self._socket.socket, stuck)

    def hello(self, contract: dict[str, Any] | None, wait: float) -> Welcome:
        """Say who we are, hear who they are, and begin to read."""
        from . import __version__

        message = {"type": "hello", "id": 0, "protocol": PROTOCOL, "client": f"triune-client {__version__}", "contract": contract}
        try:
            self._socket.send(pack(message))
            reply = unpack(_binary(self._socket.recv(timeout=wait)), self.limits)
        except TimeoutError:
            raise TimeoutError(f"{self.url} did not answer within {wait:g} s: is it an action server of Triune?") from None
        except exceptions.ConnectionClosed as closed:
            raise ConnectionError(f"{self.url} ended the connection instead of welcoming: {_why(closed)}") from None
        except WireError as error:
            raise ConnectionError(f"{self.url} does not speak Triune's protocol: {error}") from None
        welcome = read_welcome(self.url, reply)
        self._socket.hand = self._hand
        threading.Thread(target=self._read, name="triune-client", daemon=True).start()
        return welcome

    def ask(self, message: dict[str, Any], timeout: float) -> Asked:
        number, reply = next(self._numbers), Future()  # type: ignore[var-annotated]
        frame = pack({**message, "id": number})
        with self._lock:
            if self.lost is not None:
                raise self.lost
            self._waiting[number] = reply
        asked = Asked(self, number, reply, timeout)
        try:
            self._socket.send(frame)
        except (exceptions.ConnectionClosed, OSError) as error:
            self._fail(ConnectionError(f"{self.url} takes no more messages: {_why(error)}"))
        return asked

    def forget(self, number: int) -> None:
        with self._lock:
            self._waiting.pop(number, None)

    def close(self) -> None:
        self._fail(ConnectionError(f"the connection to {self.url} was closed here"))
        self._leave.close()

    def _read(self) -> None:
        """Wait for the end of the connection, and for what is left to ``recv``."""
        try:
            while True:
                self._take(_binary(self._socket.recv()))
        except exceptions.ConnectionClosed as closed:
            self._fail(self._farewell or ConnectionError(f"{self.url} ended the connection: {_why(closed)}"))
        except (WireError, OSError, TypeError) as error:
            self._fail(ConnectionError(f"{self.url} sent what cannot be read: {error}"))
            self._leave.close()

    def _hand(self, frame: bytes) -> bool:
        try:
            self._take(frame)
        except (WireError, TypeError):  # a thread cannot end the connection that it reads: the other one will
            return False
        return True

    def _take(self, frame: bytes) -> None:
        message = unpack(frame, self.limits)
        if not isinstance(message, dict):
            raise WireError("not a map")
        with self._lock:
            reply = self._waiting.pop(message.get("id"), None)  # type: ignore[arg-type]  # None is in no such map
        error = refusal(message)
        if reply is None:
            self._farewell = error or self._farewell  # an error that answers nothing is about the connection; a late reply is dropped
        elif error is None:
            reply.set_result(message)
        else:
            reply.set_exception(error)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self.lost is None:
                self.lost = error
            waiting, self._waiting = list(self._waiting.values()), {}
        for reply in waiting:
            reply.set_exception(self.lost)


def _connect(leave: ExitStack, url: str, token: str | None, ca: str | None, wait: float, limits: Limits) -> _Direct:
    """A connection that ``leave`` ends: all versions of websockets know it as a context, 17.1 deprecates another way."""
    known = inspect.signature(connect).parameters
    options: dict[str, Any] = {"compression": None, "max_size": limits.frame, "open_timeout": wait, "close_timeout": 2.0}
    options["create_connection"] = _Direct
    if token is not None:
        options["additional_headers"] = {"Authorization": f"Bearer {token}"}
    if url.startswith("wss:"):
        try:
            options["ssl" if "ssl" in known else "ssl_context"] = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise ValueError(f"{ca} is no file of certificates: {error.strerror or error}") from None
    if "proxy" in known:
        options["proxy"] = None  # a robot's control loop goes through none
    try:
        made = leave.enter_context(connect(url, **options))
        assert isinstance(made, _Direct)
        return made
    except exceptions.InvalidStatus as refused:
        status, body = refused.response.status_code, (refused.response.body or b"").decode("utf-8", "replace").strip()[:300]
        if status in (401, 403):
            raise ServerError("unauthorized", body or "the server refuses the token, or asks for one: give token=...") from None
        if status in (429, 503):
            raise ServerError("busy", body or "the server takes no connections now: try again later") from None
        raise ConnectionError(f"{url} answers with HTTP {status}: no action server of Triune there") from None
    except ssl.SSLCertVerificationError as error:
        mend = "give the certificate that signed it as ca=FILE"
        raise ConnectionError(f"the certificate of {url} is not trusted ({error.verify_message}): {mend}") from None
    except (ssl.SSLError, exceptions.InvalidHandshake, EOFError) as error:
        raise ConnectionError(f"{url} does not speak {'TLS and ' * url.startswith('wss:')}websocket: {_why(error)}") from None
    except (TimeoutError, socket.timeout):  # two things before Python 3.10
        raise TimeoutError(f"no connection to {url} within {wait:g} s") from None
    except OSError as error:
        raise ConnectionError(f"no connection to {url}: {error.strerror or error}") from None


def _bound(channel: socket.socket, seconds: float) -> None:
    """Sending gives up after ``seconds``; a socket of websockets would wait for ever for a server that no longer reads."""
    if os.name == "posix":
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))


def _binary(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise WireError(f"a text frame: {frame[:100]!r}")
    return frame


def _why(error: Exception) -> str:
    closed = getattr(error, "rcvd", None)
    return f"{closed.code} {closed.reason}".strip() if closed is not None else str(error) or type(error).__name__

"""One websocket connection, and which reply belongs to which request."""

from __future__ import annotations

import contextlib
import itertools
import ssl
import threading
import time
from typing import Any

from websockets import exceptions

from .messages import PROTOCOL, Plan, ServerError, Welcome, read_plan, read_welcome, refusal
from .outofband import is_out_of_band, pack_parts
from .outofband import unpack as unpack_out_of_band
from .websocket import WebSocket
from .wire import Limits, WireError, pack, unpack

LOOKS = 0.2
"""Seconds between two looks at a connection for whose replies nobody waits."""
GOODBYE = 2.0
"""Seconds that a server has to say goodbye too."""


class Asked:
    """An answer under way; ``wait`` gives it."""

    def __init__(self, link: Link, number: int, timeout: float) -> None:
        self._link, self.number, self._timeout = link, number, timeout
        self._reply: dict[str, Any] | Exception | None = None
        self._begun, self._ended = time.perf_counter(), 0.0
        self._under_way = threading.Lock()
        self._under_way.acquire()

    @property
    def answered(self) -> bool:
        """Whether ``message`` would not wait."""
        return self._reply is not None

    def settle(self, reply: dict[str, Any] | Exception) -> None:
        """The reply came, or there will be none; the first counts."""
        if self._reply is None:
            self._ended, self._reply = time.perf_counter(), reply
            self._under_way.release()

    def message(self) -> dict[str, Any]:
        """The reply as it came.

        Raises:
            ServerError: the server refuses.
            ConnectionError: the connection was lost.
            TimeoutError: no answer came in time; one that comes later is dropped.
        """
        until = self._begun + self._timeout
        self._link.read_for(self, until)
        if self._under_way.acquire(timeout=max(0.0, until - time.perf_counter())):
            self._under_way.release()
        if self._reply is None:
            self._link.forget(self.number)
            raise TimeoutError(f"no answer within {self._timeout:g} s: the server hangs, or `timeout` is too short for it")
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply

    def wait(self) -> Plan:
        """The plan; raises as ``message`` does, and ``ConnectionError`` where the reply is no plan."""
        return read_plan(self.message(), self._ended - self._begun)


class Link:
    """One connection: sends from any thread. Who waits for a reply reads, for all others too; while nobody waits, a thread looks now and
    then for pings and for the end, and for replies where somebody asked without waiting."""

    def __init__(self, url: str, token: str | None, ca: str | None, wait: float, stuck: float, limits: Limits) -> None:
        self.url, self.limits = url, limits
        self.lost: Exception | None = None
        self._waiting: dict[int, Asked] = {}
        self._farewell: Exception | None = None
        self._lock, self._reading, self._wanted = threading.Lock(), threading.Lock(), threading.Event()
        self._numbers = itertools.count(1)
        self._out_of_band = False
        self._socket = _connect(url, token, ca, wait, stuck, limits)

    def hello(self, contract: dict[str, Any] | None, wait: float) -> Welcome:
        """Say who we are, hear who they are, and begin to read."""
        from . import __version__

        message = {"type": "hello", "id": 0, "protocol": PROTOCOL, "client": f"triune-client {__version__}", "contract": contract}
        try:
            self._socket.send([pack(message)])
            reply = unpack(_binary(self._socket.first(wait)), self.limits)
        except TimeoutError:
            raise TimeoutError(f"{self.url} did not answer within {wait:g} s: is it an action server of Triune?") from None
        except OSError as error:
            raise ConnectionError(f"{self.url} ended the connection instead of welcoming: {error}") from None
        except WireError as error:
            raise ConnectionError(f"{self.url} does not speak Triune's protocol: {error}") from None
        welcome = read_welcome(self.url, reply)
        self._out_of_band = reply.get("out_of_band") is True
        threading.Thread(target=self._keep, name="triune-client", daemon=True).start()
        return welcome

    def ask(self, message: dict[str, Any], timeout: float, waits: bool) -> Asked:
        """Send a request. ``waits``: whether who asks waits for the answer at once."""
        asked = Asked(self, next(self._numbers), timeout)
        whole = {**message, "id": asked.number}
        parts = pack_parts(whole) if self._out_of_band else [pack(whole)]
        with self._lock:
            if self.lost is not None:
                raise self.lost
            self._waiting[asked.number] = asked
        try:
            self._socket.send(parts)
        except OSError as error:
            self._fail(ConnectionError(f"{self.url} takes no more messages: {error}"))
        if not waits:
            self._wanted.set()
        return asked

    def read_for(self, asked: Asked, until: float) -> None:
        """Read until ``asked`` is answered, or the time is over, unless another thread reads."""
        if not self._reading.acquire(blocking=False):
            return
        try:
            while not asked.answered and time.perf_counter() < until:
                self._look(until - time.perf_counter())
        finally:
            self._reading.release()
        if self._waiting:
            self._wanted.set()  # others waited while this thread read for them

    def forget(self, number: int) -> None:
        with self._lock:
            self._waiting.pop(number, None)

    def close(self) -> None:
        self._fail(ConnectionError(f"the connection to {self.url} was closed here"))
        self._part()

    def _keep(self) -> None:
        """While nobody who waits reads: answer pings, notice the end, read for those who asked and do not wait."""
        while self.lost is None:
            self._wanted.wait(LOOKS)
            self._wanted.clear()
            if not self._reading.acquire(blocking=False):
                continue
            try:
                self._look(0.0)
                while self._waiting and self.lost is None:
                    self._look(LOOKS)
            finally:
                self._reading.release()
            if self._waiting:
                self._wanted.set()
        self._part()

    def _look(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            self._read(timeout)

    def _part(self) -> None:
        """Say goodbye, and give the connection back to the system once nobody reads it."""
        self._socket.goodbye()
        alone = self._reading.acquire(timeout=GOODBYE)
        if alone:
            self._socket.last(GOODBYE)
        self._socket.end()
        if not alone:
            self._reading.acquire()
        self._socket.close()
        self._reading.release()

    def _read(self, timeout: float) -> None:
        """Hand on what comes next.

        Raises:
            TimeoutError: nothing comes.
        """
        try:
            for frame in self._socket.receive(timeout):
                self._take(_binary(frame))
        except ConnectionError as closed:
            self._fail(self._farewell or ConnectionError(f"{self.url} ended the connection: {closed}"))
        except (WireError, TypeError) as error:
            self._fail(ConnectionError(f"{self.url} sent what cannot be read: {error}"))
            self._socket.end()

    def _take(self, frame: bytes) -> None:
        message = (unpack_out_of_band if is_out_of_band(frame) else unpack)(frame, self.limits)
        if not isinstance(message, dict):
            raise WireError("not a map")
        with self._lock:
            asked = self._waiting.pop(message.get("id"), None)  # type: ignore[arg-type]  # None is in no such map
        error = refusal(message)
        if asked is None:
            self._farewell = error or self._farewell  # an error that answers nothing is about the connection; a late reply is dropped
        else:
            asked.settle(message if error is None else error)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self.lost is None:
                self.lost = error
            waiting, self._waiting = list(self._waiting.values()), {}
        for asked in waiting:
            asked.settle(self.lost)
        self._wanted.set()


def _connect(url: str, token: str | None, ca: str | None, wait: float, stuck: float, limits: Limits) -> WebSocket:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    context = None
    if url.startswith("wss:"):
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise ValueError(f"{ca} is no file of certificates: {error.strerror or error}") from None
    try:
        return WebSocket(url, headers, context, wait, stuck, limits.frame)
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
    except (ssl.SSLError, exceptions.InvalidHandshake) as error:
        raise ConnectionError(f"{url} does not speak {'TLS and ' * url.startswith('wss:')}websocket: {error}") from None
    except TimeoutError:
        raise TimeoutError(f"no connection to {url} within {wait:g} s") from None
    except OSError as error:
        raise ConnectionError(f"no connection to {url}: {error.strerror or error}") from None


def _binary(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise WireError(f"a text frame: {frame[:100]!r}")
    return frame

"""Who may speak, how many, how fast, and over what: token, browsers, room, rate, TLS. ``SECURITY.md`` has the threat model."""

import base64
import hashlib
import hmac
import logging
import re
import socket
import ssl
import stat
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import WebSocketException

from ...errors import UserError

logger = logging.getLogger(__name__)

LEAST = 16
"""Characters of a token."""
DESK = 1 << 14
"""Bytes that are read at once."""


class Token:
    """The secret that clients send. ``None`` lets everybody in (a server that only this machine can reach)."""

    def __init__(self, secret: str | None) -> None:
        self._digest = None if secret is None else _digest(secret)

    @classmethod
    def read(cls, file: str | None) -> "Token":
        """The token on the first line of ``file``.

        Raises:
            UserError: there is no such file, or the token is too short to be a secret, or no HTTP header can carry it.
        """
        if file is None:
            return cls(None)
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"there is no token file {file}; make one: openssl rand -hex 32 > {file}") from None
        secret = lines[0].strip() if lines else ""
        if len(secret) < LEAST:
            raise UserError(f"the token in {file} has {len(secret)} characters, it needs {LEAST}; make one: openssl rand -hex 32 > {file}")
        if not (secret.isascii() and secret.isprintable()) or " " in secret:
            raise UserError(f"the token in {file} must be printable ASCII without blanks; make one: openssl rand -hex 32 > {file}")
        warn_if_readable(file)
        return cls(secret)

    @property
    def required(self) -> bool:
        return self._digest is not None

    def admits(self, given: str | None) -> bool:
        """Whether ``given`` is the token, in a time that does not tell how much of it is right."""
        return self._digest is None or hmac.compare_digest(self._digest, _digest(given or ""))

    def admits_header(self, authorization: str | None) -> bool:
        """The same for a header ``Authorization: Bearer <token>``, openpi's ``Api-Key <token>``, or the password of ``Basic``, which
        clients send that have nothing but an address: ``ws://any:<token>@host``."""
        kind, _, given = (authorization or "").strip().partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                return self.admits(None)
        return self.admits(given.strip() if kind.lower() in ("bearer", "api-key", "basic") else None)


def _digest(secret: str) -> bytes:
    """As long for every secret, so that a comparison does not tell the length. A header's odd bytes are surrogates here."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def warn_if_readable(file: str) -> None:
    """Warn where a secret can be read by other users of this machine."""
    if Path(file).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s can be read by other users of this machine: chmod 600 %s", file, file)


def from_a_page(origin: str | None, allowed: Collection[str]) -> bool:
    """Whether a page in somebody's browser asks, which no robot is: browsers name the page in ``Origin``, and cannot be kept from it."""
    return origin is not None and origin not in allowed


def names_this_machine(host: str | None, names: Collection[str]) -> bool:
    """Whether a header ``Host`` has one of these names; another is how a page reaches loopback under its own name (DNS rebinding)."""
    try:
        return host is None or urlsplit(f"//{host}").hostname in names
    except ValueError:
        return False


class Room:
    """How many sockets may be open.

    Args:
        total: of all addresses; each: of one.

    Attributes:
        desk: memory where one after the other reads what came.
        memory: gives memory for a large message of so many bytes.
    """

    def __init__(self, total: int, each: int) -> None:
        self.total, self.each = total, each
        self.taken: Counter[str] = Counter()
        self.desk = memoryview(bytearray(DESK))
        self.memory: Callable[[int], np.ndarray] = lambda size: np.empty(size, np.uint8)

    def enter(self, address: str) -> bool:
        """Whether there is room for a socket of ``address``, which then has a place until ``leave``."""
        if self.taken[address] >= self.each or self.taken.total() >= self.total:
            return False
        self.taken[address] += 1
        return True

    def leave(self, address: str) -> None:
        self.taken[address] -= 1
        if not self.taken[address]:
            del self.taken[address]


class Rate:
    """Token buckets, one per address.

    Args:
        per_second: refilled; burst: held at most.
        addresses: that are remembered, the latest seen; one that was forgotten begins anew.
    """

    def __init__(self, per_second: float, burst: float, addresses: int = 1024) -> None:
        self.per_second, self.burst, self.addresses = per_second, burst, addresses
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, address: str, now: float | None = None) -> bool:
        """Whether ``address`` may do one more thing now."""
        now = time.monotonic() if now is None else now
        held, since = self._held.pop(address, (self.burst, now))
        held = min(self.burst, held + (now - since) * self.per_second)
        self._held[address] = (held - 1 if held >= 1 else held, now)
        if len(self._held) > self.addresses:
            self._held.popitem(last=False)
        return held >= 1


def watch_for_death(client: socket.socket, silence: float) -> None:
    """Let TCP ask whether a silent client's machine is still there, where a protocol has no pings."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", silence), ("TCP_KEEPINTVL", silence / 2), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(1, round(value)))


def tls(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """What speaks TLS 1.2 or newer with that certificate, None without one.

    Raises:
        UserError: the files cannot be read or do not belong together.
    """
    if cert is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{cert} and {key} are not a certificate and its key in PEM form ({error})") from None
    warn_if_readable(key)
    return context


def worth_logging(record: logging.LogRecord) -> bool:
    """A filter for what websockets logs: no traceback for what strangers send instead of a handshake, nor their words in our log."""
    error = record.exc_info[1] if record.exc_info else None
    return record.levelno >= logging.WARNING and not (record.msg == "opening handshake failed" and isinstance(error, WebSocketException))


LONGEST = 2000
"""Characters of a sentence that leaves this machine: what a client said comes back in it, but not by the megabyte."""
PATHS = re.compile(r"(?<![\w.])(?:~|\.{1,2})?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\[^\s'\";,]+")


def public(sentence: str) -> str:
    """A sentence that may leave this machine: without the folders of files."""
    return PATHS.sub(lambda match: re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], sentence[:LONGEST])

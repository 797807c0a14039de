"""Who may speak, how fast, and over what: the token, the rate of an address, TLS. ``SECURITY.md`` has the threat model."""

import base64
import hmac
import re
import ssl
import time
from collections import OrderedDict
from pathlib import Path

from ...errors import UserError

LEAST = 16
"""Characters of a token."""


class Token:
    """The secret that clients send. ``None`` lets everybody in (a server that only this machine can reach)."""

    def __init__(self, secret: str | None) -> None:
        self._secret = None if secret is None else secret.encode()

    @classmethod
    def read(cls, file: str | None) -> "Token":
        """The token on the first line of ``file``.

        Raises:
            UserError: there is no such file, or the token is too short to be a secret.
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
        return cls(secret)

    @property
    def required(self) -> bool:
        return self._secret is not None

    def admits(self, given: str | None) -> bool:
        """Whether ``given`` is the token, in a time that does not tell how much of it is right."""
        if self._secret is None:
            return True
        return hmac.compare_digest(self._secret, (given or "").encode(errors="surrogateescape"))

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
    return context


PATHS = re.compile(r"(?<![\w.])(?:~|\.{1,2})?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\[^\s'\";,]+")


def public(sentence: str) -> str:
    """A sentence that may leave this machine: without the folders of files."""
    return PATHS.sub(lambda match: re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], sentence)

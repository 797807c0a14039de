"""The server's log: sentences for people, or one JSON object per line for machines. No pictures, no states, no tokens."""

import json
import logging
import os
import re
import time
from datetime import UTC, datetime

from .exchange import Exchange, Listener, Refusal
from .security import Rate

logger = logging.getLogger(__name__)

FACTS = ("event", "session", "code", "ms")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LEVELS = {"died": logging.ERROR, "started": logging.INFO, "drain": logging.INFO}
"""Events that are logged above DEBUG."""
FORM = "TRIUNE_SERVE_LOG"
"""Environment variable by which the policy's process learns how to log."""
PER_SECOND, AT_ONCE = 5.0, 20.0
"""Refusals of one code that are logged; of the rest the number is told."""


class JSONLines(logging.Formatter):
    """``{"time", "level", "event", "message"}``, with ``session``, ``code`` and ``ms`` where they are known, and ``trace`` of a defect."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row = {"time": moment, "level": record.levelname.lower(), "event": "log", "message": record.getMessage()}
        row |= {key: getattr(record, key) for key in FACTS if getattr(record, key, None) is not None}
        if record.exc_info:
            row["trace"] = self.formatException(record.exc_info)
        return json.dumps(row)


class Text(logging.Formatter):
    """A line for people. What clients named cannot begin a line of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return CONTROLS.sub(lambda found: f"\\x{ord(found.group()):02x}", super().formatMessage(record))


def set_up(as_json: bool, level: str) -> None:
    """Log to stderr, Python's warnings too; the policy's process, when it is started, does the same."""
    os.environ[FORM] = f"{'json' if as_json else 'text'} {level}"
    logging.captureWarnings(True)
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines() if as_json else Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("websockets").setLevel(logging.WARNING)


def set_up_as_told() -> None:
    """As the process that started this one."""
    form, _, level = os.environ.get(FORM, "text warning").partition(" ")
    set_up(form == "json", level)


class Log(Listener):
    """Says what happens: refusals as warnings, the policy's process, and at DEBUG sessions and every answer."""

    def __init__(self) -> None:
        self.rate = Rate(PER_SECOND, AT_ONCE)
        self.unsaid: dict[str, int] = {}

    def exchanged(self, exchange: Exchange) -> None:
        ms = round(1e3 * exchange.seconds, 3)
        session = exchange.request.session
        if exchange.refusal is not None:
            self._refusal(exchange.refusal, session, ms)
        elif logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s answered in %.1f ms", session, ms, extra={"event": "answered", "session": session, "ms": ms})

    def refused(self, refusal: Refusal, client: str) -> None:
        self._refusal(refusal, client, None)

    def happened(self, event: str, session: str | None = None) -> None:
        level = LEVELS.get(event, logging.DEBUG)
        logger.log(level, "%s%s", event, f" {session}" if session else "", extra={"event": event, "session": session})

    def _refusal(self, refusal: Refusal, session: str, ms: float | None) -> None:
        if not self.rate.allows(refusal.code, time.monotonic()):
            self.unsaid[refusal.code] = self.unsaid.get(refusal.code, 0) + 1
            return
        unsaid = self.unsaid.pop(refusal.code, 0)
        more = f" ({unsaid} more like it were not logged)" if unsaid else ""
        words = ("refused %s as %s: %s%s", session, refusal.code, refusal, more)
        logger.warning(*words, extra={"event": "refused", "session": session, "code": refusal.code, "ms": ms})

"""The flight recorder: the latest requests and answers in memory, written to a folder when something went wrong.

Memory holds copies, since what came lies where the next messages want to be read; a thread of its own turns pictures into PNG and writes
them (``data.incidents``), so that the server goes on meanwhile. ``vla data inspect`` opens what it writes, ``vla replay`` asks it again.
"""

import asyncio
import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ... import __version__
from ...data.files import remove
from ...data.incidents import Recorded, is_incident, write_incident
from ...errors import UserError
from . import config
from .exchange import Exchange, Listener
from .service import Service

logger = logging.getLogger(__name__)

WAITING = 2
"""Incidents that wait for the thread; each keeps what it will write in memory."""


class Recorder(Listener):
    """Keeps the latest exchanges, and writes them when told to or when it sees a fault.

    Raises:
        UserError: its folder cannot be written.
    """

    def __init__(self, settings: config.Record, service: Service, name: str) -> None:
        assert settings.dir is not None
        self.settings, self.service, self.name, self.folder = settings, service, name, Path(settings.dir)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"the recorder cannot make its folder {self.folder} ({error.strerror}); give another record.dir") from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"the recorder cannot write into {self.folder}; give another record.dir, or let this user write there")
        self.ring: deque[tuple[int, Recorded]] = deque()
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)
        self.bytes = 0
        self.counts: Counter[str] = Counter(written=0, dropped=0, failed=0, lost=0)
        self._losing = False
        self._since = time.time()
        self._last = float("-inf")
        self._due: asyncio.TimerHandle | None = None
        self._pending: tuple[str, str] | None = None
        self._queue: queue.Queue[tuple[Path, dict[str, Any], list[Recorded]] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def exchanged(self, exchange: Exchange) -> None:
        row = recorded(exchange, time.time())
        chunks = [chunk for chunk in (row.prefix, row.actions, row.planned) if chunk is not None]
        size = held([*row.observation.images.values(), row.observation.state, *chunks])
        self.ring.append((size, row))
        self.bytes += size
        limit, oldest = self.settings.memory_mib * 2**20, row.time - self.settings.seconds
        refusal, changed = exchange.refusal, sum(exchange.reply.events.values()) if exchange.reply else 0
        if refusal is not None and refusal.code in ("internal", "worker") and not self.service.draining:
            self.trigger(refusal.code, str(refusal))
        elif self.settings.events and changed >= self.settings.events:
            self.trigger("guard", f"the guard changed an answer in {changed} places")
        elif self.settings.mode == "always" and self._is_due(limit) and not self._queue.full():
            self._write("always", "everything is recorded")
        while self.ring and (self.bytes > limit or self.ring[0][1].time < oldest):
            self.bytes -= self.ring.popleft()[0]
            if self.settings.mode == "always":
                self._lose()

    def happened(self, event: str, session: str | None = None) -> None:
        self.events.append({"time": time.time(), "event": event, "session": session})
        if event == "died":
            self.trigger("died", "the policy's process ended")

    def trigger(self, reason: str, sentence: str, forced: bool = False) -> None:
        """Write what memory holds, with what follows within ``after`` seconds; not twice within ``gap`` unless it is forced."""
        if self._pending is not None or (not forced and time.monotonic() - self._last < self.settings.gap):
            return
        self._last = time.monotonic()
        self._pending = (reason, sentence)
        self._due = asyncio.get_running_loop().call_later(self.settings.after, self._finish)

    def close(self) -> None:
        """Write what is due, and with ``always`` the rest; then end the thread."""
        if self._due is not None:
            self._due.cancel()
        if self._pending is not None:
            self._finish(wait=True)
        elif self.settings.mode == "always":
            self._write("always", "everything is recorded", wait=True)
        self._queue.put(None)
        self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """Its numbers for /metrics."""
        family = CounterMetricFamily(
            "triune_incidents", "Incidents that the recorder wrote, dropped, or failed to write.", labels=["outcome"]
        )
        for outcome in ("written", "dropped", "failed"):
            family.add_metric([outcome], self.counts[outcome])
        yield family
        yield CounterMetricFamily("triune_recorder_lost", "Requests that record.mode=always could not keep.", value=self.counts["lost"])
        yield GaugeMetricFamily("triune_recorder_bytes", "Memory that the recorder holds.", value=self.bytes)

    def _is_due(self, limit: float) -> bool:
        return self.bytes > limit / 2 or time.time() - self._since > self.settings.seconds / 2

    def _lose(self) -> None:
        """With ``always`` a request left memory before it was written."""
        self.counts["lost"] += 1
        if not self._losing:
            logger.warning("requests come faster than the recorder writes; some are not in the record", extra={"event": "record_lost"})
        self._losing = True

    def _finish(self, wait: bool = False) -> None:
        assert self._pending is not None
        (reason, sentence), self._pending, self._due = self._pending, None, None
        self._write(reason, sentence, wait)

    def _write(self, reason: str, sentence: str, wait: bool = False) -> None:
        """Hand what memory holds to the thread; it is dropped, and said, where the thread has too much to do."""
        if not self.ring and reason == "always":
            return
        now = datetime.now(UTC)
        head = {
            "format": 1,
            "reason": reason,
            "sentence": sentence,
            "time": now.isoformat(),
            "server": f"triune-vla {__version__}",
            "policy": {"name": self.name, **{k: v for k, v in self.service.source.arguments.items() if k in ("path", "precision")}},
            "contract": self.service.contract.model_dump(mode="json"),
            "events": list(self.events),
        }
        job = (self.folder / f"{now:%Y-%m-%dT%H-%M-%S.%f}-{reason}", head, [row for _, row in self.ring])
        try:
            self._queue.put(job, block=wait)
        except queue.Full:
            self.counts["dropped"] += 1
            logger.warning("the recorder is still writing; an incident (%s) was dropped", reason, extra={"event": "record_dropped"})
            return
        if self.settings.mode == "always":
            self.ring.clear()
            self.bytes, self._losing = 0, False
        self._since = time.time()

    def _work(self) -> None:
        """The thread: writes incidents, and removes the oldest where they take too much room."""
        while (job := self._queue.get()) is not None:
            folder, head, rows = job
            began = time.perf_counter()
            try:
                size = write_incident(folder, head, rows)
                self._make_room(folder)
            except (OSError, pa.ArrowException) as error:
                self.counts["failed"] += 1
                logger.error("the recorder could not write %s: %s", folder, error, extra={"event": "record_failed"})
                continue
            finally:
                del job, rows
            self.counts["written"] += 1
            words = ("recorded %s: %s (%.1f MB)", folder, head["sentence"], size / 1e6)
            logger.warning(*words, extra={"event": "recorded", "code": head["reason"], "ms": round(1e3 * (time.perf_counter() - began))})

    def _make_room(self, newest: Path) -> None:
        """Remove the oldest incidents beyond ``disk_mib``; never the newest."""
        found = sorted(folder for folder in self.folder.iterdir() if not folder.name.startswith(".") and is_incident(folder))
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in found}
        for folder in found:
            if sum(sizes.values()) <= self.settings.disk_mib * 2**20 or folder == newest:
                return
            remove(folder)
            del sizes[folder]
            logger.info("the oldest incident %s was removed to make room", folder, extra={"event": "record_removed"})


def recorded(exchange: Exchange, now: float) -> Recorded:
    """An exchange as it is written."""
    request, reply, refusal = exchange.request, exchange.reply, exchange.refusal
    prefix = None if request.prefix is None else request.prefix.actions.copy()
    images = {camera: image.copy() for camera, image in request.observation.images.items()}
    seen = replace(request.observation, images=images, state=request.observation.state.copy())
    asked = (now, request.session, exchange.seed, exchange.step, seen, prefix, request.delay, request.samples)
    if reply is None:
        assert refusal is not None
        return Recorded(*asked, code=refusal.code, message=str(refusal), seconds=exchange.seconds)
    same = exchange.planned is None or np.array_equal(exchange.planned, reply.actions, equal_nan=True)
    planned, timing, events = None if same else exchange.planned, dict(reply.timing), dict(reply.events)
    return Recorded(*asked, actions=reply.actions, seconds=exchange.seconds, timing=timing, events=events, planned=planned)


def held(arrays: Iterable[np.ndarray]) -> int:
    """Bytes of memory that these arrays keep alive: a view keeps all of what it looks at, such as the frame that it came in."""
    owners: dict[int, int] = {}
    for array in arrays:
        owner: Any = array
        while isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        if isinstance(owner, memoryview):
            owner = owner.obj
        size = owner.nbytes if isinstance(owner, np.ndarray) else len(owner) if hasattr(owner, "__len__") else array.nbytes
        owners[id(owner)] = max(size, array.nbytes)
    return sum(owners.values())

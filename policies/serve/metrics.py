"""What Prometheus reads at /metrics: latency by stage, late chunks, refusals, the guard's changes, inputs unlike the training data,
foresight that did not come true, and how the server itself fares.

No label is a client's word (session, address, instruction), so that there are as many series as there are stages, codes and dimensions.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from ... import __version__
from . import config
from .service import Exchange, Listener, Refusal, Service
from .surprise import Surprise

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STAGES = {"queue": "queue", "encode": "inputs", "prefix": "prefix", "steps": "steps", "model": "model", "foresight": "foresight"}
"""Stage as the policy or the service names it in ``Reply.timing`` -> label. ``decode``, ``pictures`` and ``encode`` come from dialects."""
QUANTILES = (0.5, 0.95, 0.99)
SIDES = ("below", "above")


@dataclass(frozen=True)
class Band:
    """The 1 % and 99 % quantiles of one vector in the training data, with names of its dimensions."""

    low: np.ndarray
    high: np.ndarray
    names: tuple[str, ...]

    def outside(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many of the rows (n, D) lie below and above, per dimension."""
        return (values < self.low).sum(0), (values > self.high).sum(0)


class Metrics(Listener, Collector):
    """Counts what a service does; ``page`` is what /metrics answers.

    Args:
        name: of the policy.
    """

    def __init__(self, settings: config.Metrics, service: Service, name: str) -> None:
        self.settings, self.service = settings, service
        self.registry = CollectorRegistry()
        self.surprise = Surprise(settings.foresight_every, settings.window)
        self.latest: dict[str, deque[float]] = {}
        self.shares: dict[str, deque[float]] = {}
        self.bands: dict[str, Band] = {}
        self.extra: list[Callable[[], Iterator[GaugeMetricFamily]]] = []
        self._starts = 0
        one = {"registry": self.registry}
        Gauge("triune_server_info", "Version of the server and the policy that it serves.", ["version", "policy"], **one).labels(
            __version__, name
        ).set(1)
        Gauge("triune_start_time_seconds", "Unix time at which the server began.", **one).set(time.time())
        self.requests = Counter(
            "triune_requests", "Requests for a plan, by outcome: answered, or the code of the refusal.", ["outcome"], **one
        )
        self.refusals = Counter(
            "triune_refusals", "Everything refused, also connections and messages that were no request.", ["code"], **one
        )
        self.stages = Histogram("triune_stage_seconds", "Time of one request in each stage.", ["stage"], buckets=BUCKETS, **one)
        self.batches = Histogram(
            "triune_batch_size", "Requests that were answered in one call of the policy.", buckets=(1, 2, 4, 8, 16, 32, 64), **one
        )
        self.late = Counter("triune_late_chunks", "Chunks that came too late, and by what measure.", ["reason"], **one)
        self.guard = Counter("triune_guard_events", "What the guard changed in actions.", ["kind", "dimension"], **one)
        self.values = Counter("triune_values", "Values compared with the training data, per dimension.", ["part"], **one)
        self.outside = Counter(
            "triune_values_outside",
            "Those below the 1 % or above the 99 % quantile of the training data.",
            ["part", "dimension", "side"],
            **one,
        )
        self.events = Counter("triune_policy_events", "The policy's process: died, started.", ["event"], **one)
        self.begun = Counter("triune_sessions_begun", "Sessions that began.", **one)
        for code in ("late", "busy", "bad_request", "worker", "internal", "unauthorized", "contract", "too_large"):
            self.refusals.labels(code)
        for reason in ("deadline", "delay", "executed"):
            self.late.labels(reason)
        self.registry.register(self)

    def page(self) -> tuple[int, str, bytes]:
        """Status, type and body of /metrics."""
        return 200, CONTENT, generate_latest(self.registry)

    def exchanged(self, exchange: Exchange) -> None:
        reply, request = exchange.reply, exchange.request
        if reply is None:
            assert exchange.refusal is not None
            self.requests.labels(exchange.refusal.code).inc()
            self.refusals.labels(exchange.refusal.code).inc()
            if exchange.refusal.code == "late":
                self.late.labels("deadline").inc()
            return
        self.requests.labels("answered").inc()
        self.timed("total", 1e3 * exchange.seconds)
        for key, stage in STAGES.items():
            if key in reply.timing:
                self.timed(stage, reply.timing[key])
        self.batches.observe(reply.timing.get("batch", 1))
        contract = self.service.contract
        if reply.rate:
            if request.delay and exchange.seconds > request.delay / reply.rate:
                self.late.labels("delay").inc()
            if contract.executed and exchange.seconds > contract.executed / reply.rate:
                self.late.labels("executed").inc()
        for event, count in reply.events.items():
            kind, _, dimension = event.partition("/")
            self.guard.labels(kind, dimension).inc(count)
        self._compare("state", request.observation.state[None])
        self._compare("action", reply.actions)
        self.surprise.saw(request, reply, contract)

    def refused(self, refusal: Refusal, client: str) -> None:
        self.refusals.labels(refusal.code).inc()

    def timed(self, stage: str, ms: float) -> None:
        self.stages.labels(stage).observe(ms / 1e3)
        self.latest.setdefault(stage, deque(maxlen=self.settings.window)).append(ms / 1e3)

    def happened(self, event: str, session: str | None = None) -> None:
        if event in ("died", "started"):
            self.events.labels(event).inc()
        if event == "started":
            self._read_bands()
        if event == "reset":
            self.begun.inc()
        if event in ("reset", "close") and session is not None:
            self.surprise.forget(session)

    def wants_foresight(self, request: object) -> bool:
        return self.surprise.wants(request)

    def _read_bands(self) -> None:
        """What the policy told of its training data; each start of its process tells it anew."""
        contract = self.service.contract
        names = {"state": contract.state.names, "action": contract.action.names}
        told = self.service.introduction.get("bands", {})
        self.bands = {part: Band(np.array(low), np.array(high), names[part]) for part, (low, high) in told.items()}
        for part, band in self.bands.items():
            for name in band.names:
                for side in SIDES:
                    self.outside.labels(part, name, side)

    def _compare(self, part: str, values: np.ndarray) -> None:
        band = self.bands.get(part)
        if band is None or values.shape[1] != len(band.names):
            return
        self.values.labels(part).inc(len(values))
        found = band.outside(values)
        for side, counts in zip(SIDES, found, strict=True):
            for i in np.flatnonzero(counts):
                self.outside.labels(part, band.names[i], side).inc(int(counts[i]))
        share = float(sum(c.sum() for c in found)) / values.size
        self.shares.setdefault(part, deque(maxlen=self.settings.window)).append(share)

    def collect(self) -> Iterator[GaugeMetricFamily | SummaryMetricFamily]:
        """What is looked up when Prometheus asks."""
        yield _quantiles("triune_stage_latency_seconds", f"The same of the latest {self.settings.window} requests.", "stage", self.latest)
        yield from self.surprise.collect()
        shares = GaugeMetricFamily(
            "triune_outside_share",
            f"Share of values outside q01-q99 in the latest {self.settings.window} requests; 0.02 is usual.",
            labels=["part"],
        )
        for part, found in self.shares.items():
            shares.add_metric([part], float(np.mean(found)))
        yield shares
        service = self.service
        yield GaugeMetricFamily("triune_sessions", "Sessions that have begun and not ended.", value=len(service.sessions))
        yield GaugeMetricFamily("triune_waiting", "Commands in the queue.", value=len(service.waiting))
        yield GaugeMetricFamily("triune_ready", "1 where a request would be answered.", value=float(service.ready and not service.draining))
        memory = GaugeMetricFamily("triune_resident_bytes", "Resident memory; a GPU's is not in it.", labels=["process"])
        pids = {"server": os.getpid()} | ({"policy": service.process.child.pid} if service.process else {})
        for process, pid in pids.items():
            if (resident := resident_bytes(pid)) is not None:
                memory.add_metric([process], resident)
        yield memory
        for more in self.extra:
            yield from more()

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: the registry need not ask for it when it is told of this collector."""
        return []


def _quantiles(name: str, words: str, label: str, found: dict[str, deque[float]]) -> SummaryMetricFamily:
    family = SummaryMetricFamily(name, words, labels=[label])
    for key, values in found.items():
        for quantile, value in zip(QUANTILES, np.quantile(np.array(values), QUANTILES), strict=True):
            family.add_sample(name, {label: key, "quantile": str(quantile)}, float(value))
    return family


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process; None where the system has no /proc, or the process has ended."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None

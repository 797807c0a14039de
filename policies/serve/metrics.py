"""What Prometheus reads at /metrics: latency by stage, late chunks, refusals, the guard's changes, inputs unlike the training data,
foresight that did not come true, and how the server itself fares.

No label is a client's word (session, address, instruction), so that there are as many series as there are stages, codes and dimensions.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from ... import __version__
from ...data.transforms import SMALLEST_SCALE
from ..base import Request
from . import config
from .exchange import Exchange, Listener, Refusal
from .service import Service
from .surprise import Surprise

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STAGES = {"queue": "queue", "encode": "inputs", "prefix": "prefix", "steps": "steps", "model": "model", "foresight": "foresight"}
"""Stage as the policy or the service names it in ``Reply.timing`` -> label. ``decode``, ``pictures`` and ``encode`` come from dialects."""
QUANTILES = (0.5, 0.95, 0.99)
SIDES = ("below", "above")


@dataclass(frozen=True)
class Band:
    """The 1 % and 99 % quantiles of the state in the training data, (S,) each, with names of its dimensions."""

    low: np.ndarray
    high: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, low: Sequence[float], high: Sequence[float], names: tuple[str, ...]) -> "Band":
        """A dimension that did not vary has room for rounding on both sides."""
        a, b = np.array(low), np.array(high)
        room = np.where(b - a < 2 * SMALLEST_SCALE, SMALLEST_SCALE, 0.0)
        return cls(a - room, b + room, names)


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
        self.stage: dict[str, Histogram] = {}
        self.shares: deque[float] = deque(maxlen=settings.window)
        self.band: Band | None = None
        self.extra: list[Callable[[], Iterator[Metric]]] = []
        disable_created_metrics()
        Gauge(
            "triune_server_info", "Version of the server and the policy that it serves.", ["version", "policy"], registry=self.registry
        ).labels(__version__, name).set(1)
        Gauge("triune_start_time_seconds", "Unix time at which the server began.", registry=self.registry).set(time.time())
        self.requests = Counter(
            "triune_requests", "Requests for a plan, by outcome: answered, or the code of the refusal.", ["outcome"], registry=self.registry
        )
        self.refusals = Counter(
            "triune_refusals", "Everything refused, also connections and messages that were no request.", ["code"], registry=self.registry
        )
        self.stages = Histogram(
            "triune_stage_seconds", "Time of one request in each stage.", ["stage"], buckets=BUCKETS, registry=self.registry
        )
        self.batches = Histogram(
            "triune_batch_size",
            "Requests that were answered in one call of the policy.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.late = Counter("triune_late_chunks", "Chunks that came too late, and by what measure.", ["reason"], registry=self.registry)
        self.guard = Counter("triune_guard_events", "What the guard changed in actions.", ["kind", "dimension"], registry=self.registry)
        self.inputs = Counter("triune_inputs", "States that were compared with the training data.", registry=self.registry)
        self.outside = Counter(
            "triune_inputs_outside",
            "Those below the 1 % or above the 99 % quantile of the training data.",
            ["dimension", "side"],
            registry=self.registry,
        )
        self.events = Counter("triune_policy_events", "The policy's process: died, started.", ["event"], registry=self.registry)
        self.begun = Counter("triune_sessions_begun", "Sessions that began.", registry=self.registry)
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
            kind, _, dimension = event.partition(" ")
            self.guard.labels(kind, dimension).inc(count)
        self._compare(request.observation.state)
        self.surprise.saw(request, reply, contract)

    def refused(self, refusal: Refusal, client: str) -> None:
        self.refusals.labels(refusal.code).inc()

    def timed(self, stage: str, ms: float) -> None:
        if stage not in self.latest:
            self.latest[stage], self.stage[stage] = deque(maxlen=self.settings.window), self.stages.labels(stage)
        self.stage[stage].observe(ms / 1e3)
        self.latest[stage].append(ms / 1e3)

    def happened(self, event: str, session: str | None = None) -> None:
        if event in ("died", "started"):
            self.events.labels(event).inc()
        if event == "started":
            self._read_band()
        if event == "reset":
            self.begun.inc()
        if event in ("reset", "close") and session is not None:
            self.surprise.forget(session)

    def wants_foresight(self, request: Request) -> bool:
        return self.surprise.wants(request)

    def _read_band(self) -> None:
        """What the policy told of its training data; each start of its process tells it anew."""
        told = self.service.introduction.get("bands", {})
        if "state" in told:
            low, high = told["state"]
            self.band = Band.of(low, high, self.service.contract.state.names)
            for name in self.band.names:
                for side in SIDES:
                    self.outside.labels(name, side)

    def _compare(self, state: np.ndarray) -> None:
        if self.band is None or len(state) != len(self.band.names):
            return
        self.inputs.inc()
        found = dict(zip(SIDES, (state < self.band.low, state > self.band.high), strict=True))
        for side, beyond in found.items():
            for i in np.flatnonzero(beyond):
                self.outside.labels(self.band.names[i], side).inc()
        self.shares.append(float(sum(beyond.mean() for beyond in found.values())))

    def collect(self) -> Iterator[Metric]:
        """What is looked up when Prometheus asks."""
        yield _quantiles("triune_stage_latency_seconds", f"The same of the latest {self.settings.window} requests.", "stage", self.latest)
        yield from self.surprise.collect()
        if self.shares:
            words = f"Share of the numbers of the latest {self.settings.window} states outside q01-q99 of the training data; 0.02 is usual."
            yield GaugeMetricFamily("triune_outside_share", words, value=float(np.mean(self.shares)))
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

    def describe(self) -> list[Metric]:
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

"""Foresight surprise: how far what a policy foresaw is from what is seen then.

Of every n-th request of a session what is foreseen is drawn. The first request after the executed part of its chunk shows what came:
the mean absolute difference of the two, in cells of 1/32 of a picture, is compared with that between what was seen when it was foreseen
and what came. 0 is foreseen exactly; 1 is no better than to expect that nothing changes.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client.core import CounterMetricFamily, Metric, SummaryMetricFamily

from ...data import Contract
from ..base import Request
from .exchange import Reply

CELLS = 32
STILL = 1.0
"""Grey levels (of 255) by which a picture changes at least, for the ratio: what stands still is noise of the camera."""
SESSIONS = 1024


@dataclass(frozen=True)
class _Foreseen:
    """Small pictures of what was foreseen, and of what was seen then.

    Attributes:
        stamp: timestamp of the observation; arrived: when it came, for clients that send no timestamps.
        period: seconds until what was foreseen should be seen.
    """

    foreseen: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    stamp: float
    arrived: float
    period: float


class Surprise:
    """Compares foresight with what came, of one request in ``every``; the latest ``window`` results are kept."""

    def __init__(self, every: int, window: int) -> None:
        self.every = every
        self.found: deque[float] = deque(maxlen=window)
        self.foreseen = self.still = 0.0
        self.count = 0
        self._asked: dict[str, int] = {}
        self._pending: dict[str, _Foreseen] = {}

    def wants(self, request: Request) -> bool:
        """Whether this request's foresight shall be drawn."""
        if not self.every:
            return False
        asked = self._asked.get(request.session, 0)
        if asked or len(self._asked) < SESSIONS:
            self._asked[request.session] = asked + 1
        return asked % self.every == 0 and request.session not in self._pending

    def forget(self, session: str) -> None:
        """The session began anew, or ended."""
        self._asked.pop(session, None)
        self._pending.pop(session, None)

    def saw(self, request: Request, reply: Reply, contract: Contract) -> None:
        """Compare what is seen now with what was foreseen for now, and remember what is foreseen now."""
        session, images, stamp, now = request.session, request.observation.images, request.observation.timestamp, time.monotonic()
        pending = self._pending.get(session)
        if pending is not None:
            passed = stamp - pending.stamp if stamp > pending.stamp else now - pending.arrived
            if passed >= pending.period * 3 / 4:
                del self._pending[session]
                if passed <= pending.period * 3 / 2:
                    self._compare(pending, images)
        if reply.foresight and session not in self._pending and self.every and contract.executed and reply.rate:
            pairs = {c: (picture, images[c]) for c, picture in reply.foresight.items() if c in images}
            cells = {c: np.minimum(CELLS, np.minimum(a.shape[:2], b.shape[:2])) for c, (a, b) in pairs.items()}
            foreseen, seen = ({c: small(pair[i], cells[c]) for c, pair in pairs.items()} for i in (0, 1))
            self._pending[session] = _Foreseen(foreseen, seen, stamp, now, contract.executed / reply.rate)

    def _compare(self, pending: _Foreseen, images: dict[str, np.ndarray]) -> None:
        cells = {c: p.shape[:2] for c, p in pending.foreseen.items()}
        came = {c: small(images[c], n) for c, n in cells.items() if c in images and all(np.greater_equal(images[c].shape[:2], n))}
        if not came:
            return
        foreseen = float(np.mean([np.abs(pending.foreseen[c] - picture).mean() for c, picture in came.items()]))
        still = float(np.mean([np.abs(pending.seen[c] - picture).mean() for c, picture in came.items()]))
        self.foreseen, self.still, self.count = self.foreseen + foreseen, self.still + still, self.count + 1
        self.found.append(foreseen / max(still, STILL))

    def collect(self) -> Iterator[Metric]:
        """The numbers for /metrics."""
        family = SummaryMetricFamily(
            "triune_foresight_surprise", "Error of foresight against that of expecting no change; 1 is no better.", labels=[]
        )
        if self.found:
            for quantile, value in zip((0.5, 0.95), np.quantile(np.array(self.found), (0.5, 0.95)), strict=True):
                family.add_sample("triune_foresight_surprise", {"quantile": str(quantile)}, float(value))
        yield family
        errors = CounterMetricFamily(
            "triune_foresight_error", "Sum of mean absolute errors in grey levels: of foresight, of no change.", labels=["of"]
        )
        errors.add_metric(["foresight"], self.foreseen)
        errors.add_metric(["no_change"], self.still)
        yield errors
        yield CounterMetricFamily("triune_foresight_compared", "Pictures foreseen that were compared with what came.", value=self.count)


def small(image: np.ndarray, cells: Sequence[int] | np.ndarray) -> np.ndarray:
    """Means over ``cells`` (rows, columns) of an image (H, W, 3) that has at least as many pixels: float32 (rows, columns, 3)."""
    out: np.ndarray = image.astype(np.float32)
    for axis, count in enumerate(cells):
        edges = np.linspace(0, out.shape[axis], int(count) + 1).astype(int)
        sizes = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(3)])
        out = np.add.reduceat(out, edges[:-1], axis) / sizes.astype(np.float32)
    return out

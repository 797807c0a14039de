"""What a policy sees, foresees and does, streamed to a rerun viewer or into an .rrd file.

``<session>/camera/<name>``             what was seen
``<session>/foresight/<name>``          what is expected to be seen after the executed part, beside it
``<session>/action/<dimension>``        the chunk's executed part over the time in which it is executed
``<session>/action/<dimension>/limit``  its limits, or the 1 % and 99 % quantiles of the training data
``<session>/timing/<stage>``            milliseconds
``<session>/log``                       refusals, changes by the guard, beginnings and ends

A thread of its own speaks to rerun; what it cannot keep up with is left out and counted.
"""

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, Metric

from ...errors import UserError
from ..base import Request
from . import config
from .exchange import Exchange, Listener
from .service import Service

try:
    import rerun as rr
    import rerun.blueprint as rrb
except ImportError as error:
    raise UserError(f"the viewer needs rerun, which is not installed ({error}); run `pip install 'triune-vla[rerun]'`") from None

logger = logging.getLogger(__name__)

WAITING = 64
"""Exchanges that wait for the thread."""
PORT = 9876
TIMELINE = "time"
SESSIONS = 4096
COLOURS = {"action": (80, 160, 255), "limit": (220, 80, 60), "band": (150, 150, 150)}


class Viewer(Listener):
    """Streams exchanges to rerun.

    Raises:
        UserError: there is no screen to open a viewer on, or a file cannot be written.
    """

    def __init__(self, settings: config.Rerun, service: Service, name: str) -> None:
        self.settings, self.service = settings, service
        self.left_out = 0
        self._asked: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._shown: set[str] = set()
        self._planned: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._stream = rr.RecordingStream(f"triune {name}")
        self._window = self._open()
        self._queue: queue.Queue[tuple[str, Any, float] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="viewer", daemon=True)
        self._thread.start()

    def exchanged(self, exchange: Exchange) -> None:
        self._put(exchange.request.session, exchange)

    def happened(self, event: str, session: str | None = None) -> None:
        if event in ("reset", "close") and session is not None:
            self._asked.pop(session, None)
        self._put(session or "server", event)

    def wants_foresight(self, request: Request) -> bool:
        if not self.settings.foresight_every or len(self._asked) >= SESSIONS:
            return False
        asked = self._asked[request.session] = self._asked.get(request.session, -1) + 1
        return asked % self.settings.foresight_every == 0

    def close(self) -> None:
        """Send what waits, and close the file or the connection. A window that was opened stays."""
        self._queue.put(None)
        self._thread.join()
        self._stream.flush(timeout_sec=5.0)
        self._stream.disconnect()

    def collect(self) -> Iterator[Metric]:
        """Its number for /metrics."""
        yield CounterMetricFamily(
            "triune_viewer_left_out", "Exchanges and events that the viewer could not keep up with.", value=self.left_out
        )

    def _open(self) -> subprocess.Popen[bytes] | None:
        if self.settings.save is not None:
            try:
                self._stream.save(self.settings.save)
            except (OSError, RuntimeError) as error:
                raise UserError(f"the viewer cannot write {self.settings.save} ({error}); give another rerun.save") from None
            return None
        if self.settings.connect is not None:
            self._stream.connect_grpc(self.settings.connect)
            return None
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            mend = "start `rerun` on a machine that has one and give rerun.connect=rerun+http://<it>:9876/proxy, or --rerun-save FILE"
            raise UserError(f"there is no screen here to open a viewer on; {mend}")
        command = [sys.executable, "-m", "rerun", "--bind", "127.0.0.1", "--port", str(PORT), "--hide-welcome-screen"]
        window = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # its own default is every address
        self._stream.connect_grpc(f"rerun+http://127.0.0.1:{PORT}/proxy")
        return window

    def _put(self, session: str, what: Any) -> None:
        try:
            self._queue.put_nowait((session, what, time.time()))
        except queue.Full:
            self.left_out += 1

    def _work(self) -> None:
        self._stream_all()
        for root in list(self._planned):
            self._act(root)

    def _stream_all(self) -> None:
        while (item := self._queue.get()) is not None:
            session, what, now = item
            root = "/".join(rr.escape_entity_path_part(part) for part in session.split("/"))
            if session not in self._shown and session != "server":
                if len(self._shown) >= SESSIONS:
                    self._shown.clear()
                    self._began.clear()
                    self._planned.clear()
                self._shown.add(session)
                self._stream.send_blueprint(self._blueprint(root))  # the newest session is shown; all are in the tree
            if isinstance(what, Exchange):
                self._exchange(root, what, now - self._began.setdefault(session, now))
            else:
                if what in ("reset", "close"):
                    self._act(root)
                if what == "reset":
                    self._began.pop(session, None)
                self._stream.set_time(TIMELINE, duration=now - self._began.get(session, now))
                self._say(root, what, "ERROR" if what == "died" else "INFO")

    def _exchange(self, root: str, exchange: Exchange, passed: float) -> None:
        """Stream one exchange; ``passed`` is the time since the session's first, for clients that send no timestamps."""
        observation, reply = exchange.request.observation, exchange.reply
        now = observation.timestamp or passed
        stream = self._stream
        stream.set_time(TIMELINE, duration=now)
        for camera, image in observation.images.items():
            stream.log(f"{root}/camera/{rr.escape_entity_path_part(camera)}", rr.Image(image))
        stream.log(f"{root}/instruction", rr.TextDocument(observation.instruction))
        if reply is None:
            self._say(root, f"{exchange.refusal.code if exchange.refusal else ''}: {exchange.refusal}", "WARN")
            return
        for camera, image in reply.foresight.items():
            stream.log(f"{root}/foresight/{rr.escape_entity_path_part(camera)}", rr.Image(image))
        for stage, ms in {**reply.timing, "total": 1e3 * exchange.seconds}.items():
            if stage == "batch":
                continue
            stream.log(f"{root}/timing/{rr.escape_entity_path_part(stage)}", rr.Scalars(ms))
        if reply.events:
            self._say(root, "guard: " + ", ".join(f"{kind} {count}" for kind, count in reply.events.items()), "WARN")
        begun, rate = exchange.request.delay, reply.rate or 1.0
        self._act(root, now + begun / rate)
        self._planned[root] = now + np.arange(begun, len(reply.actions)) / rate, reply.actions[begun:]

    def _act(self, root: str, until: float | None = None) -> None:
        """Draw what was executed of the plan before: up to when the next one took over, or as much as the contract says."""
        contract = self.service.contract
        times, actions = self._planned.pop(root, (np.zeros(0), np.zeros((0, 0))))
        count = contract.executed or len(times) if until is None else int(np.sum(times < until - 1e-6))
        times, actions = times[:count], actions[:count]
        if not len(times):
            return
        for i, (name, column) in enumerate(zip(contract.action.names, actions.T, strict=False)):
            place = f"{root}/action/{rr.escape_entity_path_part(name)}"
            self._curve(place, times, column[:, None])
            for kind, ends in self._ends(i, name).items():
                self._curve(f"{place}/{kind}", times[[0, -1]], np.tile(ends, (2, 1)))

    def _curve(self, place: str, times: np.ndarray, values: np.ndarray) -> None:
        """Points (T, lines) over time."""
        index = rr.TimeColumn(TIMELINE, duration=times)
        self._stream.send_columns(place, [index], rr.Scalars.columns(scalars=values.reshape(-1)).partition([values.shape[1]] * len(times)))

    def _ends(self, index: int, name: str) -> dict[str, list[float]]:
        """Lines that go with the curve of an action: the limits that the policy's robot has, the quantiles of the training data."""
        told, found = self.service.introduction, {}
        if self.service.limits is not None:
            limits = self.service.limits.dimensions[index]
            ends = [end for end in (limits.min, limits.max) if end is not None]
            if ends:
                found["limit"] = ends
        if "action" in told.get("bands", {}):
            low, high = told["bands"]["action"]
            found["band"] = [low[index], high[index]]
        return found

    def _say(self, root: str, words: str, level: str) -> None:
        self._stream.log(f"{root}/log", rr.TextLog(words, level=level))

    def _blueprint(self, root: str) -> Any:
        """Cameras with what is foreseen beside them, a plot for each action dimension, timing, words."""
        contract = self.service.contract
        pairs = []
        for camera in contract.camera_names:
            part = rr.escape_entity_path_part(camera)
            views = [rrb.Spatial2DView(origin=f"{root}/{kind}/{part}", name=f"{camera} {kind}") for kind in ("camera", "foresight")]
            pairs.append(rrb.Horizontal(*views))
        plots = []
        for name in contract.action.names:
            place = f"{root}/action/{rr.escape_entity_path_part(name)}"
            styles = {"action": place, "limit": f"{place}/limit", "band": f"{place}/band"}
            overrides: Any = {where: rr.SeriesLines(colors=[COLOURS[kind]]) for kind, where in styles.items()}
            plots.append(rrb.TimeSeriesView(origin=place, name=name, overrides=overrides, plot_legend=rrb.PlotLegend(visible=False)))
        words = [
            rrb.TextDocumentView(origin=f"{root}/instruction", name="instruction"),
            rrb.TextLogView(contents=[f"{root}/log", "server/log"]),
        ]
        timing = rrb.TimeSeriesView(origin=f"{root}/timing", name="timing, ms")
        left = rrb.Vertical(*pairs, rrb.Horizontal(*words), row_shares=[3] * len(pairs) + [1])
        right = rrb.Vertical(rrb.Grid(*plots, name="actions"), timing, row_shares=[3, 1])
        return rrb.Blueprint(rrb.Horizontal(left, right, column_shares=[1, 1]), rrb.TimePanel(state="collapsed"), collapse_panels=True)

"""What operators have of a server: metrics, logs, the flight recorder and the viewer, as its config asks for them."""

from collections.abc import Callable

from .config import Serve
from .exchange import Listener
from .logs import Log
from .metrics import Metrics
from .recorder import Recorder
from .service import Service


class Operations:
    """Listeners of one server. ``pages`` are served on its port; ``close`` ends what runs beside it.

    Args:
        name: of the policy.

    Raises:
        UserError: the recorder's folder cannot be written, or the viewer cannot be started.
    """

    def __init__(self, config: Serve, service: Service, name: str) -> None:
        self.metrics = Metrics(config.metrics, service, name)
        self.recorder = Recorder(config.record, service, name) if config.record.dir is not None else None
        self.pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {"/metrics": self.metrics.page}
        listeners: list[Listener] = [self.metrics, Log()]
        if self.recorder is not None:
            listeners.append(self.recorder)
            self.metrics.extra.append(self.recorder.collect)
        self.viewer = None
        if config.rerun.wanted:
            from .viewer import Viewer

            self.viewer = Viewer(config.rerun, service, name)
            listeners.append(self.viewer)
            self.metrics.extra.append(self.viewer.collect)
        service.listeners += listeners

    def record(self) -> None:
        """Write what the recorder holds now; an operator asked for it."""
        if self.recorder is not None:
            self.recorder.trigger("asked", "an operator asked for it (SIGUSR1)", forced=True)

    def close(self) -> None:
        """Finish what is being written."""
        for part in (self.recorder, self.viewer):
            if part is not None:
                part.close()

"""What ``vla serve`` may be told: a YAML file, or key=value on the command line."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ...config import Strict
from .keys import Keys

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Metrics(Strict):
    """What /metrics counts beyond what comes by itself.

    Attributes:
        foresight_every: of so many requests of a session one is drawn, to compare what was foreseen with what is seen then; 0: none.
            Drawing takes the policy's time.
        window: latest requests of which quantiles and shares are told.
    """

    foresight_every: NonNegativeInt = 50
    window: PositiveInt = 1000


class Record(Strict):
    """The flight recorder.

    Attributes:
        dir: folder for incidents; without it nothing is recorded.
        mode: ``fault`` writes what memory holds when something went wrong; ``always`` writes everything, part by part.
        memory_mib, seconds: what memory holds, the latest.
        after: seconds that a fault is followed before it is written.
        gap: seconds from one incident to the next one at least; SIGUSR1 always writes.
        events: changes by the guard within one answer that count as a fault; 0: none do.
        disk_mib: for all incidents; the oldest are removed for new ones.
    """

    dir: str | None = None
    mode: Literal["fault", "always"] = "fault"
    memory_mib: PositiveFloat = 256.0
    seconds: PositiveFloat = 60.0
    after: NonNegativeFloat = 2.0
    gap: NonNegativeFloat = 30.0
    events: NonNegativeInt = 0
    disk_mib: PositiveFloat = 4096.0


class Rerun(Strict):
    """The viewer.

    Attributes:
        spawn: open a viewer on this machine; connect: its address elsewhere, ``rerun+http://host:9876/proxy``; save: a file instead.
        foresight_every: of so many requests of a session one is drawn; 0: none.
    """

    spawn: bool = False
    connect: str | None = None
    save: str | None = None
    foresight_every: NonNegativeInt = 5

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum((self.spawn, self.connect is not None, self.save is not None)) > 1:
            raise ValueError("give one of spawn, connect and save")
        return self

    @property
    def wanted(self) -> bool:
        """Whether there is anything to show it with."""
        return self.spawn or self.connect is not None or self.save is not None


class Serve(Strict):
    """Where a policy is served, to whom, and how much each may ask.

    Attributes:
        host: address to listen on. Any but loopback needs ``token_file``.
        port: of the websocket and of /healthz, /readyz, /metrics; 0 takes a free one.
        harness_port: of vla-evaluation-harness, which has no path; it is at /harness of ``port`` too.
        groot_port: of GR00T's ZeroMQ. That is never encrypted, so with a ``host`` that others reach it needs ``allow_plain_zmq``.
        keys: what clients of other protocols than ours call cameras, state and instruction.
        token_file: a file whose first line is the secret that clients send (``Authorization: Bearer <token>``).
        tls_cert, tls_key: PEM files; with them only ``wss://`` is spoken.
        origins: web pages (``https://lab.example``) that may connect from a browser; others may not, whatever they know.
        batch: sessions answered in one call of the policy.
        window_ms: how long a batch waits at most for sessions that are about to ask again, as they did before; never more than a quarter
            of what a call of the policy takes, and never for a single session.
        queue: requests that may wait; in_flight: requests of one connection at once.
        clients: connections at once; each_address: how many of them one address may have.
        rate: requests per second of one address, on average; twice as many may come at once.
        frame_mib: largest frame; waiting_mib: pictures and numbers of all requests that wait or are under way.
        silence: seconds after which a client that neither reads, nor answers a ping, nor ends the message it began is let go.
        deadline_ms: for requests that bring none; None waits as long as it takes.
        standby: whether a process that has imported everything, and holds no weights, stands by for when the policy's dies: it is back in a
            second or two, and some hundred MB of memory are taken.
        patience: seconds of one call after which the policy counts as hung, and is started anew.
        drain: seconds that requests in flight may take once the server was told to stop.
        robot: mapping of the robot (a name in configs/robot, or a file) whose limits of actions are kept; the range of the training data
            unless given. limits: false keeps none.
        seed: of the sessions whose clients name none: the first gets it, the next one more.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    harness_port: int | None = Field(default=None, ge=0, le=65535)
    groot_port: int | None = Field(default=None, ge=0, le=65535)
    allow_plain_zmq: bool = False
    keys: Keys = Keys()
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    origins: tuple[str, ...] = ()
    batch: PositiveInt = 8
    window_ms: NonNegativeFloat = 20.0
    queue: PositiveInt = 256
    clients: PositiveInt = 64
    each_address: PositiveInt = 48
    in_flight: PositiveInt = 16
    rate: PositiveFloat = 500.0
    frame_mib: PositiveFloat = 64.0
    waiting_mib: PositiveFloat = 1024.0
    silence: PositiveFloat = 20.0
    deadline_ms: PositiveFloat | None = None
    standby: bool = True
    patience: PositiveFloat = 300.0
    drain: NonNegativeFloat = 10.0
    robot: str | None = None
    limits: bool = True
    seed: int = Field(default=0, ge=0)
    metrics: Metrics = Metrics()
    record: Record = Record()
    rerun: Rerun = Rerun()

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.host not in LOOPBACK and self.token_file is None:
            raise ValueError(
                f"host {self.host} can be reached from other machines, which needs a token: put a secret into a file, "
                "name it in token_file, and give it to your clients; or listen on 127.0.0.1"
            )
        if self.groot_port is not None and self.host not in LOOPBACK and not self.allow_plain_zmq:
            raise ValueError(
                f"groot_port speaks without encryption, and host {self.host} can be reached from other machines, who would read the token: "
                "listen on 127.0.0.1, or say allow_plain_zmq=true where you trust the network"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_cert and tls_key")
        return self

"""The server: a socket for websockets and for what operators ask, a policy behind it, an orderly end."""

import asyncio
import contextlib
import http
import itertools
import json
import logging
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from triune_client.wire import Limits
from websockets.asyncio.server import Server as Socket
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers, MultipleValuesError
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HTTPRequest
from websockets.http11 import Response

from ... import __version__
from ...data.robot import load_robot
from ...errors import UserError
from .config import LOOPBACK, Serve
from .dialects import groot, harness, openpi, triune
from .exchange import Code, Refusal
from .line import Connection, Line
from .operations import Operations
from .process import Source
from .security import Rate, Room, Token, from_a_page, names_this_machine, tls, watch_for_death, worth_logging
from .service import Service
from .websocket import Bounded
from .zmtp import Broken, Peer

logger = logging.getLogger(__name__)

Dialect = Callable[[Line, Service, dict[str, Any]], Awaitable[None]]
DIALECTS: Mapping[str, Dialect] = {"/v1": triune.speak, "/": openpi.speak, "/harness": harness.speak}
"""Path -> the protocol that is spoken there."""
CODES: Mapping[int, Code] = {400: "bad_request", 401: "unauthorized", 403: "unauthorized", 404: "bad_request", 503: "busy"}
"""Status of a refused connection -> the code under which it is counted."""
HARNESS: Mapping[str, Dialect] = {"/": harness.speak}
"""The same of the harness's own port."""
HANDSHAKES = 32
"""Sockets beyond the connections that may be open: of clients that are not let in yet, and of operators."""


class Server:
    """A policy's service on a network.

    ``start`` opens the port when the policy is loaded and warm, ``run`` serves until SIGTERM or SIGINT, ``stop`` drains.

    Args:
        name: of the policy, for clients and logs.
    """

    def __init__(self, config: Serve, service: Service, name: str) -> None:
        self.config, self.service, self.name = config, service, name
        self.token = Token.read(config.token_file)
        self.ssl = tls(config.tls_cert, config.tls_key)
        self.limits = Limits(frame=int(config.frame_mib * 2**20))
        self.rate = Rate(config.rate, 2 * config.rate)
        self.knocks = Rate(20.0, 100.0)
        self.room = Room(config.clients + 2 * HANDSHAKES, config.each_address + HANDSHAKES)
        self.room.memory = service.room
        self.connections: Counter[str] = Counter()
        self.pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/healthz": lambda: (200, "text/plain", b"OK\n"),
            "/readyz": self._readyz,
            "/health": lambda: (200, "application/json", json.dumps({"status": "ok"}).encode()),
            "/config": lambda: (200, "application/json", harness.config(config.batch, config.window_ms)),
        }
        self.operations = Operations(config, service, name)
        self.pages |= self.operations.pages
        self.draining = False
        self._numbers = itertools.count()
        self._sockets: dict[str, Socket | asyncio.Server] = {}
        self._peers: dict[Peer, asyncio.Task[None]] = {}

    def port_of(self, name: str) -> int:
        """The port that was taken for ``port``, ``harness_port`` or ``groot_port``."""
        return int(next(iter(self._sockets[name].sockets)).getsockname()[1])

    @classmethod
    def of(cls, config: Serve, source: Source, name: str) -> "Server":
        """A server and its service, as ``config`` says.

        Raises:
            UserError: there is no such mapping of a robot, or it states no limits.
        """
        limits = None
        if config.robot is not None:
            limits = load_robot(config.robot).action_limits
            if limits is None:
                raise UserError(
                    f"the mapping {config.robot} has no `limits:`; add them (configs/robot/so100.yaml has some), or leave out robot="
                )
        service = Service(
            source,
            window=config.window_ms / 1e3,
            queue=config.queue,
            patience=config.patience,
            memory=int(config.waiting_mib * 2**20),
            limits=limits,
            guarded=config.limits,
            standby=config.standby,
        )
        return cls(config, service, name)

    @property
    def port(self) -> int:
        """The port that was taken for websockets."""
        return self.port_of("port")

    @property
    def url(self) -> str:
        """Where our own clients connect."""
        return f"{'wss' if self.ssl else 'ws'}://{self.config.host}:{self.port}"

    def welcome(self) -> dict[str, Any]:
        """What clients of our own protocol are told."""
        contract, said = self.service.contract, self.service.introduction
        return {
            "protocol": triune.PROTOCOL,
            "out_of_band": True,
            "server": f"triune-vla {__version__}",
            "policy": self.name,
            "contract": contract.model_dump(mode="json"),
            "limits": None if self.service.limits is None else self.service.limits.to_dict(),
            "realtime": said.get("realtime"),
            "executed": contract.executed or contract.chunk or 1,
            "chunk": contract.chunk or 1,
            "rate": contract.rate or 0.0,
        }

    async def start(self) -> None:
        """Load and warm the policy, then open the ports.

        Raises:
            UserError: the policy cannot be loaded, the config's keys are not its own, or a port is taken.
        """
        try:
            await self.service.start()
        except BaseException:
            self.operations.close()
            raise
        if self.config.host not in LOOPBACK and self.ssl is None:
            logger.warning("the token and all pictures cross the network readable by others: give tls_cert and tls_key")
        try:
            self.config.keys.check(self.service.contract)
            await self._listen("port", lambda port: self._websocket(port, DIALECTS))
            await self._listen("harness_port", lambda port: self._websocket(port, HARNESS))
            await self._listen("groot_port", lambda port: asyncio.start_server(self._peer, self.config.host, port, limit=2**20))
        except UserError:
            await self.stop()
            raise

    async def _listen(self, name: str, opened: Callable[[int], Awaitable[Socket | asyncio.Server]]) -> None:
        """Open one of the config's ports, if it has a number."""
        port = getattr(self.config, name)
        if port is None:
            return
        try:
            self._sockets[name] = await opened(port)
        except OSError as error:
            raise UserError(f"cannot listen on {self.config.host}:{port} ({error.strerror}); choose another {name}=") from None
        logger.info("%s is %s:%d", name, self.config.host, self.port_of(name))

    def _websocket(self, port: int, dialects: Mapping[str, Dialect]) -> Awaitable[Socket]:
        silence = self.config.silence
        secure: dict[str, Any] = {} if self.ssl is None else {"ssl_handshake_timeout": silence, "ssl_shutdown_timeout": 3}
        sockets = logging.getLogger(f"{__name__}.sockets")
        sockets.addFilter(worth_logging)
        return serve(
            partial(self._serve, dialects),
            self.config.host,
            port,
            ssl=self.ssl,
            process_request=partial(self._enter, dialects),
            compression=None,
            max_size=self.limits.frame,
            open_timeout=silence,
            close_timeout=3,
            ping_interval=silence,
            ping_timeout=silence,
            server_header=None,
            logger=sockets,
            create_connection=partial(Bounded, room=self.room, silence=silence, limit=self.limits.frame),  # type: ignore[arg-type]
            **secure,
        )

    async def run(self) -> None:
        """Serve until the process is told to end; requests in flight are answered first.

        Raises:
            UserError: the policy's process dies again and again.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        loop.add_signal_handler(signal.SIGUSR1, self.operations.record)
        while not told.is_set() and self.service.failed is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told.wait(), timeout=0.5)
        await self.stop()
        if self.service.failed is not None:
            raise UserError(str(self.service.failed))

    async def stop(self) -> None:
        """Take no more connections and requests, answer those in flight, close. Until then /readyz says 503."""
        self.draining = True
        await self.service.drain(self.config.drain)
        websockets = [socket for socket in self._sockets.values() if isinstance(socket, Socket)]
        for socket in self._sockets.values():
            socket.close(close_connections=False) if isinstance(socket, Socket) else socket.close()
        connections = [connection for socket in websockets for connection in socket.connections]
        await asyncio.gather(*(connection.close(1001, "the server is stopping") for connection in connections))
        await self._part()
        for socket in self._sockets.values():
            await socket.wait_closed()
        await self.service.stop()
        await asyncio.to_thread(self.operations.close)

    async def _part(self) -> None:
        """Close the connections of GR00T's clients; those that do not fetch their last answer lose it."""
        tasks = set(self._peers.values())
        for peer in self._peers:
            peer.close()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
            for peer in self._peers:
                peer.abort()
            await asyncio.wait(tasks)

    def _readyz(self) -> tuple[int, str, bytes]:
        ready = self.service.ready and not self.draining
        return (200, "text/plain", b"ready\n") if ready else (503, "text/plain", b"not ready\n")

    async def _enter(self, dialects: Mapping[str, Dialect], connection: ServerConnection, request: HTTPRequest) -> Response | None:
        """Answer what operators ask, and let those in who may speak."""
        assert isinstance(connection, Bounded)
        path = request.path.split("?")[0]
        if path in ("/healthz", "/readyz", "/health"):
            return _page(*self.pages[path]())
        if not self.knocks.allows(connection.address):
            self.service.refused(Refusal("busy", "too many connections"), connection.address)
            return _page(429, "text/plain", b"too many connections; wait some seconds\n")
        refused = self._refused(dialects, connection.address, path, request.headers)
        if refused is not None:
            self.service.refused(Refusal(CODES[refused[0]], refused[1]), connection.address)
            return _page(refused[0], "text/plain", f"{refused[1]}\n".encode())
        return _page(*self.pages[path]()) if path in self.pages else None

    def _refused(self, dialects: Mapping[str, Dialect], address: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Why somebody may not enter, as an HTTP status and a sentence."""
        try:
            origin, host, authorization = (headers.get(name) for name in ("Origin", "Host", "Authorization"))
        except MultipleValuesError:
            return 400, "a header came twice"
        if from_a_page(origin, self.config.origins):
            return 403, "web pages may not connect; the server's operator can name some in origins"
        if not self.token.required and not names_this_machine(host, LOOPBACK):
            return 403, "without a token this server answers as localhost only"
        if not self.token.admits_header(authorization):
            return 401, "this server needs its token: Authorization: Bearer <token>"
        if path in self.pages:
            return None
        if path not in dialects:
            return 404, f"nothing is spoken here; known: {', '.join(dialects)}"
        full = self._full(address)
        return None if full is None else (503, full)

    def _full(self, address: str) -> str | None:
        """Why no further client of an address is let in."""
        if self.draining or self.connections.total() >= self.config.clients:
            return "the server takes no more connections now"
        if self.connections[address] >= self.config.each_address:
            return "the server takes no more connections of this address; its operator can raise each_address"
        return None

    async def _serve(self, dialects: Mapping[str, Dialect], connection: ServerConnection) -> None:
        assert isinstance(connection, Bounded) and connection.request is not None
        path = connection.request.path.split("?")[0]
        await self._talk(connection, dialects[path], connection.address, path)

    async def _peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A client of GR00T."""
        task, peer = asyncio.current_task(), Peer(reader, writer, self.limits.frame, self.config.silence)
        assert task is not None
        address = str((writer.get_extra_info("peername") or ["unknown"])[0])
        self._peers[peer] = task
        entered = self.room.enter(address)
        try:
            if entered and self.knocks.allows(address) and self._full(address) is None:
                watch_for_death(writer.get_extra_info("socket"), self.config.silence)
                await peer.greet()
                await self._talk(peer, groot.speak, address, "GR00T")
        except Broken as error:
            logger.info("a client from %s was sent away: %s", address, error)
        finally:
            peer.abort()
            del self._peers[peer]
            if entered:
                self.room.leave(address)

    async def _talk(self, connection: Connection, dialect: Dialect, address: str, where: str) -> None:
        """Serve one connection until it closes."""
        number, config = next(self._numbers), self.config
        deadline = None if config.deadline_ms is None else config.deadline_ms / 1e3
        seed = config.seed + number
        given = (self.limits, self.rate, self.token, config.keys, config.in_flight, deadline, self.service.timed)
        line = Line(connection, f"c{number}", address, seed, *given)
        self.connections[address] += 1
        logger.info("%s connected from %s to %s", line.name, address, where)
        try:
            await dialect(line, self.service, self.welcome())
        except (ConnectionClosed, ConnectionError):
            pass  # the client left in the middle of an answer
        finally:
            self.connections[address] -= 1
            self.connections += Counter()  # forgets addresses without connections
            logger.info("%s left", line.name)


def _page(status: int, kind: str, body: bytes) -> Response:
    headers = Headers({"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", "Cache-Control": "no-store"})
    return Response(status, http.HTTPStatus(status).phrase, headers, body)

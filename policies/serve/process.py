"""The policy's process as the server sees it: started, asked turn by turn, started again when it dies."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from ...errors import UserError
from .channel import HEADER, Arena, Coder

logger = logging.getLogger(__name__)

PIECE = 1 << 16
"""Bytes that are read at once."""


class ProcessDied(Exception):
    """The policy's process ended while it was asked."""


@dataclass(frozen=True)
class Source:
    """What makes the policy in its process.

    Attributes:
        policy: ``module:function``.
        arguments: of that function; JSON.
        batch: sessions that may be answered at once; for as many the policy is warmed.
        memory: bytes of shared memory in each direction.
    """

    policy: str
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    memory: int = 256 << 20


class Process:
    """A running policy. ``ask`` takes one turn at a time; ``stop`` ends it."""

    def __init__(self, child: subprocess.Popen[bytes], coder: Coder, pipe: "_Pipe", spare: bool) -> None:
        self.child, self.coder, self.pipe, self.spare = child, coder, pipe, spare
        self.introduction: dict[str, Any] = {}
        self.modules: list[str] = []

    @classmethod
    async def start(cls, source: Source) -> "Process":
        """A process whose policy is loaded and warm.

        Raises:
            UserError: the policy says why it cannot be loaded.
            ProcessDied: it ended without a word.
        """
        process = await cls._spawn(source, spare=False)
        await process.load()
        return process

    @classmethod
    async def prepare(cls, source: Source, modules: list[str]) -> "Process":
        """A process that has imported ``modules``, which is most of what starting takes, and holds no policy until ``load``.

        Raises:
            ProcessDied: it ended.
        """
        process = await cls._spawn(source, spare=True)
        try:
            await process.tell({"modules": modules})
        except BaseException:
            await process.stop(patience=0)
            raise
        return process

    async def load(self) -> None:
        """Load and warm the policy; ``introduction`` is what it says of itself, ``modules`` what it imported. Raises as ``start``."""
        try:
            first = await self.tell({"load": True} if self.spare else {})
        except BaseException:
            await self.stop(patience=0)
            raise
        if "refused" in first:
            await self.stop()
            raise UserError(first["refused"])
        self.introduction, self.modules = first["ready"], first["modules"]

    @classmethod
    async def _spawn(cls, source: Source, spare: bool) -> "Process":
        ours, theirs = socket.socketpair()
        with theirs:
            _, pipe = await asyncio.get_running_loop().create_connection(_Pipe, sock=ours)  # nothing is waited for once it runs
            requests, answers = Arena.new(source.memory), Arena.new(source.memory)
            fds = {"socket": theirs.fileno(), "requests": requests.fd, "answers": answers.fd}
            settings = fds | {"size": source.memory, "policy": source.policy, "arguments": source.arguments, "batch": source.batch}
            settings["spare"] = spare
            command = [sys.executable, "-m", "triune.policies.serve.worker", json.dumps(settings)]
            child = subprocess.Popen(command, pass_fds=tuple(fds.values()), stdin=subprocess.DEVNULL)
        for fd in (requests.fd, answers.fd):
            os.close(fd)  # the mappings stay
        return cls(child, Coder(requests, answers), pipe, spare)

    def ask(self, turn: dict[str, Any], answered: Callable[["dict[str, Any] | ProcessDied"], None]) -> None:
        """Send one turn (``worker.turn``). ``answered`` gets its answer, or why there is none, as soon as it is read: each step of a task
        would wait for the event loop."""
        self.pipe.expect(lambda body: answered(self._read(body)))
        if turn:
            self.pipe.transport.write(self.coder.encode(turn))

    async def tell(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The answer to one turn; to an empty one, what the process says first.

        Raises:
            ProcessDied: instead of an answer.
        """
        future: asyncio.Future[dict[str, Any] | ProcessDied] = asyncio.get_running_loop().create_future()
        self.ask(turn, lambda answer: None if future.done() else future.set_result(answer))
        answer = await future
        if isinstance(answer, ProcessDied):
            raise answer
        return answer

    async def stop(self, patience: float = 5.0) -> None:
        """Let the process end, and end it if it does not within ``patience`` seconds."""
        self.pipe.expect(lambda body: None)  # what was asked is not waited for
        self.pipe.transport.close()
        until = time.monotonic() + patience
        while self.child.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        self.coder.mine.close()
        self.coder.theirs.close()

    def kill(self) -> None:
        """End a process that does not answer any more."""
        self.child.kill()

    def _read(self, body: bytes | None) -> dict[str, Any] | ProcessDied:
        if body is None:
            return ProcessDied(self._end())
        try:
            message: dict[str, Any] = self.coder.decode(body)
        except Exception as defect:  # what was sent and what was read may not belong together any more
            logger.exception("an answer of the policy's process cannot be read")
            return ProcessDied(type(defect).__name__)
        return message

    def _end(self) -> str:
        try:
            code = self.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its connection broke"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class Standby:
    """Starts processes of a source, and keeps one more that has imported everything, so that the next start takes as long as loading
    weights: of the 8 s that a small policy needs on one core, 7 are imports.

    Args:
        wanted: whether one is kept. It holds what the imports take, some hundred MB, and no weights.
    """

    def __init__(self, source: Source, wanted: bool) -> None:
        self.source, self.wanted = source, wanted
        self._next: asyncio.Task[Process] | None = None

    async def start(self) -> Process:
        """A process whose policy is loaded and warm; raises as ``Process.start``."""
        prepared, self._next = self._next, None
        if prepared is not None:
            try:
                process = await prepared
                await process.load()
                return process
            except ProcessDied as death:
                logger.warning("the process that stood by ended (%s); another is started", death)
        return await Process.start(self.source)

    def prepare(self, modules: list[str]) -> None:
        """Let one more get ready beside the one that was started."""
        if self.wanted:
            self._next = asyncio.create_task(Process.prepare(self.source, modules))

    async def stop(self) -> None:
        """End the one that stands by."""
        prepared, self._next = self._next, None
        if prepared is None:
            return
        if prepared.cancel():
            with contextlib.suppress(asyncio.CancelledError):
                await prepared
        elif prepared.exception() is None:
            await prepared.result().stop(patience=0)


class _Pipe(asyncio.BufferedProtocol):
    """The server's end of the socket to the policy's process."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._room = memoryview(bytearray(PIECE))
        self._received = bytearray()
        self._reads: Callable[[bytes | None], None] | None = None
        self._gone = False

    def expect(self, reads: Callable[[bytes | None], None]) -> None:
        """``reads`` gets the body of the next message, None where the other side has gone."""
        self._reads = reads
        if self._gone:
            asyncio.get_running_loop().call_soon(self._settle)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # other event loops have classes of their own

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where what comes next is to be written."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """So much was written there."""
        data, reads = self._room[:nbytes], self._reads
        if reads is not None and not self._received and nbytes > HEADER.size and HEADER.unpack_from(data)[0] == nbytes - HEADER.size:
            self._reads = None
            reads(bytes(data[HEADER.size :]))  # all of it and nothing else, as nearly always
            return
        self._received += data
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._settle()

    def _settle(self) -> None:
        if self._reads is None:
            return
        data, reads = self._received, self._reads
        end = HEADER.size + HEADER.unpack_from(data)[0] if len(data) >= HEADER.size else sys.maxsize
        if len(data) >= end:
            body = bytes(data[HEADER.size : end])
            del data[:end]
        elif self._gone:
            body = None
        else:
            return
        self._reads = None
        reads(body)

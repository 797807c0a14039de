"""The policy's process as the server sees it: started, asked turn by turn, started again when it dies."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from .channel import HEADER, Arena, Coder


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

    def __init__(self, child: subprocess.Popen[bytes], coder: Coder, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.child, self.coder = child, coder
        self.reader, self.writer = streams
        self.introduction: dict[str, Any] = {}

    @classmethod
    async def start(cls, source: Source) -> "Process":
        """Start the process and wait until its policy is loaded and warm.

        Raises:
            UserError: the policy says why it cannot be loaded.
            ProcessDied: it ended without a word.
        """
        requests, answers = Arena.new(source.memory), Arena.new(source.memory)
        ours, theirs = socket.socketpair()
        fds = {"socket": theirs.fileno(), "requests": requests.fd, "answers": answers.fd}
        settings = fds | {"size": source.memory, "policy": source.policy, "arguments": source.arguments, "batch": source.batch}
        command = [sys.executable, "-m", "triune.policies.serve.worker", json.dumps(settings)]
        child = subprocess.Popen(command, pass_fds=tuple(fds.values()), stdin=subprocess.DEVNULL)
        theirs.close()
        for fd in (requests.fd, answers.fd):
            os.close(fd)  # the mappings stay
        process = cls(child, Coder(requests, answers), await asyncio.open_connection(sock=ours))
        try:
            first = await process._receive()
        except BaseException:
            await process.stop()
            raise
        if "refused" in first:
            await process.stop()
            raise UserError(first["refused"])
        process.introduction = first["ready"]
        return process

    async def ask(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The answer to one turn (``worker.turn``), with the milliseconds that it took under ``ms``.

        Raises:
            ProcessDied: instead of an answer.
        """
        began = time.perf_counter()
        try:
            self.writer.write(self.coder.encode(turn))
            await self.writer.drain()
            answer = await self._receive()
        except ConnectionError:
            raise ProcessDied(self._end()) from None
        answer["ms"] = 1e3 * (time.perf_counter() - began)
        return answer

    async def stop(self, patience: float = 5.0) -> None:
        """Let the process end, and end it if it does not within ``patience`` seconds."""
        self.writer.close()
        until = time.monotonic() + patience
        while self.child.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        self.coder.mine.close()
        self.coder.theirs.close()

    def kill(self) -> None:
        """End a process that does not answer any more."""
        self.child.kill()

    async def _receive(self) -> dict[str, Any]:
        try:
            size = HEADER.unpack(await self.reader.readexactly(HEADER.size))[0]
            message: dict[str, Any] = self.coder.decode(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ProcessDied(self._end()) from None
        return message

    def _end(self) -> str:
        try:
            code = self.child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its connection broke"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

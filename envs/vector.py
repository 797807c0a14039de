"""Worlds in parallel: slots spread over processes, asked for and answered asynchronously.

A process keeps its worlds and reuses them. A world that raises and a process that dies become the ``error`` of the
slots concerned, never a hang; the next ``reset`` of such a slot starts anew.
"""

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import numpy as np

from ..data import Observation
from ..errors import UserError
from .base import Expert, Info, World
from .registry import build_world, make_expert
from .view import DEFAULT, View

logger = logging.getLogger(__name__)

IDLE_WORLDS = 3
"""Worlds without an episode that a process keeps for a later slot; one takes 50 to 300 MB."""
PATIENCE = 10.0
"""Seconds that ``close`` waits for a process to end by itself."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "LP_NUM_THREADS"), "1")

Frames = list[dict[str, np.ndarray]]
_Command = tuple[str, int, tuple[Any, ...]]
"""Method of ``_Worker``, slot, arguments."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of one command to a slot.

    Attributes:
        slot: as given.
        observation: what the policy sees now; empty where there is an error.
        info: ``is_success``; after a chunk also ``steps`` and ``truncated``.
        frames: images after each step, where video was asked.
        error: what went wrong, or ``None``.
    """

    slot: int
    observation: Observation
    info: Info = field(default_factory=dict)
    frames: Frames = field(default_factory=list)
    error: str | None = None


class WorldPool:
    """Worlds in ``workers`` spawned processes; slot ``s`` lives in process ``s % workers``.

    Commands return at once and are answered by ``wait``, those of one slot in order. Use it as a context manager.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UserError(f"a pool of worlds needs at least one worker, got {workers}")
        self._workers = [_Process() for _ in range(workers)]
        self._failed: list[Answer] = []

    def reset(self, slot: int, world: str, seed: int, view: View = DEFAULT) -> None:
        """Begin an episode of ``world`` in ``slot``; what the slot held before is given up."""
        self._workers[slot % len(self._workers)].start()
        self._send(slot, "reset", world, seed, view)

    def step_chunk(self, slot: int, actions: np.ndarray, video: bool = False) -> None:
        """Execute ``actions`` (n, A) in the slot's world; see ``World.step_chunk``."""
        self._send(slot, "step_chunk", np.asarray(actions, np.float32), video)

    def expert_chunk(self, slot: int, n: int, video: bool = False) -> None:
        """Let the scripted expert of the slot's world act for at most ``n`` steps."""
        self._send(slot, "expert_chunk", n, video)

    def wait(self) -> list[Answer]:
        """Block until at least one command is answered.

        Raises:
            RuntimeError: nothing is under way.
        """
        if self._failed:
            answers, self._failed = self._failed, []
            return answers
        busy = {worker.pipe: worker for worker in self._workers if worker.pending and worker.pipe is not None}
        if not busy:
            raise RuntimeError("no command is under way in this pool")
        ready = wait_for(list(busy))
        return [answer for pipe, worker in busy.items() if pipe in ready for answer in worker.receive()]

    def close(self) -> None:
        """End all processes; each frees its simulators and renderers first."""
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> "WorldPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _send(self, slot: int, method: str, *arguments: Any) -> None:
        worker = self._workers[slot % len(self._workers)]
        worker.pending.append(slot)
        if not worker.send((method, slot, arguments)):
            self._failed += worker.give_up()


class _Process:
    """The caller's side of one worker process."""

    def __init__(self) -> None:
        self.pending: deque[int] = deque()
        self.pipe: Connection[Any, Any] | None = None
        self._process: BaseProcess | None = None
        self.start()

    def start(self) -> None:
        """Start the process unless it runs."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _environment(ONE_THREAD):
            self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def send(self, command: _Command | None) -> bool:
        """Whether the process was there to take it."""
        if self.pipe is None:
            return False
        try:
            self.pipe.send(command)
        except OSError:
            return False
        return True

    def receive(self) -> list[Answer]:
        """Its next answer; errors for all that is pending if it has died."""
        assert self.pipe is not None
        try:
            answer: Answer = self.pipe.recv()
        except (EOFError, OSError):
            return self.give_up()
        self.pending.popleft()
        return [answer]

    def give_up(self) -> list[Answer]:
        """Clear a dead process away; an error for every slot that waits for it."""
        code = None
        if self._process is not None:
            self._process.join(PATIENCE)
            code = self._process.exitcode
        self.end()
        text = (
            f"the process of this slot's world ended (exit code {code})" if code is not None else "this slot has no episode; reset it first"
        )
        failed = [_failure(slot, text) for slot in self.pending]
        self.pending.clear()
        return failed

    def ask_to_end(self) -> None:
        self.send(None)

    def end(self) -> None:
        """Wait for the process to end, and end it where it does not."""
        if self._process is None or self.pipe is None:
            return
        self.pipe.close()  # a process that is blocked on sending wakes up
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._process = self.pipe = None


@dataclass
class _Episode:
    view: View
    world: World
    expert: Expert
    steps: int = 0


class _Worker:
    """The worlds of one process. Each method is a command: it returns (observation, info, frames)."""

    def __init__(self) -> None:
        self._episodes: dict[int, _Episode] = {}
        self._idle: list[_Episode] = []

    def reset(self, slot: int, name: str, seed: int, view: View) -> tuple[Observation, Info, Frames]:
        if slot in self._episodes:
            self._idle.append(self._episodes.pop(slot))
        kept = next((episode for episode in reversed(self._idle) if episode.view == view and episode.world.become(name)), None)
        if kept is not None:
            self._idle.remove(kept)
        while len(self._idle) > IDLE_WORLDS:
            self._idle.pop(0).world.close()
        world = kept.world if kept else build_world(name, view)
        episode = _Episode(view, world, make_expert(name))
        self._episodes[slot] = episode
        obs, info = episode.world.reset(seed=seed)
        return episode.world.observation(obs), info, []

    def step_chunk(self, slot: int, actions: np.ndarray, video: bool) -> tuple[Observation, Info, Frames]:
        episode = self._begun(slot)
        return self._seen(episode, *episode.world.step_chunk(actions, video))

    def expert_chunk(self, slot: int, n: int, video: bool) -> tuple[Observation, Info, Frames]:
        episode = self._begun(slot)
        return self._seen(episode, *episode.world.expert_chunk(episode.expert, n, video))

    def drop(self, slot: int) -> None:
        """Give up a slot's world: after an error nobody knows its state."""
        if slot in self._episodes:
            self._episodes.pop(slot).world.close()

    def close(self) -> None:
        for episode in (*self._episodes.values(), *self._idle):
            episode.world.close()

    def _begun(self, slot: int) -> _Episode:
        if slot not in self._episodes:
            raise UserError("this slot has no episode; reset it first")
        return self._episodes[slot]

    def _seen(self, episode: _Episode, obs: dict[str, Any], info: Info, frames: Frames) -> tuple[Observation, Info, Frames]:
        episode.steps += info["steps"]
        return episode.world.observation(obs, episode.steps / episode.world.rate), info, frames


def _serve(pipe: "Connection[Any, Any]") -> None:
    """In a worker process: answer commands until told to end or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle, who closes the pool
    worker = _Worker()
    try:
        while (command := pipe.recv()) is not None:
            pipe.send(_answer(worker, *command))
    except (EOFError, OSError):
        pass  # the caller is gone, and so is whom to tell
    finally:
        worker.close()


def _answer(worker: _Worker, method: str, slot: int, arguments: tuple[Any, ...]) -> Answer:
    try:
        return Answer(slot, *getattr(worker, method)(slot, *arguments))
    except UserError as error:
        worker.drop(slot)
        return _failure(slot, str(error))
    except Exception as error:  # a defect of one world must not end the others: it is told and logged
        logger.exception("slot %d: %s failed", slot, method)
        worker.drop(slot)
        return _failure(slot, f"{type(error).__name__}: {error}")


def _failure(slot: int, error: str) -> Answer:
    return Answer(slot, Observation({}, np.zeros(0, np.float32), ""), error=error)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes started within; one that is set already stays."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]

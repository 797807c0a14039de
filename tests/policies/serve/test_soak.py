"""A server under load for as long as ``TRIUNE_SOAK_S`` says (an hour by default): what it holds at the end is what it held at the start.

Clients come and go, reset, ask and end sessions; one sends mutants and leaves in the middle; now and then the policy's process is killed.
"""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from triune_client import Client, ServerError
from triune_client.wire import pack, unpack
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from .conftest import seen
from .fakes import expected
from .mutants import Mutator
from .standing import Standing, files, rss

HOUR = float(os.environ.get("TRIUNE_SOAK_S", "3600"))
CLIENTS = 3


class Load:
    """Threads that drive a server until ``stop``; what they met is counted in ``plans``, ``wrong`` and ``deaths``."""

    def __init__(self, server: Standing) -> None:
        self.server, self.stop = server, threading.Event()
        self.plans, self.wrong = 0, []
        self.deaths: dict[int, list[float]] = {number: [] for number in range(CLIENTS)}
        self.waits: list[float] = []
        work: list[Callable[[], None]] = [lambda number=number: self._honest(number) for number in range(CLIENTS)]
        self.threads = [threading.Thread(target=self._kept, args=(job,)) for job in [*work, self._rogue]]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _kept(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a thread's failure belongs to the test
            self.wrong.append(repr(error))
            self.stop.set()

    def _honest(self, number: int) -> None:
        observation, episode = seen(number, size=8), 0
        while not self.stop.is_set():
            with Client(self.server.url) as client:
                for _ in range(20):
                    episode += 1
                    self._episode(client, number, episode, observation)
                    if self.stop.is_set():
                        return

    def _episode(self, client: Client, number: int, episode: int, observation: dict) -> None:
        session, seed = f"episode-{episode}", 1000 * number + episode % 1000
        client.reset(session, seed)
        step = 0
        while step < 20 and not self.stop.is_set():
            began = time.monotonic()
            try:
                plan = client.infer(observation, session)
            except ServerError as error:
                if error.code != "worker" or "hold, and ask again" not in str(error):
                    raise
                self.deaths[number].append(began)
                step = 0  # the session began anew
                continue
            self.waits.append(time.monotonic() - began)
            right = [expected(seed, s, observation["state"], observation["images"]) for s in (step, 0)]
            # a policy that died while nobody asked it has begun its sessions anew without an error
            assert any(np.array_equal(plan.actions, actions) for actions in right), (session, step)
            step = step + 1 if np.array_equal(plan.actions, right[0]) else 1
            self.plans += 1
            time.sleep(0.005)
        client.end(session)

    def _rogue(self) -> None:
        hello, reset = ({"type": "hello", "id": 1, "protocol": 1}, {"type": "reset", "id": 2, "session": "r"})
        infer = {"type": "infer", "id": 3, "session": "r", "observation": seen(size=8)}
        mutator = Mutator([pack(message) for message in (hello, reset, infer)], seed=4)
        while not self.stop.is_set():
            with suppress(ConnectionClosed), connect(self.server.url + "/v1", compression=None, max_size=None) as socket:
                for message in (hello, reset):
                    socket.send(pack(message))
                    unpack(socket.recv(timeout=30))
                for _ in range(30):
                    socket.send(next(mutator))
                    socket.recv(timeout=30)
                    time.sleep(0.005)
                socket.send(pack(infer | {"observation": seen(size=8, instruction="sleep 0.02")}))


def growth(samples: list[float]) -> float:
    """From the second quarter to the last, in the unit of the samples: the first is for warming up."""
    quarter = max(1, len(samples) // 4)
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


def fewest_files(pid: int) -> int:
    """Open files of a process within half a second: asking it for its state opens one for a moment."""
    counts = []
    for _ in range(10):
        counts.append(files(pid))
        time.sleep(0.05)
    return min(counts)


@pytest.mark.parametrize("seconds", [8.0, pytest.param(HOUR, marks=[pytest.mark.slow])])
def test_what_is_held_stays_flat(seconds: float, tmp_path: Path) -> None:
    with Standing(tmp_path / "log", made={"size": 8}, rate=1e6, service={"restarts": 5}) as server:
        start = server.settled(connections=0)
        start_files = fewest_files(server.process.pid)
        load = Load(server)
        memory: list[float] = []
        objects: list[float] = []
        policy: dict[int, list[float]] = {}
        kills: list[float] = []
        period = max(min(seconds / 4, 60.0), 3.0)
        began, killed = time.monotonic(), time.monotonic()
        while time.monotonic() - began < seconds and not load.stop.is_set():
            time.sleep(min(1.0, seconds / 40))
            memory.append(rss(server.process.pid))
            if len(memory) % 5 == 0:
                objects.append(server.state()["objects"])
            with suppress(IndexError, FileNotFoundError, StopIteration):  # between two processes
                policy.setdefault(server.worker, []).append(rss(server.worker))
            if time.monotonic() - killed > period and time.monotonic() - began < seconds - period / 2:
                killed = time.monotonic()
                os.kill(server.worker, signal.SIGKILL)
                kills.append(killed)
        load.end()
        assert not load.wrong
        end = server.settled(connections=0, sessions=0, waiting=0, held=0, sockets=0)
        longest = max((samples for samples in policy.values()), key=len)
        errors = [len(deaths) for deaths in load.deaths.values()]
        print(
            f"{seconds:.0f} s: {load.plans} plans, {len(kills)} kills, errors {errors}, longest wait "
            f"{max(load.waits):.1f} s; memory {statistics.median(memory):.0f} MiB, growth {growth(memory):.2f}, of the policy "
            f"{growth(longest):.2f}; objects {growth(objects):+.0f}; "
            f"files {start_files} to {(end_files := fewest_files(server.process.pid))}, tasks {start['tasks']} to {end['tasks']}"
        )
        assert load.plans > 5 * seconds and kills
        assert all(len(deaths) <= len(kills) for deaths in load.deaths.values()), "one error for one death"
        assert max(load.waits) < 10
        assert growth(memory) < 12 and growth(longest) < 12 and growth(objects) < 1000
        assert end_files <= start_files and end["tasks"] <= start["tasks"]
        with connect(server.url + "/v1", compression=None) as socket:
            for message in ({"type": "hello", "protocol": 1}, {"type": "reset", "session": "count"}):
                socket.send(pack({"id": 1} | message))
                socket.recv(timeout=10)
            socket.send(pack({"type": "infer", "id": 2, "session": "count", "observation": seen(size=8)}))
            assert unpack(socket.recv(timeout=10))["timing"]["sessions"] == 1, "the policy remembers sessions that ended"

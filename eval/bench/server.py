"""What the action server costs beside the policy, and whether a robot behind it ever waits.

The policy is ``Idle``: what is measured is all that is not a policy. Servers, peers and the limit run in processes of their own, and are
asked in turns, so that what slows the machine for a while slows all of them.
"""

import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .idle import ACTION, CHUNK, STATE
from .run import Row, row

ROUNDS, EACH = 12, 50
RATE = 50
THINKS = 0.05
"""Seconds of a call of the policy that eight clients share."""
Timed = Callable[[int], list[float]]
"""Works so many times; the seconds of each."""


def run(peer: Path | None = None, minutes: float = 10.0, thinking: float = 60.0) -> list[Row]:
    """
    Args:
        peer: a Python file that serves openpi's protocol on the port of its first argument; plain ``websockets`` with its defaults is
            measured anyway.
        minutes: of the control loop at 50 Hz; thinking: seconds of one long inference.
    """
    return [*overhead(peer), *far(), *alive(thinking), *together(), *realtime(minutes)]


def overhead(peer: Path | None) -> list[Row]:
    """Round trips of two pictures of 224 x 224 and a state for a chunk of 50 x 32 actions, whose policy takes no time.

    Beside: the limit, which is as many bytes there and back over TCP with nothing else done to them, over asyncio's streams as a server
    with an event loop has them, and over blocking sockets, which is the least that anything costs; and other servers. As fast as the
    answers come; as a robot asks, since between two questions processors fall asleep and forget, so that all of it takes longer; and
    with pictures of 480 x 640, as cameras give them.
    """
    with contextlib.ExitStack() as stack:
        works, names = _asked(stack, peer, (224, 224))
        spent, seldom = in_rounds(works), in_rounds([paced(work) for work in works], rounds=4)
    with contextlib.ExitStack() as stack:
        works, _ = _asked(stack, peer, (480, 640))
        large = in_rounds(works, rounds=6, each=20)
    p50, least, *theirs, limit = (1e3 * statistics.median(times) for times in spent)
    slow, _, *slowly, slowest = (1e3 * statistics.median(times) for times in seldom)
    long, _, *longer, longest = (1e3 * statistics.median(times) for times in large)
    p99 = 1e3 * float(np.quantile(spent[0], 0.99))
    return [
        row("overhead p50", p50, 1.5, "limit", "ms", 1.0),
        row("overhead p99", p99, 1e3 * float(np.quantile(spent[-1], 0.99)), "raw TCP echo p99", "ms"),
        row("overhead p50 beside raw TCP", p50, limit, "raw TCP echo of the same bytes over asyncio's streams", "ms", 0.25),
        row("overhead p50 beside blocking sockets", p50, least, "the same echo over blocking sockets", "ms"),
        *(row("overhead p50 beside a peer", p50, each, name, "ms") for each, name in zip(theirs, names, strict=True)),
        row(f"overhead p50 at {RATE} Hz beside raw TCP", slow, slowest, "the echo over asyncio's streams, as seldom", "ms"),
        *(row(f"overhead p50 at {RATE} Hz beside a peer", slow, each, name, "ms") for each, name in zip(slowly, names, strict=True)),
        row("overhead p50 of 480 x 640 beside raw TCP", long, longest, "the echo of as many bytes over asyncio's streams", "ms"),
        *(row("overhead p50 of 480 x 640 beside a peer", long, each, name, "ms") for each, name in zip(longer, names, strict=True)),
    ]


def _asked(stack: contextlib.ExitStack, peer: Path | None, size: tuple[int, int]) -> tuple[list[Timed], list[str]]:
    """Questions with two pictures of ``size``: to our server, over blocking sockets, to others, over asyncio's streams; names of the
    others."""
    from triune_client import Client
    from triune_client.wire import pack

    seen = observation(2, size)
    message = {"type": "infer", "id": 1, "session": "robot", "observation": seen, "prefix": None, "delay": 0, "foresight": False}
    question = pack(message)
    answer = pack({"type": "plan", "id": 1, "actions": np.zeros((CHUNK, ACTION), np.float32), "rate": 50.0, "time": 0.0, "timing": {}})
    sizes = len(question), len(answer)
    arguments = json.dumps({"size": size})
    ours = stack.enter_context(Client(f"ws://127.0.0.1:{stack.enter_context(process('ours', arguments))}"))
    ours.reset()
    raw = stack.enter_context(socket.create_connection(("127.0.0.1", stack.enter_context(process("echo", *sizes)))))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    streams = _streams(stack, stack.enter_context(process("streams", *sizes)), question, len(answer))
    others = [_other(stack, one, message) for one in ([None] if peer is None else [None, peer])]
    asked = [lambda: ours.infer(seen), lambda: _raw(raw, question, len(answer)), *(ask for ask, _ in others)]
    return [*map(timed, asked), streams], [name for _, name in others]


def far() -> list[Row]:
    """Three cameras of 640 x 480 over 100 Mbit/s with 10 ms each way: pixels, and JPEG of quality 90."""
    from triune_client import Client
    from triune_client.wire import pack

    seen = observation(3, (480, 640))
    least = 1e3 * (8 * len(pack(seen)) / 100e6 + 0.02)
    arguments = '{"cameras": 3, "size": [480, 640]}'
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(process("shaped", stack.enter_context(process("ours", arguments)), 100, 0.01))
        pixels, jpeg = (stack.enter_context(Client(f"ws://127.0.0.1:{link}", jpeg=quality)) for quality in (None, 90))
        for client in (pixels, jpeg):
            client.reset()
        spent = in_rounds([timed(lambda: pixels.infer(seen)), timed(lambda: jpeg.infer(seen))], rounds=10, each=5)
    plain, small = ([1e3 * float(np.quantile(times, q)) for q in (0.5, 0.99)] for times in spent)
    return [
        row("100 Mbit/s, 10 ms: pixels p50", plain[0], least, "the link alone", "ms", 0.8),
        row("100 Mbit/s, 10 ms: JPEG p50", small[0], plain[0], "pixels p50", "ms"),
        row("100 Mbit/s, 10 ms: JPEG p99", small[1], plain[1], "pixels p99", "ms"),
    ]


def alive(seconds: float) -> list[Row]:
    """``/healthz`` while the policy computes on all cores, and two clients that wait for it."""
    from triune_client import Client

    seen = observation(2, (224, 224))
    with process("ours", "{}") as port:
        url = f"ws://127.0.0.1:{port}"
        with Client(url, timeout=2 * seconds + 30) as first, Client(url, timeout=2 * seconds + 30) as second:
            first.reset("first")
            second.reset("second")
            asked = [first.ask(seen | {"instruction": f"work {seconds}"}, "first"), second.ask(seen, "second")]
            times, until = [], time.perf_counter() + seconds - 0.5
            while time.perf_counter() < until:
                began = time.perf_counter()
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as page:
                    assert page.status == 200
                times.append(time.perf_counter() - began)
                time.sleep(0.02)
            answered = sum(len(one.wait().actions) == CHUNK for one in asked)
    return [
        row(f"/healthz p99 during {seconds:g} s of inference", 1e3 * float(np.quantile(times, 0.99)), 10.0, "limit", "ms", 1.0),
        row("clients answered after it", answered, 2, "clients", "clients/s", 1.0) | {"unit": "clients"},
    ]


def together(clients: int = 8, seconds: float = 8.0) -> list[Row]:
    """Eight clients, each asking again as soon as it is answered, of a policy whose calls cost the same for one as for eight.

    The clients are threads of this process, so what they and the server compute between two calls counts against the server.
    """
    from triune_client import Client

    seen, counts = observation(2, (224, 224)), [0] * clients
    with process("ours", f'{{"seconds": [{THINKS}, {THINKS}]}}') as port, contextlib.ExitStack() as stack:
        links, batches = [stack.enter_context(Client(f"ws://127.0.0.1:{port}")) for _ in range(clients)], [0.0]
        for link in links:
            link.reset()
        until = time.perf_counter() + seconds

        def drive(i: int) -> None:
            while time.perf_counter() < until:
                batches.append(links[i].infer(seen).timing["batch"])
                counts[i] += 1

        threads = [threading.Thread(target=drive, args=(i,)) for i in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = sum(counts) / (time.perf_counter() - began)
    return [
        row(f"{clients} clients together", rate, clients / THINKS, f"the policy at batch {clients}", "chunks/s", 0.7),
        row(f"{clients} clients together: mean batch", statistics.mean(batches[1:]), clients, "clients", "chunks/s") | {"unit": "requests"},
    ]


def realtime(minutes: float, rate: float = 50.0) -> list[Row]:
    """A control loop on the wall clock while inference takes 20 to 400 ms."""
    from triune_client import Client
    from triune_client.realtime import Realtime, paced

    with process("ours", '{"seconds": [0.02, 0.4]}') as port, Client(f"ws://127.0.0.1:{port}") as link:
        link.reset()
        robot, seen = Realtime(link.infer, rate, mode="rtc"), observation(2, (224, 224))
        ticks = late = 0
        for now in paced(rate):
            action = robot.tick(seen, now)
            late += time.monotonic() - now > 1 / rate
            if action is None and robot.why == "first":
                continue
            ticks += 1
            if ticks > 60 * minutes * rate:
                break
    counted = robot.statistics
    reaction = statistics.median(counted.reactions)
    steps = statistics.median(counted.delays)
    return [
        _none(f"stalled ticks in {minutes:g} min at {rate:g} Hz", counted.stalls) | {"gate": "0", "passed": not counted.stalls},
        _none("ticks that took longer than a period", late),
        row("reaction p50", 1e3 * reaction, 1e3 * (steps + 1) / rate, "inference and a tick", "ms", 1 / 1.3),
    ]


def _none(name: str, ticks: int) -> Row:
    """A row of ticks, of which there should be none."""
    unit = {"ratio": float(not ticks), "interval": None, "unit": "ticks"}
    return {"name": name, "ours": ticks, "peer": 0, "peer_name": "limit"} | unit | {"gate": None, "passed": True}


def observation(cameras: int, size: tuple[int, int]) -> dict[str, Any]:
    """Pictures with as much detail as a camera's: smooth shapes and a little noise."""
    rng, (height, width) = np.random.default_rng(0), size
    rows, columns = np.mgrid[:height, :width] / 40.0
    images = {}
    for i in range(cameras):
        shades = [128 + 90 * np.sin(rows * (1 + 0.3 * c) + i) * np.cos(columns + c) for c in range(3)]
        images[f"camera_{i}"] = (np.stack(shades, axis=-1) + rng.normal(0, 3, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return {"images": images, "state": np.zeros(STATE, np.float32), "instruction": "", "timestamp": 0.0}


@contextlib.contextmanager
def process(kind: str, *arguments: object) -> Iterator[int]:
    """One of ``peers`` as a process; gives its port."""
    command = [sys.executable, "-m", f"{__package__}.peers", kind, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            said = child.stdout.readline()
            if not said:
                raise UserError(f"{kind} did not start; its error stands above")
            yield int(said)
        finally:
            child.terminate()


def timed(work: Callable[[], object]) -> Timed:
    """The seconds of each call of ``work``."""

    def calls(times: int) -> list[float]:
        spent = []
        for _ in range(times):
            began = time.perf_counter()
            work()
            spent.append(time.perf_counter() - began)
        return spent

    return calls


def paced(work: Timed) -> Timed:
    """The same, ``RATE`` times a second."""

    def calls(times: int) -> list[float]:
        spent = []
        for _ in range(times):
            time.sleep(1 / RATE)
            spent += work(1)
        return spent

    return calls


def in_rounds(works: list[Timed], rounds: int = ROUNDS, each: int = EACH) -> list[list[float]]:
    """Seconds of each of ``works``, asked in turns of ``each`` calls; a first round is not counted.

    The order is another in each round: what ran before makes an echo take up to half as long again.
    """
    times: list[list[float]] = [[] for _ in works]
    rng = random.Random(0)
    for i in range(rounds + 1):
        for k in rng.sample(range(len(works)), len(works)):
            seconds = works[k](each)
            if i:
                times[k] += seconds
    return times


def _streams(stack: contextlib.ExitStack, port: int, question: bytes, expected: int) -> Timed:
    """An echo, asked over asyncio's streams."""
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    reader, writer = loop.run_until_complete(asyncio.open_connection("127.0.0.1", port))

    async def leave() -> None:
        writer.close()
        await writer.wait_closed()

    stack.callback(lambda: loop.run_until_complete(leave()))

    async def calls(times: int) -> list[float]:
        spent = []
        for _ in range(times):
            began = time.perf_counter()
            writer.write(question)
            await writer.drain()
            await reader.readexactly(expected)
            spent.append(time.perf_counter() - began)
        return spent

    return lambda times: loop.run_until_complete(calls(times))


def _raw(connection: socket.socket, question: bytes, expected: int) -> None:
    connection.sendall(question)
    while expected:
        expected -= len(connection.recv(min(expected, 65536)))


def _other(stack: contextlib.ExitStack, peer: Path | None, message: dict[str, Any]) -> tuple[Callable[[], object], str]:
    """One round trip to the peer, packed and unpacked here as our client does, and its name."""
    from triune_client.wire import pack, unpack
    from websockets.sync.client import connect

    if peer is None:
        link = stack.enter_context(connect(f"ws://127.0.0.1:{stack.enter_context(process('defaults'))}", max_size=None))
        name = "websockets with its defaults"
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        child = stack.enter_context(subprocess.Popen([sys.executable, str(peer), str(port)]))
        stack.callback(child.terminate)
        link, name = stack.enter_context(_patient(port, child)), peer.name
        link.recv()  # its metadata
        seen = message["observation"]
        images = {f"observation/{name}": image for name, image in seen["images"].items()}
        message = images | {"observation/state": seen["state"], "prompt": seen["instruction"]}

    def ask() -> None:
        link.send(pack(message))
        answer = link.recv()
        assert isinstance(answer, bytes), answer  # an error comes as text
        unpack(answer)

    return ask, name


def _patient(port: int, child: subprocess.Popen[bytes]) -> Any:
    """A connection to a server that may need up to two minutes to start."""
    from websockets.sync.client import connect

    until = time.monotonic() + 120
    while True:
        try:
            return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
        except OSError:
            if child.poll() is not None or time.monotonic() > until:
                raise UserError(f"nothing answers on port {port}; the peer must serve openpi's protocol on the port it is given") from None
            time.sleep(0.2)

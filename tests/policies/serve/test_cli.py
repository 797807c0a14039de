"""``vla serve`` and ``vla replay`` as processes of their own, with a trained policy."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("websockets")

from triune_client.wire import pack, unpack
from websockets.asyncio.client import connect

from triune.data import open_dataset
from triune.data.incidents import read_incident


@contextmanager
def serving(checkpoint: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``vla serve`` on a free port, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "triune", "serve", "--policy", str(checkpoint), "--port", str(port), *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    try:
        until = time.monotonic() + 90
        while page(port, "/readyz") != 200:
            assert child.poll() is None and time.monotonic() < until, "it did not become ready"
            time.sleep(0.1)
        yield child, port
    finally:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


def page(port: int, path: str) -> int | None:
    """The status of a page, None where nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def policy_process(server: int) -> int:
    """The process id of the policy of a server."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and f"\nPPid:\t{server}\n" in (folder / "status").read_text():
            return int(folder.name)
    raise AssertionError("the server has no child")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc to find the policy's process")
def test_sigterm_while_a_request_is_under_way_and_what_was_recorded(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(dataset)
    images = {camera: opened.frames(camera, [0])[0] for camera in opened.cameras}
    observation = {"images": images, "state": opened.vectors["observation.state"][0], "instruction": opened.tasks[0], "timestamp": 0.0}

    async def drive(child: subprocess.Popen[bytes], port: int) -> None:
        async def ask(**message: Any) -> dict[str, Any]:
            await line.send(pack({"id": 1} | message))
            answer: dict[str, Any] = unpack(await line.recv())
            return answer

        async with connect(f"ws://127.0.0.1:{port}/v1", compression=None, max_size=None) as line:
            await ask(type="hello", protocol=1, client="test")
            await ask(type="reset", session="a", seed=3)
            for _ in range(2):
                plan = await ask(type="infer", session="a", observation=observation)
                assert {"prefix", "steps", "model"} <= plan["timing"].keys()
            child.send_signal(signal.SIGUSR1)
            worker = policy_process(child.pid)
            os.kill(worker, signal.SIGSTOP)
            thinking = asyncio.create_task(ask(type="infer", session="a", observation=observation))
            await asyncio.sleep(0.3)
            child.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert await asyncio.to_thread(page, port, "/readyz") == 503 and await asyncio.to_thread(page, port, "/healthz") == 200
            assert not thinking.done()
            os.kill(worker, signal.SIGCONT)
            answer = await thinking
            assert answer["type"] == "plan" and np.isfinite(answer["actions"]).all()

    folder = tmp_path / "rec"
    with serving(checkpoint, "--log-json", "--record", str(folder), "record.after=0") as (child, port):
        asyncio.run(drive(child, port))
        assert child.wait(20) == 0
        assert child.stderr is not None
        lines = [json.loads(text) for text in child.stderr.read().decode().splitlines()]
    assert {"started", "drain", "recorded"} <= {line["event"] for line in lines}
    assert all({"time", "level", "event", "message"} <= line.keys() for line in lines)

    (incident,) = [f for f in folder.iterdir() if not f.name.startswith(".")]
    assert [row.step for row in read_incident(incident)[1]] == [0, 1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "triune", "replay", str(incident), "--json"], capture_output=True, env=environment, check=True
    )
    found = json.loads(done.stdout)
    assert (found["passed"], found["compared"], found["same_bits"], found["largest_error"]) == (True, 2, 2, 0.0)

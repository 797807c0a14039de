"""The connection, beside a small server of the same protocol: answers find who asked, every wait ends, errors say what to do."""

import ast
import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import triune_client
from triune_client import Client, EncodedImage, ServerError, WireError, decode_image, pack
from websockets.frames import Opcode
from websockets.server import ServerProtocol

import triune

from .fake import CONTRACT, Fake

HERE, ROOT = Path(__file__).parent, Path(triune.__file__).parent
PACKAGE = ROOT / "policies" / "client" / "triune_client"
OLD = ROOT / ".venv-oldest" / "bin" / "python"


def observation(value: float = 1.0, size: tuple[int, int] = (8, 8)) -> dict:
    return {
        "images": {"agentview": np.full((*size, 3), 3, np.uint8)},
        "state": np.full(3, value, np.float32),
        "instruction": "lift",
        "timestamp": 1.5,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with Fake() as fake:
        yield fake


@pytest.fixture
def client(server: Fake) -> Iterator[Client]:
    with Client(server.url, timeout=5) as client:
        yield client


def test_welcome_and_plan(client: Client) -> None:
    welcome = client.welcome
    assert (welcome.server, welcome.policy, welcome.executed, welcome.chunk, welcome.rate) == ("fake 1", "ramp", 2, 4, 20.0)
    assert welcome.contract == CONTRACT and welcome.prefix == 2 and welcome.guided and welcome.limits is None
    client.reset("one", seed=5)
    first, second = client.infer(observation(), "one"), client.infer(observation(), "one", foresight=True)
    assert first.actions.dtype == np.float32 and np.array_equal(first.actions, np.arange(11, 19, dtype=np.float32).reshape(4, 2))
    assert second.actions[0, 0] == 12 and first.foresight is None and second.foresight is not None
    assert (first.rate, first.time, first.timing, first.events, first.value) == (20.0, 1.5, {"queue": 0.1}, {"clamp": 1}, 0.5)
    assert 0 < first.round_trip < 5


def test_what_is_sent(server: Fake, client: Client) -> None:
    client.infer(observation(), "words", prefix=np.ones((2, 2), np.float32), delay=2, deadline=0.5)
    sent = server.seen[-1]
    assert set(sent) == {"type", "id", "session", "observation", "prefix", "delay", "samples", "deadline", "foresight"}
    assert np.array_equal(sent["prefix"], np.ones((2, 2))) and (sent["delay"], sent["deadline"], sent["samples"]) == (2, 0.5, 1)
    client.end("words")
    assert server.seen[-1]["type"] == "end" and server.seen[-1]["session"] == "words"


def test_answers_find_who_asked(client: Client) -> None:
    """Thirty threads, half of them asking a slow session: the fast ones overtake, and nobody gets another's actions."""

    def one(index: int) -> tuple[float, float]:
        begun = time.perf_counter()
        session = "slow" if index % 2 else f"fast {index}"
        if not index % 2:
            client.reset(session, seed=index)
        plan = client.infer({**observation(index), "timestamp": float(index)}, session)
        assert plan.time == index
        assert index % 2 or plan.actions[0, 0] == index + 3 * index + 3
        return time.perf_counter() - begun, plan.round_trip

    with ThreadPoolExecutor(30) as threads:
        took = list(threads.map(one, range(30)))
    assert min(wall for wall, _ in took[1::2]) >= 0.3 > min(wall for wall, _ in took[::2])
    assert all(trip <= wall for wall, trip in took)


def test_asking_does_not_wait(client: Client) -> None:
    begun = time.perf_counter()
    asked = [client.ask(observation(), "slow") for _ in range(5)]
    assert time.perf_counter() - begun < 0.3
    assert all(one.wait().actions.shape == (4, 2) for one in asked) and time.perf_counter() - begun < 1.5


def test_an_answer_has_come_when_it_came_not_when_it_is_fetched(client: Client) -> None:
    asked = client.ask(observation(), "fine")
    time.sleep(0.5)
    assert asked.answered and asked.wait().round_trip < 0.3


def test_waiting_takes_no_processor_time(server: Fake) -> None:
    with Client(server.url, timeout=0.5) as client:
        for ask in (
            lambda: time.sleep(0.5),
            lambda: client.ask(observation(), "never").wait(),
            lambda: client.infer(observation(), "never"),
        ):
            began = time.process_time()
            with contextlib.suppress(TimeoutError):
                ask()
            assert time.process_time() - began < 0.1


def test_the_end_is_noticed_while_nobody_asks() -> None:
    with Fake() as server:
        client = Client(server.url, timeout=5)
        client.infer(observation(), "fine")
    with client:
        until = time.monotonic() + 5
        while client.connected and time.monotonic() < until:
            time.sleep(0.01)
        assert not client.connected


def test_a_refusal_is_an_error_of_its_request_only(client: Client) -> None:
    with pytest.raises(ServerError, match="no camera wrist") as refused:
        client.infer(observation(), "bad")
    assert (refused.value.code, refused.value.message) == ("bad_request", "no camera wrist")
    assert client.connected and client.infer(observation(), "fine").actions.shape == (4, 2)


def test_no_answer_is_a_timeout_and_a_late_one_is_dropped(server: Fake) -> None:
    with Client(server.url, timeout=0.1) as client:
        for session in ("never", "slow"):
            with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
                client.infer(observation(), session)
        time.sleep(0.4)  # the late answer comes now
        assert client.connected and client.infer(observation(), "fine").actions.shape == (4, 2)


@pytest.mark.parametrize(
    ("session", "error", "sentence"),
    [
        ("gone", ConnectionError, "1011 the worker died"),
        ("draining", ServerError, "the server stops: connect again"),
        ("junk", ConnectionError, "sent what cannot be read"),
    ],
)
def test_a_lost_connection_fails_what_waits_and_reset_makes_it_again(server: Fake, session: str, error: type, sentence: str) -> None:
    with Client(server.url, timeout=5) as client:
        waiting = client.ask(observation(), "never")
        with pytest.raises(error, match=sentence):
            client.infer(observation(), session)
        with pytest.raises(error, match=sentence):
            waiting.wait()
        assert not client.connected
        with pytest.raises(error, match=sentence):
            client.infer(observation(), "fine")
        client.reset("again", seed=1)
        assert client.connected and client.infer(observation(), "again").actions[0, 0] == 7


def test_what_is_no_plan_is_said(client: Client) -> None:
    with pytest.raises(ConnectionError, match="plan cannot be read"):
        client.infer(observation(), "flat")


def test_another_policy_after_a_reconnection_is_refused() -> None:
    with Fake() as first:
        client = Client(first.url, timeout=5)
    with Fake(contract={**CONTRACT, "rate": 10.0}, port=first.port), pytest.raises(ConnectionError, match="another policy than before"):
        client.reset()
    client.close()


def test_closing_fails_what_waits(server: Fake) -> None:
    client = Client(server.url, timeout=5)
    asked = client.ask(observation(), "never")
    client.close()
    with pytest.raises(ConnectionError, match="was closed here"):
        asked.wait()
    with pytest.raises(ConnectionError, match="was closed here"):
        client.reset()


def test_a_contract_that_does_not_fit_is_refused(server: Fake) -> None:
    with pytest.raises(ServerError, match="actions differ: retrain the policy") as refused:
        Client(server.url, contract={**CONTRACT, "action": {"names": ["grip"]}})
    assert refused.value.code == "contract"


def test_tokens() -> None:
    with Fake(token="s3cret") as server:
        for wrong in (None, "S3cret"):
            with pytest.raises(ServerError, match="asks for its token") as refused:
                Client(server.url, token=wrong)
            assert refused.value.code == "unauthorized"
        with Client(server.url, token="s3cret") as client:
            assert client.connected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "http://127.0.0.1:1"}, "write ws://host:port"),
        ({"url": "127.0.0.1:1"}, "write ws://host:port"),
        ({"url": "ws://robot.lab:1", "token": "t"}, "in the clear: use wss://"),
        ({"url": "ws://192.0.2.1:1", "token": "t"}, "in the clear: use wss://"),
        ({"url": "ws://127.0.0.1:1", "token": "a\nb"}, "printable"),
        ({"url": "ws://127.0.0.1:1", "ca": "x.pem"}, "needs TLS"),
        ({"url": "wss://127.0.0.1:1", "ca": "absent.pem"}, "absent.pem is no file of certificates: No such file"),
        ({"url": "wss://127.0.0.1:1", "ca": __file__}, "is no file of certificates"),
        ({"url": "ws://127.0.0.1:1", "jpeg": 0}, "quality from 1 to 95"),
        ({"url": "ws://127.0.0.1:1", "resize": (0, 5)}, "height, width"),
    ],
)
def test_arguments_that_do_not_fit(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Client(**options)


def test_tls() -> None:
    pem = str(HERE / "tls.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with Fake(token="t", ssl=context) as server:
        with Client(server.url, token="t", ca=pem) as client:
            assert client.infer(observation(), "tls").actions.shape == (4, 2)
        with pytest.raises(ConnectionError, match="not trusted.*ca=FILE"):
            Client(server.url, token="t")
    with Fake() as plain, pytest.raises(ConnectionError, match="does not speak TLS"):
        Client(plain.url.replace("ws:", "wss:"), ca=pem)


def test_nobody_there_and_somebody_else_there(server: Fake) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"ws://127.0.0.1:{listening.getsockname()[1]}"
        begun = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
            Client(url, connect_timeout=0.3)
        assert time.perf_counter() - begun < 3
    with pytest.raises(ConnectionError, match="no connection to ws"):
        Client(url)
    with pytest.raises(ConnectionError, match="HTTP 404"):
        Client(server.url + "/elsewhere")
    with Fake(welcome={"protocol": 2}) as newer, pytest.raises(ConnectionError, match="speaks protocol 2"):
        Client(newer.url)
    with Fake(welcome={"chunk": None}) as broken, pytest.raises(ConnectionError, match="welcome .* cannot be read"):
        Client(broken.url)
    with Fake(welcome={"type": "metadata"}) as other, pytest.raises(ConnectionError, match="does not speak Triune's protocol"):
        Client(other.url)


def stuck(listening: socket.socket, over: threading.Event) -> None:
    """Welcomes one client, then reads nothing more."""
    channel, _ = listening.accept()
    with channel:
        protocol, welcomed = ServerProtocol(), False
        while not welcomed:
            protocol.receive_data(channel.recv(4096))
            for event in protocol.events_received():
                if not hasattr(event, "opcode"):
                    protocol.send_response(protocol.accept(event))
                elif event.opcode is Opcode.BINARY:
                    words = {"server": "stuck", "policy": "none", "contract": CONTRACT, "executed": 1, "chunk": 1, "rate": 1.0}
                    protocol.send_binary(pack({"type": "welcome", "id": 0, "protocol": 1, **words}))
                    welcomed = True
            for data in protocol.data_to_send():
                channel.sendall(data)
        over.wait(30)


def test_a_server_that_does_not_read_blocks_nobody_for_ever() -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        thread = threading.Thread(target=stuck, args=(listening, over))
        thread.start()
        client = Client(f"ws://127.0.0.1:{listening.getsockname()[1]}", timeout=0.5)
        begun = time.perf_counter()
        with pytest.raises((ConnectionError, TimeoutError)):
            client.infer(observation(size=(2000, 2000)))
        assert time.perf_counter() - begun < 5
        client.close()
        over.set()
        thread.join()


def test_jpeg_and_resize(server: Fake) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    seen = {**observation(), "images": {"agentview": ramp, "wrist": ramp[:8, :8]}}
    with Client(server.url, jpeg=90, resize=(24, 24)) as client:
        client.infer(seen, "jpeg")
    sent = server.seen[-1]["observation"]["images"]
    assert all(isinstance(image, EncodedImage) and image.format == "jpeg" for image in sent.values())
    assert decode_image(sent["agentview"]).shape == (18, 24, 3) and decode_image(sent["wrist"]).shape == (8, 8, 3)
    expected = np.linspace(0, 255, 24)
    assert np.abs(decode_image(sent["agentview"])[5, 1:-1, 0].astype(float) - expected[1:-1]).max() < 8
    with Client(server.url, resize=(24, 24)) as client:
        client.infer(seen, "resize")
        with pytest.raises(WireError, match="uint8"):
            client.infer({**seen, "images": {"a": np.zeros((4, 4, 3))}})
    assert server.seen[-1]["observation"]["images"]["agentview"].shape == (18, 24, 3)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_the_package_is_python_3_8(path: Path) -> None:
    """Its grammar, its built-in types in expressions that run, and no module younger than 3.8."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        young = {"tomllib", "zoneinfo", "graphlib"} & {name.split(".")[0] for name in names}
        assert not young and not any(name.startswith("importlib.resources") for name in names)
    text = path.read_text()
    newer = (
        "removeprefix",
        "removesuffix",
        "math.lcm",
        "to_thread",
        "strict=True",
        "kw_only",
        "slots=True",
        "itertools.pairwise",
        "bit_count",
        "randbytes",
    )
    assert [name for name in newer if name in text] == []
    assert "from __future__ import annotations" in text or path.name == "__init__.py"


def test_on_an_old_interpreter() -> None:
    """`make venv` builds .venv-oldest where Python 3.8, 3.9 or 3.10 is installed."""
    if not OLD.exists():
        found = [name for name in ("python3.8", "python3.9", "python3.10") if shutil.which(name)]
        pytest.skip(f"no .venv-oldest: {'make venv builds it' if found else 'no Python 3.8 to 3.10 is installed'}")
    done = subprocess.run([OLD, "oldest.py"], cwd=HERE, capture_output=True, text=True, timeout=60, env={})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fine 3.") and int(done.stdout.split(".")[1]) <= 10


@pytest.mark.parametrize("python", [Path(sys.executable), ROOT / ".venv-peers" / "bin" / "python"], ids=["this", "newest websockets"])
def test_on_other_versions_of_what_it_needs(python: Path) -> None:
    assert python.exists(), "make venv builds .venv-peers"
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([python, "-W", "error", "oldest.py"], cwd=HERE, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr


def test_nothing_but_three_dependencies_is_imported() -> None:
    """A robot has no Pillow, and neither torch nor triune."""
    path = [str(Path(triune_client.__file__).parent.parent), *sys.path]
    code = "import sys, triune_client; print(sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    outside = {name for name in ast.literal_eval(done.stdout) if not name.startswith("_")}
    assert outside <= {"msgpack", "numpy", "triune_client", "websockets", "cython_runtime"}  # the last: what msgpack is compiled by

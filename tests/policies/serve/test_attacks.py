"""What others on a network may do to the server, done over sockets; after each an honest client is answered."""

import contextlib
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triune_client import Client, ServerError
from triune_client.wire import EncodedImage, pack, unpack
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .conftest import seen
from .fakes import expected
from .standing import PEM, Standing, files, rss

SILENCE = 1.2
TOKEN = "correct-horse-battery-staple"
UPGRADE = (
    b"GET /v1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """Everybody on this machine may speak."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with Standing(log, silence=SILENCE, clients=24, each_address=16, frame_mib=4, rate=1e6, origins=["https://lab.example"]) as server:
        yield server
    assert not re.search(r"Traceback|[^\x20-\x7e\n]", log.read_text()), log.read_text()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """TLS and a token."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "token").chmod(0o600)
    files = {"token_file": str(folder / "token"), "tls_cert": str(PEM), "tls_key": str(PEM)}
    with Standing(folder / "log", silence=6.0, **files) as server:
        yield server
    log = (folder / "log").read_text()
    assert "Traceback" not in log and TOKEN not in log, log


@pytest.fixture(autouse=True)
def calm(plain: Standing) -> Iterator[None]:
    """After each test the server holds nothing of it, and answers."""
    yield
    plain.settled(sockets=0, connections=0, sessions=0, waiting=0, held=0)
    with Client(plain.url) as client:
        client.reset()
        assert client.infer(seen()).actions.shape == (50, 32)


def greeted(server: Standing, **settings: Any) -> ClientConnection:
    socket = connect(server.url + "/v1", compression=None, max_size=None, **settings)
    ask(socket, type="hello", protocol=1)
    return socket


def ask(socket: ClientConnection, **message: Any) -> dict[str, Any]:
    socket.send(pack({"id": 1} | message))
    return unpack(socket.recv(timeout=20))


def upgraded(server: Standing, address: str = "127.0.0.1", buffer: int | None = None, path: bytes = b"/v1") -> socket.socket:
    """A socket on which websocket frames may be sent, by hand."""
    bare = server.socket(address, buffer)
    bare.sendall(UPGRADE.replace(b"/v1", path) + b"\r\n")
    assert b" 101 " in until(bare, b"\r\n\r\n")
    return bare


def until(bare: socket.socket, end: bytes | None = None) -> bytes:
    """What comes up to ``end``, or until the server closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while (end is None or not got.endswith(end)) and (more := bare.recv(1 if end else 65536)):
            got += more
    return got


def frame(kind: int, data: bytes = b"", *, last: bool = True, flags: int = 0, mask: bool = True, size: int | None = None) -> bytes:
    """One websocket frame; its mask is of zeros, which changes nothing. ``size`` is announced instead of the true one."""
    size = len(data) if size is None else size
    first = bytes([(0x80 if last else 0) | flags | kind])
    bit = 0x80 if mask else 0
    if size < 126:
        length = bytes([bit | size])
    elif size < 65536:
        length = bytes([bit | 126]) + struct.pack(">H", size)
    else:
        length = bytes([bit | 127]) + struct.pack(">Q", size)
    return first + length + (bytes(4) if mask else b"") + data


def frames(got: bytes) -> list[tuple[int, bytes]]:
    """Kind and data of the frames that a server sent."""
    found = []
    while len(got) >= 2:
        size, start = got[1], 2
        if size > 125:
            start = {126: 4, 127: 10}[size]
            size = int.from_bytes(got[2:start], "big")
        found.append((got[0] & 15, got[start : start + size]))
        got = got[start + size :]
    return found


def closing(got: bytes) -> int:
    """The code of the close frame that a server sent last."""
    kind, data = frames(got)[-1]
    assert kind == CLOSE, got[-200:]
    return int(struct.unpack_from(">H", data)[0])


# Before the handshake


@pytest.mark.parametrize(
    "said",
    [
        os.urandom(512),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),  # TLS on the plain port
        b"POST /v1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        b"DELETE /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        b"GET /healthz HTTP/0.9\r\n\r\n",
        b"GET \x1b[2J\x07/\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET /v1 HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(300)) + b"\r\n",
        b"\r\n\r\n\r\n",
        b"*1\r\n$8\r\nSHUTDOWN\r\n",
    ],
)
def test_what_is_no_handshake_is_cut(plain: Standing, said: bytes) -> None:
    with plain.socket() as bare:
        bare.sendall(said)
        with contextlib.suppress(OSError):
            bare.shutdown(socket.SHUT_WR)
        assert b" 101 " not in until(bare)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1", b"Origin: https://evil.example\r\n", 403),
        ("/v1", b"Origin: null\r\n", 403),
        ("/v1", b"Origin: http://localhost\r\n", 403),
        ("/v1", b"Origin: https://lab.example\r\n", 101),
        ("/v1", b"Origin: https://lab.example\r\nOrigin: https://evil.example\r\n", 400),
        ("/v1?token=x", b"", 101),
        ("/../v1", b"", 404),
        ("//v1", b"", 404),
        ("/v1/..%2f..%2fetc/passwd", b"", 404),
        ("http://localhost/v1", b"", 404),
        ("/kill", b"", 404),
        ("/load", b"", 404),
        ("/v1\x1b[2J", b"", 404),
        ("/v1?\x1b[2J", b"", 101),
        ("/v1", b"Authorization: Bearer \xff\xfe\r\n", 101),
        ("/healthz", b"Origin: https://evil.example\r\n", 200),
        ("/state", b"Origin: https://evil.example\r\n", 403),
    ],
)
def test_pages_of_browsers_and_odd_paths_are_refused(plain: Standing, path: str, headers: bytes, status: int) -> None:
    with plain.socket() as bare:
        bare.sendall(UPGRADE.replace(b"/v1", path.encode()) + headers + b"\r\n")
        assert until(bare, b"\r\n").startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("path", ["/v1", "/state"])
def test_a_page_under_another_name_of_this_machine_is_refused(plain: Standing, path: str) -> None:
    """DNS rebinding: evil.example has become 127.0.0.1, so the browser takes our answers for those of the page's own server."""
    for host, status in ((b"evil.example:8000", 403), (b"[::1", 403), (b"127.0.0.1:8000", 101), (b"[::1]:8000", 101)):
        with plain.socket() as bare:
            bare.sendall(UPGRADE.replace(b"/v1", path.encode()).replace(b"Host: localhost", b"Host: " + host) + b"\r\n")
            wanted = 200 if status == 101 and path == "/state" else status
            assert until(bare, b"\r\n").startswith(b"HTTP/1.1 %d " % wanted)


def test_a_handshake_that_drips_is_cut(plain: Standing) -> None:
    with plain.socket() as bare:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 10 * SILENCE:
                bare.sendall(b"G")
                time.sleep(0.05)
        assert until(bare) == b"" and time.monotonic() - began < 3 * SILENCE


def test_two_hundred_connections_leave_room_for_another_address(plain: Standing) -> None:
    with contextlib.ExitStack() as stack:
        began = files(plain.process.pid)
        for _ in range(200):
            with contextlib.suppress(OSError):  # some are cut at once
                stack.enter_context(plain.socket()).sendall(UPGRADE[:40])
        until_then = time.monotonic() + SILENCE / 2  # before those that wait for a handshake are cut for that
        while files(plain.process.pid) > began + 16 + 32:
            assert time.monotonic() < until_then
        honest = stack.enter_context(upgraded(plain, "127.0.0.2"))
        honest.sendall(frame(BINARY, pack({"type": "hello", "id": 1, "protocol": 1})))
        assert b"welcome" in honest.recv(65536)


def test_an_address_has_as_many_connections_as_it_may(plain: Standing) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(greeted(plain))
        with pytest.raises(InvalidStatus) as caught:
            greeted(plain)
        assert caught.value.response.status_code == 503 and b"each_address" in caught.value.response.body
        for _ in range(8):
            stack.enter_context(upgraded(plain, "127.0.0.2"))
        with plain.socket("127.0.0.3") as bare:
            bare.sendall(UPGRADE + b"\r\n")
            assert b" 503 " in until(bare, b"\r\n")


# Token and TLS


def test_without_the_token_nobody_speaks(closed: Standing) -> None:
    context = ssl.create_default_context(cafile=str(PEM))
    given = [{}, {"Authorization": "Bearer wrong-token-of-some-length"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}]
    given += [{"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Bearer {TOKEN}x"}, {"Cookie": f"token={TOKEN}"}]
    for headers in given:
        with pytest.raises(InvalidStatus) as caught:
            connect(f"{closed.url}/v1?token={TOKEN}", ssl=context, additional_headers=headers)
        assert caught.value.response.status_code == 401
    for kind in ("Bearer", "bearer", "Api-Key"):
        with connect(closed.url + "/v1", ssl=context, additional_headers={"Authorization": f"{kind} {TOKEN}"}) as socket:
            assert ask(socket, type="hello", protocol=1)["type"] == "welcome"
    for extra, status in ((b"Authorization: Bearer \xff\xfe\r\n", 401), (b"Authorization: Bearer " + TOKEN.encode() + b"\r\n", 101)):
        with context.wrap_socket(closed.socket(), server_hostname="localhost") as bare:
            bare.sendall(UPGRADE + extra + b"\r\n")
            assert until(bare, b"\r\n").startswith(b"HTTP/1.1 %d" % status)
    with context.wrap_socket(closed.socket(), server_hostname="localhost") as bare:
        bare.sendall(UPGRADE.replace(b"/v1", b"/state") + b"\r\n")
        assert b" 401 " in until(bare, b"\r\n")


def test_our_client_speaks_with_token_and_certificate_and_not_without(closed: Standing) -> None:
    with Client(closed.url, TOKEN, ca=str(PEM)) as client:
        client.reset()
        assert client.infer(seen()).actions.shape == (50, 32)
    with pytest.raises(ServerError, match="token"):
        Client(closed.url, "wrong-token-of-some-length", ca=str(PEM))
    with pytest.raises(ConnectionError):
        Client(closed.url, TOKEN)  # nobody vouches for the certificate


def test_a_plain_client_gets_nothing_from_the_port_of_tls(closed: Standing) -> None:
    with closed.socket() as bare:
        bare.sendall(UPGRADE + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert b"HTTP" not in until(bare)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_is_not_talked_down(closed: Standing) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with closed.socket() as bare, pytest.raises(ssl.SSLError):
        context.wrap_socket(bare)
    context = ssl.create_default_context(cafile=str(PEM))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with context.wrap_socket(closed.socket(), server_hostname="localhost") as bare:
        assert bare.version() == "TLSv1.2"


def test_a_tls_handshake_that_stops_is_cut(closed: Standing) -> None:
    with closed.socket() as bare:
        bare.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert until(bare) == b""


def test_the_policys_process_has_neither_token_nor_sockets_and_the_servers_has_no_torch(closed: Standing) -> None:
    for pid in (closed.process.pid, closed.worker):
        for name in ("environ", "cmdline"):
            assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    links = [os.readlink(link) for link in Path(f"/proc/{closed.worker}/fd").iterdir()]
    assert sum(link.startswith("socket:") for link in links) == 1 and not any("token" in link for link in links), links
    assert "libtorch" not in Path(f"/proc/{closed.process.pid}/maps").read_text()


# After the handshake


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(BINARY, bytes(100), mask=False), 1002),
        (frame(BINARY, bytes(100), flags=0x40), 1002),  # compressed, which was not agreed upon
        (frame(BINARY, size=5 << 20), 1009),
        (frame(BINARY, size=(1 << 63) - 1), 1009),
        (frame(BINARY, bytes(4 << 20), last=False) + frame(0, b"x"), 1009),
        (frame(0, b"x"), 1002),
        (frame(3), 1002),
        (frame(PING, bytes(126)), 1002),
        (frame(TEXT, b"\xff"), 1007),
        (frame(CLOSE, b"\x03\xe8") + frame(BINARY, pack({"type": "hello", "id": 1, "protocol": 1})), 1000),
        (frame(BINARY, last=False) + frame(0, last=False) * 5000, 1008),
    ],
)
def test_frames_that_break_the_rules_close_the_connection(plain: Standing, sent: bytes, code: int) -> None:
    with upgraded(plain) as bare:
        with contextlib.suppress(OSError):
            bare.sendall(sent)
        got = until(bare)
        assert closing(got) == code and b"welcome" not in got


@pytest.mark.parametrize(
    "sent", [b"", b"\xc1", pack({}), pack([1, 2]), pack({"type": "hello"}), pack({"type": 1, "id": 1}), b"\xdc\xff\xff"]
)
def test_what_is_no_greeting_gets_a_sentence(plain: Standing, sent: bytes) -> None:
    with connect(plain.url + "/v1") as socket:
        socket.send(sent)
        assert unpack(socket.recv(timeout=10))["code"] == "bad_request"
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)


def test_a_frame_that_drips_is_cut(plain: Standing) -> None:
    with upgraded(plain) as bare:
        bare.sendall(frame(BINARY, size=1 << 20))
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 10 * SILENCE:
                bare.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 6 * SILENCE


def test_a_message_in_parts_that_drips_is_cut_though_its_client_answers_pings(plain: Standing) -> None:
    with upgraded(plain) as bare:
        bare.settimeout(0.05)
        bare.sendall(frame(BINARY, b"x", last=False))
        began, got = time.monotonic(), b""
        while time.monotonic() - began < 10 * SILENCE and CLOSE not in dict(frames(got)):
            bare.sendall(frame(0, b"x", last=False))
            with contextlib.suppress(TimeoutError):
                got = bare.recv(4096)
                for _, data in [f for f in frames(got) if f[0] == PING]:
                    bare.sendall(frame(PONG, data))
        assert closing(got) == 1008 and time.monotonic() - began < 3 * SILENCE


def test_a_message_in_parts_that_waits_for_the_one_before_is_not_cut(plain: Standing) -> None:
    """The server reads no further while messages wait for openpi's protocol to answer; that is not the client's fault."""
    observation = {f"observation/{name}": image for name, image in seen(size=8)["images"].items()} | {"observation/state": seen()["state"]}
    slow, quick = (pack(observation | {"prompt": word}) for word in (f"sleep {1.4 * SILENCE}", "lift"))
    parts = [quick[i : i + 100] for i in range(0, len(quick), 100)]
    with upgraded(plain, path=b"/") as bare:

        def heard(answers: int) -> None:
            got = b""
            while (kinds := [kind for kind, _ in frames(got) if kind in (TEXT, BINARY, CLOSE)]) != [BINARY] * answers:
                assert len(kinds) < answers and CLOSE not in kinds, got[-200:]
                got += bare.recv(65536)

        heard(1)  # its metadata
        begun = frame(BINARY, parts[0], last=False) + b"".join(frame(0, part, last=False) for part in parts[1:])
        bare.sendall(frame(BINARY, slow) + frame(BINARY, quick) * 3 + begun)
        heard(4)
        bare.sendall(frame(0, b""))
        heard(1)


def test_a_client_that_is_gone_without_a_word_is_let_go(plain: Standing) -> None:
    with upgraded(plain) as bare:
        for message in ({"type": "hello", "protocol": 1}, {"type": "reset", "session": "a"}):
            bare.sendall(frame(BINARY, pack({"id": 1} | message)))
        plain.settled(sessions=1)
        plain.settled(sessions=0, connections=0)


@pytest.mark.parametrize("sent", [frame(PING, bytes(125)), frame(BINARY, pack({"type": "hello", "id": 1, "protocol": 1}))])
def test_a_client_that_never_reads_is_cut_and_costs_little(plain: Standing, sent: bytes) -> None:
    before = most = rss(plain.process.pid)
    with upgraded(plain, buffer=4096) as bare:
        bare.settimeout(0.1)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 20:
                with contextlib.suppress(TimeoutError):
                    bare.send(sent * (131072 // len(sent)))
                most = max(most, rss(plain.process.pid))
        assert time.monotonic() < began + 20, "the server went on"
    assert most < before + 20


def test_small_files_of_huge_pictures_are_refused_before_they_are_decoded(plain: Standing) -> None:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (1024, 1024)).save(file, "png")
    images = {f"c{i}": EncodedImage(file.getvalue(), "png", (1024, 1024, 3)) for i in range(40)}
    before = rss(plain.process.pid)
    with greeted(plain) as socket:
        ask(socket, type="reset", session="a")
        answer = ask(socket, type="infer", session="a", observation=seen() | {"images": images})
        assert "when decoded" in answer["message"] and rss(plain.process.pid) < before + 20


def test_a_flood_of_requests_is_refused(tmp_path: Path) -> None:
    with Standing(tmp_path / "log", rate=2, service={"memory": 1 << 20}) as server, greeted(server) as socket:
        ask(socket, type="reset", session="a")
        large = seen(size=600)
        assert "send smaller pictures" in ask(socket, type="infer", session="a", observation=large)["message"]
        answers = [ask(socket, type="infer", session="a", observation=seen()) for _ in range(60)]
        assert [a for a in answers if a["type"] == "error" and a["code"] == "busy" and "ask less often" in a["message"]]


# Sessions


def test_sessions_that_reset_and_ask_at_once_get_their_own_answers(plain: Standing) -> None:
    observation = seen()
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            with greeted(plain) as socket:
                for turn in range(8):
                    for index, message in enumerate(
                        [
                            {"type": "reset", "session": "a", "seed": 100 * number + turn},
                            *({"type": "infer", "session": "a", "observation": observation} for _ in range(3)),
                            {"type": "end", "session": "a"},
                        ]
                    ):
                        socket.send(pack({"id": index} | message))
                    answers = sorted((unpack(socket.recv(timeout=30)) for _ in range(5)), key=lambda answer: answer["id"])
                    for step, answer in enumerate(answers[1:4]):
                        right = expected(100 * number + turn, step, observation["state"], observation["images"])
                        if not np.array_equal(answer.get("actions"), right):
                            wrong.append((number, turn, step, answer.get("message")))
        except Exception as error:  # noqa: BLE001 - a thread's failure belongs to the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def sessions_in_policy(server: Standing) -> float:
    with greeted(server) as socket:
        ask(socket, type="reset", session="count")
        count: float = ask(socket, type="infer", session="count", observation=seen())["timing"]["sessions"] - 1
    return count


@pytest.mark.parametrize("last", ["infer", "end", "reset"])
def test_a_client_that_leaves_in_the_middle_leaves_nothing_in_the_policy(plain: Standing, last: str) -> None:
    with greeted(plain) as busy:
        ask(busy, type="reset", session="a")
        busy.send(pack({"type": "infer", "id": 2, "session": "a", "observation": seen(instruction="sleep 0.5")}))
        for _ in range(3):
            with greeted(plain) as leaving:
                leaving.send(pack({"type": "reset", "id": 3, "session": "b"}))
                leaving.send(pack({"type": last, "id": 4, "session": "b", "observation": seen()}))
        busy.recv(timeout=10)
    plain.settled(sessions=0, connections=0)
    assert sessions_in_policy(plain) == 0


def test_names_with_control_characters_are_refused(plain: Standing) -> None:
    with greeted(plain) as socket:
        for name in ("a\nERROR all is lost", "a\x1b[2J", "a\u202eb"):
            assert "printable" in ask(socket, type="reset", session=name)["message"]
        answer = ask(socket, type="x" * 60000)
        assert len(answer["message"]) < 3000

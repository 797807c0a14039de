"""Tokens, room, names of hosts, and what is said of files: without a socket."""

import base64
import logging
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from triune.errors import UserError
from triune.policies.serve import Serve, Server
from triune.policies.serve.config import LOOPBACK
from triune.policies.serve.security import Rate, Room, Token, from_a_page, names_this_machine, public

from .conftest import served

SECRET = "correct-horse-battery-staple"


def test_a_token_is_read_from_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {SECRET}  \nsomething else\n")
    file.chmod(0o600)
    token = Token.read(str(file))
    assert token.required and token.admits(SECRET) and not caplog.records and SECRET not in repr(vars(token))
    file.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        Token.read(str(file))
    assert "chmod 600" in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize(
    "text", ["", "\n" + SECRET, "short", "a token with blanks in it", "schlüssel-der-lang-genug-ist", "x" * 20 + "\x00"]
)
def test_what_is_no_token_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(UserError, match="openssl rand"):
        Token.read(str(tmp_path / "token"))


@pytest.mark.parametrize(
    ("header", "admitted"),
    [
        (f"Bearer {SECRET}", True),
        (f"bearer  {SECRET} ", True),
        (f"Api-Key {SECRET}", True),
        ("Basic " + base64.b64encode(f"any:{SECRET}".encode()).decode(), True),
        ("Basic " + base64.b64encode(f"{SECRET}:".encode()).decode(), False),
        ("Basic \udcff", False),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), False),
        (f"Digest {SECRET}", False),
        (SECRET, False),
        (f"Bearer {SECRET[:-1]}", False),
        (f"Bearer {SECRET}\udcff", False),
        ("Bearer ", False),
        ("", False),
        (None, False),
    ],
)
def test_headers(header: str | None, admitted: bool) -> None:
    assert Token(SECRET).admits_header(header) is admitted
    assert Token(None).admits_header(header)


def test_hosts_and_origins() -> None:
    assert all(names_this_machine(host, LOOPBACK) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", None))
    assert not any(names_this_machine(host, LOOPBACK) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil", "[::1", ""))
    assert from_a_page("null", ()) and from_a_page("http://localhost", ("https://lab.example",))
    assert not from_a_page(None, ()) and not from_a_page("https://lab.example", ("https://lab.example",))


def test_room() -> None:
    room = Room(3, 2)
    assert [room.enter(name) for name in "aaabbc"] == [True, True, False, True, False, False]
    room.leave("a")
    assert room.enter("c") and room.taken == {"a": 1, "b": 1, "c": 1}


def test_who_knocks_too_often_waits_and_nobody_else() -> None:
    rate = Rate(2.0, 3.0)
    assert [rate.allows("a", 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert rate.allows("b", 0.0) and rate.allows("a", 0.6) and not rate.allows("a", 0.7)


@pytest.mark.usefixtures("fakes")
def test_the_servers_door_counts_knocks() -> None:
    async def work(server: Server) -> None:
        server.knocks = Rate(1e-9, 2.0)
        said = []
        for _ in range(3):
            with pytest.raises(InvalidStatus) as caught:
                await connect(server.url + "/kill")
            said.append(caught.value.response.status_code)
        assert said == [404, 404, 429]

    served(work)()


def test_an_open_address_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "", "robot.lab"):
        with pytest.raises(ValueError, match="needs a token"):
            Serve(host=host)
    with pytest.raises(ValueError, match="both tls_cert and tls_key"):
        Serve(tls_cert="cert.pem")


def test_what_is_public() -> None:
    assert public("no file /srv/somebody/runs/policy.json here") == "no file policy.json here"
    assert public(r"C:\Users\somebody\token is short") == "token is short"
    assert len(public("x" * 10**6)) == 2000

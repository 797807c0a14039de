"""A server's policy behind our contract: what is sent, what comes back, what a user is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from triune import UserError
from triune.data import ActionChunk, Observation
from triune.eval import evaluate, runner
from triune.policies import Request
from triune.policies.remote import is_remote, open_remote

from ..client.fake import CONTRACT, Fake
from ..eval.fakes import CONTRACT as SQUARES
from ..eval.fakes import FakePolicy, FakePool, FakeWorld, write_checkpoint


def request(session: str, value: float = 1.0, **more: object) -> Request:
    seen = Observation({"agentview": np.full((8, 8, 3), 3, np.uint8)}, np.full(3, value, np.float32), "lift", 1.5)
    return Request(session, seen, **more)


def test_only_addresses_of_servers_are_remote() -> None:
    assert is_remote("ws://127.0.0.1:1") and is_remote("wss://lab:1") and not is_remote("runs/ws") and not is_remote("expert")


def test_requests_are_sent_together_and_answered_in_order() -> None:
    with Fake() as server:
        policy = open_remote(server.url)
        assert policy.contract.camera_names == ("agentview", "wrist") and policy.contract.rate == 20 and policy.contract.executed == 2
        policy.reset("a", seed=5)
        plans = policy.plan([request("slow"), request("a"), request("slow", 2.0)])  # the second is answered first
        assert [plan.chunk.actions[0, 0] for plan in plans] == [6, 11, 10]
        assert plans[1].chunk.rate == 20 and plans[1].chunk.time == 1.5 and plans[1].value == 0.5 and plans[1].foresight is None
        assert plans[1].timing["queue"] == 0.1 and plans[1].timing["round_trip"] > 0
        policy.act(request("a", prefix=ActionChunk(np.ones((2, 2)), 20.0), delay=1))
        sent = server.seen[-1]
        assert sent["delay"] == 1 and np.array_equal(sent["prefix"], np.ones((2, 2))) and sent["prefix"].dtype == np.float32
        assert set(sent["observation"]) == {"images", "state", "instruction", "timestamp"}
        policy.foresight = True
        drawn = policy.act(request("a")).foresight
        assert drawn is not None and drawn()["agentview"].shape == (8, 8, 3)
        policy.disconnect()


def test_what_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from triune_client import ServerError

    with Fake(token="t") as server:
        with pytest.raises(UserError, match=r"refuses: .*asks for its token"):
            open_remote(server.url)
        monkeypatch.setenv("TRIUNE_TOKEN", "t")
        policy = open_remote(server.url, timeout=0.3)
        with pytest.raises(UserError, match="refuses: no camera wrist"):
            policy.act(request("bad"))
        with pytest.raises(UserError, match=r"no answer within 0\.3 s"):
            policy.act(request("never"))
        with pytest.raises(ServerError, match="the server stops"):  # passes by: one episode's error, not the user's mistake
            policy.act(request("draining"))
        policy.reset("a", seed=1)
        assert policy.act(request("a")).chunk.actions[0, 0] == 7
        policy.disconnect()
    with pytest.raises(UserError, match="no connection to ws"):
        open_remote(server.url)
    with pytest.raises(UserError, match="in the clear"):
        open_remote("ws://192.0.2.1:1")
    with Fake(contract={**CONTRACT, "surprise": 1}, token="t") as server, pytest.raises(UserError, match=r"the contract of ws.*surprise"):
        open_remote(server.url)


def rows(out: Path) -> list[dict]:
    """What happened in every episode, less the time it took."""
    return [{**json.loads(line), "policy_ms": None, "deadline_misses": None} for line in (out / "episodes.jsonl").read_text().splitlines()]


def test_an_evaluation_is_the_same_through_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes' policy in this process and behind a server: every row of every episode but its times."""
    monkeypatch.setattr(runner, "build_world", FakeWorld)
    monkeypatch.setattr(runner, "camera_names", lambda name: SQUARES.camera_names)
    monkeypatch.setattr(runner, "WorldPool", FakePool)
    monkeypatch.setattr(runner, "find_checkpoint", Path)
    monkeypatch.setattr(runner, "open_policy", lambda path, cuts=(): FakePolicy())
    write_checkpoint(tmp_path / "run")
    controls = {"instruction swapped": {"instruction": "swap"}}
    tree = {"title": "Two squares", "episodes": 4, "tasks": {"fake/reach-red": {}, "fake/reach-green": {}}, "controls": controls}
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(tree | {"videos": {"first": 0, "failures": 0}}))
    here = evaluate(str(suite), str(tmp_path / "run" / "checkpoints" / "step-000400"), out=tmp_path / "here")

    served = FakePolicy()

    def act(message: dict) -> np.ndarray | None:
        if message["type"] == "reset":
            return served.reset(message["session"], message["seed"])
        seen = message["observation"]
        asked = Request(message["session"], Observation(seen["images"], seen["state"], seen["instruction"], seen["timestamp"]))
        return served.act(asked).chunk.actions

    with Fake(contract=SQUARES.model_dump(mode="json"), act=act) as server:
        there = evaluate(str(suite), server.url, out=tmp_path / "there")
        mine, theirs = rows(tmp_path / "here"), rows(tmp_path / "there")
        again = evaluate(str(suite), server.url, out=tmp_path / "there", episodes=5)
        assert not any(message.get("foresight") for message in server.seen)
        evaluate(str(suite), server.url, out=tmp_path / "filmed", episodes=1, overrides=["controls=null", "videos.first=1"])
        assert all(message["foresight"] for message in server.seen[-2:] if message["type"] == "infer")
        with pytest.raises(UserError, match="'blind' needs the checkpoint itself.*is a server"):
            evaluate(str(suite), server.url, out=tmp_path / "blind", overrides=["controls.blind.cut=[action, obs]"])
    assert there["policy"] == server.url and there["checkpoint"] is None and again["overall"]["episodes"] == 10
    assert mine == theirs and len(mine) == 16
    assert list((tmp_path / "filmed" / "foresight").glob("*.png"))
    assert here["overall"]["successes"] == there["overall"]["successes"] > 0

"""The one shape of benchmark results."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from triune import UserError
from triune.data import open_dataset
from triune.eval.bench import BENCHES, bench, loader, server, write
from triune.eval.bench.inference import BF16, FP32, composed
from triune.eval.bench.peer import Composed
from triune.eval.bench.run import in_turns, median_interval, row, seconds
from triune.vla import build, load_spec
from triune.vla.engine import infer
from triune.vla.narrow import narrow
from triune.vla.proofs import probe


def test_rates_are_better_when_larger_and_times_when_smaller() -> None:
    assert row("a", 10, 5, "them", "samples/s", gate=2)["passed"]
    assert not row("a", 10, 6, "them", "samples/s", gate=2)["passed"]
    assert row("a", 5, 10, "them", "ms")["ratio"] == 2
    assert row("a", 5, 10, "them", "ms")["gate"] is None


def test_a_result_has_the_shape_that_machines_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("triune.eval.bench.inference.run", lambda: [row("case", 1, 2, "them", "ms", 1.5)])
    result = bench("inference")
    assert list(result) == ["bench", "command", "hardware", "versions", "load", "date", "rows"]
    assert list(result["rows"][0]) == ["name", "ours", "peer", "peer_name", "ratio", "interval", "unit", "gate", "passed"]
    table = write([{**result, "load": 1.25}], tmp_path).read_text()
    assert "load 1.25 before it began" in table
    assert "| inference | case | 1 ms | 2 (them) | 2 | >= 1.5 | yes |" in table
    assert json.loads((tmp_path / "bench-inference.json").read_text()) == {**result, "load": 1.25}
    other = {**result, "bench": "loader", "rows": [row("other", 1, 2, "them", "ms", interval=(1.9, 2.1))]}
    both = write([other], tmp_path).read_text()  # what was measured before stays in the table
    assert "| loader | other | 1 ms | 2 (them) | 2 (1.9 to 2.1) |  | yes |" in both and "| inference | case |" in both


def test_every_benchmark_is_known_by_name() -> None:
    with pytest.raises(UserError, match="did you mean 'rollout'"):
        bench("rolout")
    assert BENCHES


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_peer_of_inference_computes_the_same(attention: str) -> None:
    model = build(load_spec("small_60m_tiny")).eval()
    for parameter in model.parameters():  # every part matters
        torch.nn.init.normal_(parameter, std=0.3)
    data = probe(model)  # two rows, one with a shorter prompt
    exact = infer(model, data.inputs, data.noise).actions
    peer = Composed(model, attention)
    assert (peer(data.inputs, data.noise["action"]) - exact).abs().max() < FP32 * exact.abs().max()
    answers = [infer(narrow(model), data.inputs, data.noise).actions, peer.narrow()(data.inputs, data.noise["action"])]
    for answer in answers:
        assert (answer - exact).norm() < BF16 * (exact - data.noise["action"]).norm()


def test_rows_beside_the_peer_have_intervals() -> None:
    rows = composed("small_60m_tiny", repeats=3)
    assert len(rows) == 3 and all(r["interval"][0] <= r["interval"][1] for r in rows)


def test_turns_are_taken_forwards_and_backwards() -> None:
    calls: list[str] = []
    times = in_turns([lambda: calls.append("a"), lambda: calls.append("b")], repeats=4)
    assert "".join(calls) == "baab" * 3 and [len(t) for t in times] == [4, 4]


def test_the_interval_of_a_median() -> None:
    assert median_interval(range(21)) == (5, 15)  # the sixth and the sixteenth of 21: 97.3 %
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)


def test_seconds_takes_the_median_after_a_first_call() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(1), repeats=3) >= 0
    assert len(calls) == 4


def test_loading_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our half of the loader's benchmark on small data; the peer's takes minutes."""
    for name, value in {"EPISODES": 2, "FRAMES": 120, "SIDE": 64}.items():
        monkeypatch.setattr(loader, name, value)
    loader.write(tmp_path / "video", video=True)
    loader.write_vectors(tmp_path / "vectors")
    assert open_dataset(tmp_path / "vectors").vectors["action"].shape == (240, 7)
    assert loader.ours(tmp_path / "video", repeats=1) > 0
    assert loader.ours(tmp_path / "vectors", repeats=1) > 0
    frames = loader.shuffled(tmp_path / "video")
    assert frames["unit"] == "frames/s" and 0.05 < frames["ratio"] < 5
    kept = loader.memory(tmp_path / "vectors")
    assert kept["passed"] and kept["ours"] < 1.05 * kept["peer"]


OPENPI = """
import asyncio, sys
from triune_client.wire import pack, unpack
from websockets.asyncio.server import serve

async def answer(connection):
    await connection.send(pack({"of": "a peer"}))
    async for frame in connection:
        assert "prompt" in unpack(frame)
        await connection.send(pack({"actions": [[0.0]]}))

async def main():
    async with serve(answer, "127.0.0.1", int(sys.argv[1]), max_size=None) as server:
        await server.serve_forever()

asyncio.run(main())
"""


def test_turns_come_in_another_order_each_round_and_the_first_round_does_not_count() -> None:
    asked: list[int] = []

    def work(k: int) -> server.Timed:
        def calls(times: int) -> list[float]:
            asked.append(k)
            return [float(len(asked) > 3)] * times

        return calls

    times = server.in_rounds([work(k) for k in range(3)], rounds=6, each=2)
    rounds = [tuple(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert times == [[1.0] * 12] * 3
    assert len(rounds) == 7 and all(sorted(order) == [0, 1, 2] for order in rounds) and len(set(rounds)) > 2


def test_the_server_is_measured_beside_its_limits_and_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "in_rounds", partial(server.in_rounds, rounds=1, each=3))
    peer = tmp_path / "peer.py"
    peer.write_text(OPENPI)
    rows = server.overhead(peer)
    assert [r["peer_name"] for r in rows[2:]] == [
        "raw TCP echo of the same bytes over asyncio's streams",
        "the same echo over blocking sockets",
        "websockets with its defaults",
        "peer.py",
        "the echo over asyncio's streams, as seldom",
        "websockets with its defaults",
        "peer.py",
        "the echo of as many bytes over asyncio's streams",
        "websockets with its defaults",
        "peer.py",
    ]
    assert all(0 < r["ours"] < 1000 and r["peer"] > 0 for r in rows)
    assert [len({r["ours"] for r in some}) for some in (rows[2:6], rows[6:9], rows[9:])] == [1, 1, 1]


@pytest.mark.slow
def test_a_peer_that_does_not_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="must serve openpi's protocol"):
        server.overhead(tmp_path / "peer.py")


@pytest.mark.slow
def test_clients_share_calls_and_health_is_told_meanwhile() -> None:
    rate, batch = server.together(clients=2, seconds=0.6)
    assert 0 < rate["ratio"] <= 1 and 1 <= batch["ours"] <= 2
    health, answered = server.alive(1.0)
    assert health["ours"] > 0 and answered["passed"]


@pytest.mark.slow
def test_a_control_loop_on_the_wall_clock() -> None:
    stopped, _late, reaction = server.realtime(0.03)
    assert stopped["passed"] == (stopped["ours"] == 0) and reaction["ours"] > 20

"""What /metrics says of a known series of requests, and the measure of foresight that did not come true."""

import asyncio

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from triune.data import ActionChunk, Camera, Contract, Observation, Vector
from triune.policies import Request
from triune.policies.serve import Server
from triune.policies.serve.exchange import Reply
from triune.policies.serve.surprise import Surprise, small

from .conftest import seen, served
from .test_server import ask, get, greeted

pytestmark = pytest.mark.usefixtures("fakes")

Samples = dict[tuple[str, frozenset], float]


async def scrape(server: Server) -> Samples:
    status, body = await get(server, "/metrics")
    assert status == 200
    found = [s for family in text_string_to_metric_families(body.decode()) for s in family.samples]
    keys = [(s.name, frozenset(s.labels.items())) for s in found]
    assert len(keys) == len(set(keys)) and not any(name.endswith("_created") for name, _ in keys)
    return {key: s.value for key, s in zip(keys, found, strict=True)}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_every_request_is_counted_by_its_stages_and_outcome() -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            await ask(socket, type="reset", session="a", seed=5)
            inside = seen(size=32) | {"state": np.array([0, 0, 0, 0, 0, 0, 3, -3], np.float32)}
            for _ in range(4):
                assert (await ask(socket, type="infer", session="a", observation=inside))["type"] == "plan"
            assert (await ask(socket, type="infer", session="b", observation=inside))["code"] == "bad_request"
            late = inside | {"instruction": "sleep 0.2"}
            assert (await ask(socket, type="infer", session="a", observation=late, deadline=0.05))["code"] == "late"
            assert (await ask(socket, type="infer", session="a", observation=inside | {"instruction": "raise"}))["code"] == "internal"
            slow = inside | {"instruction": "sleep 0.6"}  # 25 executed steps at 50 Hz take 0.5 s
            assert (await ask(socket, type="infer", session="a", observation=slow, delay=5))["type"] == "plan"
            found = await scrape(server)
        assert value(found, "triune_requests_total", outcome="answered") == 5
        codes = {"late": 1, "internal": 1, "bad_request": 1, "worker": 0, "unauthorized": 0}
        assert {code: value(found, "triune_refusals_total", code=code) for code in codes} == codes
        for stage in ("queue", "model", "total"):
            assert value(found, "triune_stage_seconds_count", stage=stage) == 5
            p50, p95, p99 = (value(found, "triune_stage_latency_seconds", stage=stage, quantile=q) for q in ("0.5", "0.95", "0.99"))
            assert 0 <= p50 <= p95 <= p99
        assert value(found, "triune_stage_latency_seconds", stage="total", quantile="0.99") > 0.5
        assert value(found, "triune_stage_seconds_count", stage="decode") == 10  # hello, reset, eight requests
        assert value(found, "triune_stage_seconds_count", stage="encode") >= 10
        assert {r: value(found, "triune_late_chunks_total", reason=r) for r in ("deadline", "delay", "executed")} == {
            "deadline": 1,
            "delay": 1,
            "executed": 1,
        }
        assert value(found, "triune_inputs_total") == 5
        assert value(found, "triune_inputs_outside_total", dimension="s6", side="above") == 5
        assert value(found, "triune_inputs_outside_total", dimension="s7", side="below") == 5
        assert value(found, "triune_inputs_outside_total", dimension="s0", side="below") == 0
        assert value(found, "triune_outside_share") == 2 / 8
        assert value(found, "triune_sessions") == 1 and value(found, "triune_ready") == 1
        assert value(found, "triune_batch_size_sum") == 5
        assert value(found, "triune_resident_bytes", process="policy") > 1e7

    served(work, size=32)()


def test_deaths_and_those_who_have_no_token_are_counted(tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")

    async def work(server: Server) -> None:
        with pytest.raises(InvalidStatus):
            async with connect(server.url + "/v1"):
                pass
        assert (await get(server, "/metrics"))[0] == 401
        counted = server.operations.metrics.refusals.labels("unauthorized")
        assert next(s.value for s in counted.collect()[0].samples) == 2
        service = server.service
        await service.reset("a", 1)
        with pytest.raises(Exception, match="SIGKILL|signal 9"):
            await service.plan(Request("a", Observation(**seen(instruction="die", size=32))))
        while not service.ready:
            await asyncio.sleep(0.01)
        text = server.operations.metrics.page()[2].decode()
        assert 'triune_policy_events_total{event="died"} 1.0' in text and 'event="started"} 2.0' in text
        assert 'triune_refusals_total{code="worker"} 1.0' in text and "0123456789abcdef" not in text

    served(work, size=32)(token_file=str(token))


def test_what_guards_changed_is_counted_by_kind_and_dimension() -> None:
    async def work(server: Server) -> None:
        metrics, request = server.operations.metrics, Request("a", Observation(**seen(size=32)))
        from triune.policies.serve.exchange import Exchange

        reply = Reply(np.zeros((2, 32), np.float32), 50.0, 0.0, {}, events={"velocity a3": 4, "nan": 1})
        metrics.exchanged(Exchange(request, 0, 0, reply))
        found = await scrape(server)
        assert value(found, "triune_guard_events_total", kind="velocity", dimension="a3") == 4
        assert value(found, "triune_guard_events_total", kind="nan", dimension="") == 1

    served(work, size=32)()


def test_the_client_gets_no_foresight_that_only_listeners_wanted() -> None:
    async def work(server: Server) -> None:
        async with greeted(server) as socket:
            await ask(socket, type="reset", session="a", seed=5)
            for step in range(5):
                observation = seen(0, size=32) | {"timestamp": step * 0.5}
                plan = await ask(socket, type="infer", session="a", observation=observation)
                assert "foresight" not in plan and ("foresight" in plan["timing"]) == (step % 2 == 0)
            found = await scrape(server)
        assert value(found, "triune_foresight_compared_total") == 2  # drawn at 0, 2, 4; the fake foresees negatives, and nothing moves
        cells = small(seen(0, size=32)["images"]["wrist"], (32, 32))
        assert value(found, "triune_foresight_surprise", quantile="0.5") == pytest.approx(np.abs(255 - 2 * cells).mean(), rel=0.1)
        assert value(found, "triune_foresight_error_total", of="no_change") == 0

    served(work, size=32)(metrics={"foresight_every": 2})


CONTRACT = Contract(cameras=(Camera(name="c"),), state=Vector(names=("s",)), action=Vector(names=("a",)), rate=10.0, chunk=10, executed=5)


def foreseen(surprise: Surprise, picture: np.ndarray, time: float, drawn: np.ndarray | None = None) -> None:
    request = Request("a", Observation({"c": picture}, np.zeros(1), "x", time))
    chunk = ActionChunk(np.zeros((10, 1)), 10.0)
    surprise.saw(request, Reply(chunk.actions, chunk.rate, time, {}, foresight={} if drawn is None else {"c": drawn}), CONTRACT)


@pytest.mark.parametrize(("which", "expected"), [("came", 0.0), ("seen", 1.0)])
def test_surprise_is_0_for_what_comes_true_and_1_for_expecting_no_change(which: str, expected: float) -> None:
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in ("seen", "came")}
    surprise = Surprise(1, 10)
    foreseen(surprise, pictures["seen"], 1.0, pictures[which])
    foreseen(surprise, rng.integers(0, 256, (64, 64, 3), np.uint8), 1.2)  # within the executed part: not yet
    assert surprise.count == 0
    foreseen(surprise, pictures["came"], 1.5)
    assert list(surprise.found) == [expected]


def test_what_is_asked_too_late_is_not_compared_and_sizes_may_differ() -> None:
    rng = np.random.default_rng(0)
    surprise = Surprise(1, 10)
    foreseen(surprise, rng.integers(0, 256, (64, 48, 3), np.uint8), 1.0, rng.integers(0, 256, (20, 24, 3), np.uint8))
    foreseen(surprise, rng.integers(0, 256, (64, 48, 3), np.uint8), 3.0)
    assert surprise.count == 0
    foreseen(surprise, np.zeros((64, 48, 3), np.uint8), 4.0, np.zeros((20, 24, 3), np.uint8))
    foreseen(surprise, np.full((64, 48, 3), 10, np.uint8), 4.5)
    assert list(surprise.found) == [1.0] and (surprise.foreseen, surprise.still) == (10.0, 10.0)


def test_small_is_the_mean_of_cells() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    np.testing.assert_allclose(small(image, (4, 3)), image.reshape(4, 2, 3, 2, 3).mean((1, 3)), rtol=1e-6)
    assert small(image, (3, 5)).shape == (3, 5, 3)

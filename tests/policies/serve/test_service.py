"""The service behind every dialect: order, batches, deadlines, a policy whose process dies."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triune.data import Observation
from triune.errors import UserError
from triune.policies import Request
from triune.policies.serve import Service, Source
from triune.policies.serve.exchange import Refusal, Reply
from triune.policies.serve.process import Process
from triune.policies.serve.warden import read_limits

from .conftest import seen
from .fakes import expected

pytestmark = pytest.mark.usefixtures("fakes")


def with_service(work: Callable[[Service], Awaitable[None]], batch: int = 8, **arguments: Any) -> None:
    async def main() -> None:
        service = Service(Source("fakes:Fake", arguments, batch))
        await service.start()
        try:
            await asyncio.wait_for(work(service), timeout=60)
        finally:
            await service.stop()

    asyncio.run(main())


def asking(session: str, seed: int = 0, instruction: str = "lift") -> Request:
    return Request(session, Observation(**seen(seed, instruction, size=32)))


def test_what_is_asked_after_a_reset_is_asked_in_its_episode_also_where_nobody_waits() -> None:
    async def work(service: Service) -> None:
        begun = [service.reset("a", 7), service.reset("a", 8)]
        request = asking("a")
        reply = await service.plan(request)
        np.testing.assert_array_equal(reply.actions, expected(8, 0, request.observation.state, request.observation.images))
        ended = service.close("a")
        with pytest.raises(Refusal, match="has not begun"):
            await service.plan(request)
        await asyncio.gather(*begun, ended, service.close("a"))

    with_service(work, size=32)


def test_a_session_gets_the_actions_of_its_seed_step_and_observation() -> None:
    async def work(service: Service) -> None:
        await service.reset("a", 7)
        for step in range(3):
            request = asking("a", seed=step)
            reply = await service.plan(request, foresight=step == 1)
            np.testing.assert_array_equal(reply.actions, expected(7, step, request.observation.state, request.observation.images))
            assert (reply.rate, reply.time, reply.value) == (50.0, 0.25, 0.5)
            assert bool(reply.foresight) == (step == 1)
        await service.reset("a", 8)
        request = asking("a")
        again = await service.plan(request)
        np.testing.assert_array_equal(again.actions, expected(8, 0, request.observation.state, request.observation.images))

    with_service(work, size=32)


def test_requests_that_wait_share_a_call_and_each_gets_its_own_answer() -> None:
    async def work(service: Service) -> None:
        names = [f"s{i}" for i in range(6)]
        for i, name in enumerate(names):
            await service.reset(name, i)
        first = asyncio.create_task(service.plan(asking("s0")))
        await asyncio.sleep(0.02)  # the policy thinks about the first while the others arrive
        requests = [asking(name, seed=i) for i, name in enumerate(names[1:], 1)]
        replies = await asyncio.gather(*(service.plan(r) for r in requests))
        for i, (request, reply) in enumerate(zip(requests, replies, strict=True), 1):
            np.testing.assert_array_equal(reply.actions, expected(i, 0, request.observation.state, request.observation.images))
        assert (await first).timing["batch"] == 1
        assert [r.timing["batch"] for r in replies] == [4, 4, 4, 4, 1]

    with_service(work, batch=4, size=32, seconds=0.1)


def test_a_call_waits_for_sessions_that_ask_again_soon_and_never_for_a_single_one() -> None:
    async def main() -> None:
        service, batches = Service(Source("fakes:Fake", {"size": 32, "seconds": 0.3}), window=5.0), []
        await service.start()

        async def robot(name: str, pause: float) -> None:
            await service.reset(name, 0)
            for _ in range(5):
                batches.append((await service.plan(asking(name))).timing)
                await asyncio.sleep(pause)

        try:
            await asyncio.gather(*(robot(name, pause) for name, pause in (("a", 0.0), ("b", 0.01), ("c", 0.02))))
            assert sum(timing["batch"] == 3 for timing in batches) >= 6  # a, which asks at once, would be answered alone each time
            batches.clear()
            await robot("alone", 0.0)
            assert min(timing["queue"] for timing in batches) < 30.0 and [timing["batch"] for timing in batches] == [1] * 5
        finally:
            await service.stop()

    asyncio.run(main())


def test_two_requests_of_a_session_are_answered_one_after_the_other() -> None:
    async def work(service: Service) -> None:
        await service.reset("a", 1)
        requests = [asking("a", seed=i) for i in range(3)]
        replies = await asyncio.gather(*(service.plan(r) for r in requests))
        for step, (request, reply) in enumerate(zip(requests, replies, strict=True)):
            np.testing.assert_array_equal(reply.actions, expected(1, step, request.observation.state, request.observation.images))

    with_service(work, size=32)


def test_one_faulty_request_does_not_spoil_its_batch() -> None:
    async def work(service: Service) -> None:
        for name in "abcd":
            await service.reset(name, 0)
        words = {"a": "lift", "b": "raise", "c": "mistake", "d": "lift"}
        answers = await asyncio.gather(*(service.plan(asking(n, instruction=w)) for n, w in words.items()), return_exceptions=True)
        assert isinstance(answers[0], Reply) and isinstance(answers[3], Reply)
        assert isinstance(answers[1], Refusal) and answers[1].code == "internal" and "defect" not in str(answers[1])
        assert isinstance(answers[2], Refusal) and answers[2].code == "bad_request" and "too long" in str(answers[2])

    with_service(work, size=32)


def test_a_deadline_is_kept_while_the_policy_thinks_and_a_late_request_is_not_computed() -> None:
    async def work(service: Service) -> None:
        for name in "ab":
            await service.reset(name, 0)
        loop = asyncio.get_running_loop()
        slow = asyncio.create_task(service.plan(asking("a", instruction="sleep 0.6")))
        await asyncio.sleep(0.05)
        began = loop.time()
        with pytest.raises(Refusal, match="no answer within 100 ms") as caught:
            await service.plan(asking("b"), deadline=0.1)
        assert caught.value.code == "late" and loop.time() - began < 0.3
        await slow
        request = asking("b")
        reply = await service.plan(request)  # the late request took no step of its session
        np.testing.assert_array_equal(reply.actions, expected(0, 0, request.observation.state, request.observation.images))

    with_service(work, size=32)


def test_a_policy_that_is_killed_costs_one_error_and_its_sessions_begin_anew() -> None:
    async def work(service: Service) -> None:
        await service.reset("a", 3)
        await service.reset("b", 4)
        await service.plan(asking("a"))
        dying = asyncio.create_task(service.plan(asking("a", instruction="die")))
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal, match="signal 9") as caught:
            await dying
        assert caught.value.code == "worker"
        for name, seed in (("a", 3), ("b", 4)):
            request = asking(name)
            reply = await service.plan(request)  # waits until the policy is back
            np.testing.assert_array_equal(reply.actions, expected(seed, 0, request.observation.state, request.observation.images))

    with_service(work, size=32)


def test_the_process_that_stands_by_takes_over() -> None:
    async def work(service: Service) -> None:
        service.standby.wanted = True
        for _ in range(3):
            service.standby.prepare([*service.process.modules, "no_such_module"])  # type: ignore[union-attr]
            assert service.standby._next is not None
            waiting = (await service.standby._next).child.pid
            await service.reset("a", 3)
            with pytest.raises(Refusal, match="signal 9"):
                await service.plan(asking("a", instruction="die"))
            request = asking("a")
            reply = await service.plan(request)
            np.testing.assert_array_equal(reply.actions, expected(3, 0, request.observation.state, request.observation.images))
            assert service.process is not None and service.process.child.pid == waiting
            await service.standby.stop()
        service.standby.prepare(service.process.modules)
        assert service.standby._next is not None
        (await service.standby._next).kill()  # it may die, too
        with pytest.raises(Refusal, match="signal 9"):
            await service.plan(asking("a", instruction="die"))
        await service.plan(asking("a"))
        service.standby.prepare(service.process.modules)  # one that is still getting ready is ended with the service

    with_service(work, size=32)


def test_a_policy_that_dies_again_and_again_is_given_up() -> None:
    async def work(service: Service) -> None:
        service.restarts = 2
        service._deaths = type(service._deaths)(maxlen=2)
        await service.reset("a", 0)
        for _ in range(3):
            with pytest.raises(Refusal, match="ended"):
                await service.plan(asking("a", instruction="die"))
        while service.failed is None:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="will not be started again"):
            await service.plan(asking("a"))
        assert not service.ready

    with_service(work, size=32)


def test_a_hung_policy_is_started_anew() -> None:
    async def work(service: Service) -> None:
        service.patience = 0.3
        await service.reset("a", 0)
        with pytest.raises(Refusal, match="signal 9"):
            await service.plan(asking("a", instruction="sleep 60"))
        await service.plan(asking("a"))

    with_service(work, size=32)


def test_sessions_are_forgotten_by_server_and_policy() -> None:
    async def work(service: Service) -> None:
        for i in range(20):
            await service.reset(f"s{i}", i)
            await service.plan(asking(f"s{i}"))
            await service.close(f"s{i}")
        await service.reset("last", 0)
        reply = await service.plan(asking("last"))
        assert reply.timing["sessions"] == 1 and len(service.sessions) == 1

    with_service(work, size=32)


def test_a_request_before_reset_and_one_too_many_are_refused() -> None:
    async def work(service: Service) -> None:
        with pytest.raises(Refusal, match="has not begun"):
            await service.plan(asking("nobody"))
        service.limit = 2
        for name in "abcd":
            await service.reset(name, 0)
        slow = asyncio.create_task(service.plan(asking("a", instruction="sleep 0.3")))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(service.plan(asking(n))) for n in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="wait already") as caught:
            await service.plan(asking("d"))
        assert caught.value.code == "busy"
        await asyncio.gather(slow, *waiting)

    with_service(work, size=32)


def test_a_policy_that_cannot_be_loaded_says_why() -> None:
    with pytest.raises(UserError, match="there is no such checkpoint"):
        with_service(lambda service: asyncio.sleep(0), refuse="there is no such checkpoint")


LIMITS = {"dimensions": [{"name": f"a{i}", "mode": "absolute", "min": -0.5, "max": 0.5} for i in range(32)], "source": "a test"}


def test_chunks_are_kept_inside_the_limits_and_events_are_counted() -> None:
    async def work(service: Service) -> None:
        service.limits = read_limits(LIMITS, service.contract)
        await service.reset("a", 0)
        request = asking("a")
        reply = await service.plan(request)
        wanted = expected(0, 0, request.observation.state, request.observation.images)
        np.testing.assert_array_equal(reply.actions, wanted.clip(-0.5, 0.5))
        assert reply.events == {f"position a{i}": n for i in range(32) if (n := int((np.abs(wanted[:, i]) > 0.5).sum()))}

    with_service(work, size=32)


def test_numbers_that_are_not_finite_are_refused_or_held() -> None:
    async def work(service: Service) -> None:
        await service.reset("a", 0)
        with pytest.raises(Refusal, match="not finite in a3"):
            await service.plan(asking("a", instruction="nan"))
        service.limits = read_limits(LIMITS, service.contract)
        await service.reset("a", 0)
        first = await service.plan(asking("a"))
        held = await service.plan(asking("a", instruction="nan"))
        assert held.events["nan a3"] == 1
        assert np.isfinite(held.actions).all()
        np.testing.assert_array_equal(held.actions[0], first.actions[24])  # where the robot was left, 25 steps being executed

    with_service(work, size=32)


def test_limits_of_another_robot_are_refused() -> None:
    async def work() -> None:
        service = Service(Source("fakes:Fake", {"size": 32}), limits={"dimensions": [{"name": "x"}], "source": "robot arm"})
        with pytest.raises(UserError, match=r"robot arm.*of 1 actions"):
            await service.start()

    asyncio.run(work())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc to count processes")
def test_a_start_that_is_given_up_leaves_no_process() -> None:
    def children() -> list[str]:
        return [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]

    async def main() -> None:
        before = children()
        for turns in range(8):  # of the event loop, until it is given up
            starting = asyncio.create_task(Process.prepare(Source("fakes:Fake", {}), []))
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            assert children() == before

    asyncio.run(main())

"""The asynchronous executor under a clock of the test's own: nothing here waits, and every run is the same."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triune_client.realtime import Realtime, Threads, paced
from triune_client.safety import ActionLimits, Dimension, Guard, Watchdog

Latency = Callable[[], float]


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Later:
    """An answer that is there from a moment on."""

    def __init__(self, clock: Clock, ready: float, work: Callable[[], Any]) -> None:
        self.clock, self.ready = clock, ready
        self.value: Any = None
        self.error: Exception | None = None
        try:
            self.value = work()
        except RuntimeError as error:
            self.error = error

    def done(self) -> bool:
        return self.clock.now() >= self.ready

    def result(self) -> Any:
        assert self.done(), "asked for before it was there"
        return self.value

    def exception(self) -> Exception | None:
        return self.error


class Runner:
    """Answers come as late as ``latency`` says."""

    def __init__(self, clock: Clock, latency: Latency) -> None:
        self.clock, self.latency = clock, latency
        self.asked: list[tuple[float, float]] = []

    def submit(self, work: Callable[[], Any]) -> Later:
        late = self.latency()
        self.asked.append((self.clock.now(), late))
        return Later(self.clock, self.clock.now() + late, work)


class Asked:
    """A policy that answers with random chunks, and remembers what it was asked."""

    def __init__(self, chunk: int, dims: int = 2) -> None:
        self.rng, self.shape = np.random.default_rng(0), (chunk, dims)
        self.calls: list[tuple[Any, np.ndarray | None, int]] = []
        self.answers: list[np.ndarray] = []

    def __call__(self, observation: Any, prefix: np.ndarray | None = None, delay: int = 0) -> Any:
        self.calls.append((observation, prefix, delay))
        self.answers.append(self.rng.normal(size=self.shape))
        return {"actions": self.answers[-1], "rate": 50.0}


class Continuing:
    """A policy as real-time chunking makes it: the committed steps are the prefix's, then a walk of small steps goes on from there."""

    def __init__(self, chunk: int, largest: float = 0.1) -> None:
        self.rng, self.chunk, self.largest = np.random.default_rng(0), chunk, largest

    def __call__(self, observation: Any, prefix: np.ndarray | None = None, delay: int = 0) -> np.ndarray:
        start = np.zeros((1, 1)) if prefix is None else prefix[: max(delay, 1)]
        walk = self.rng.uniform(-self.largest, self.largest, (self.chunk, 1)).cumsum(0)
        return np.concatenate([start, start[-1] + walk])[: self.chunk]


def drive(realtime: Realtime, clock: Clock, ticks: int, seen: Callable[[int], bool] = lambda n: True) -> list[np.ndarray | None]:
    """What each of ``ticks`` ticks sent, at n / rate; observations are there where ``seen`` says."""
    start, sent = clock.time, []
    for n in range(ticks):
        clock.time = start + n / realtime.rate
        sent.append(realtime.tick({"tick": n, "state": np.zeros(1)} if seen(n) else None))
    clock.time = start + ticks / realtime.rate
    return sent


def made(policy: Any, latency: Latency, rate: float = 50.0, **settings: Any) -> tuple[Realtime, Clock, Runner]:
    clock = Clock()
    runner = Runner(clock, latency)
    return Realtime(policy, rate, clock=clock, runner=runner, **settings), clock, runner


def drawn(seed: int, low: float = 0.02, high: float = 0.4, jitter: float = 0.3) -> Latency:
    """A base latency that wanders over all of [low, high], and 30 % about it, within these."""
    rng = np.random.default_rng(seed)
    return lambda: float(np.clip(rng.uniform(low, high) * rng.uniform(1 - jitter, 1 + jitter), low, high))


def reference(
    chunks: list[np.ndarray], latencies: list[float], ticks: int, rate: float, horizon: int, remaining: int | None
) -> tuple[list[np.ndarray | None], list[tuple[list[np.ndarray], int]]]:
    """Tick by tick, with a table of planned actions by number: what is sent, and what each question carries under real-time chunking."""
    plan: dict[int, np.ndarray] = {}
    sent: list[np.ndarray | None] = []
    questions: list[tuple[list[np.ndarray], int]] = []
    measured: list[int] = []
    waiting: tuple[float, int, int] | None = None
    done, asked_at = 0, -(10**9)
    for tick in range(ticks):
        now = tick / rate
        if waiting is not None and now >= waiting[0]:
            measured.append(tick - waiting[2])
            answer = chunks[len(questions) - 1]
            if waiting[1] + len(answer) > done:
                plan = {waiting[1] + k: action for k, action in enumerate(answer) if waiting[1] + k >= done}
            waiting = None
        left = sum(number >= done for number in plan)
        if waiting is None and (left == 0 or (tick - asked_at >= horizon and (remaining is None or left <= remaining))):
            rest = [plan[number] for number in sorted(plan) if number >= done]
            expected = (max(measured[1:][-10:]) if len(measured) > 1 else measured[0]) if measured else 0
            waiting, asked_at = (now + latencies[len(questions)], done, tick), tick
            questions.append((rest, min(expected, len(rest))))
        if done in plan:
            sent.append(plan[done])
            done += 1
        else:
            sent.append(None)
    return sent, questions


@given(
    rate=st.sampled_from([5.0, 20.0, 30.0, 50.0]),
    chunk=st.integers(1, 30),
    horizon=st.integers(1, 12),
    remaining=st.one_of(st.none(), st.integers(0, 20)),
    latencies=st.lists(st.floats(0, 0.7), min_size=1, max_size=12),
    mode=st.sampled_from(["async", "rtc"]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_executed_is_what_the_reference_says(
    rate: float, chunk: int, horizon: int, remaining: int | None, latencies: list[float], mode: str
) -> None:
    policy, ticks = Asked(chunk), 120
    many = list(itertools.islice(itertools.cycle(latencies), ticks))
    given_latencies = iter(many)
    realtime, clock, _ = made(policy, lambda: next(given_latencies), rate, mode=mode, horizon=horizon, remaining=remaining, stale=1e3)
    sent = drive(realtime, clock, ticks)
    expected, questions = reference(policy.answers, many, ticks, rate, horizon, remaining)
    assert [None if a is None else a.tolist() for a in sent] == [None if a is None else a.tolist() for a in expected]
    assert len(policy.calls) == len(questions)
    for (_, prefix, delay), (rest, expected_delay) in zip(policy.calls, questions, strict=True):
        if mode == "async" or not rest:
            assert prefix is None and delay == 0
        else:
            assert prefix is not None
            np.testing.assert_array_equal(prefix, rest)
            assert delay == expected_delay
    held = sum(action is None for action in expected)
    assert sum(realtime.statistics.held.values()) == held and realtime.statistics.executed == ticks - held


@pytest.mark.parametrize("seed", range(2))
def test_ten_minutes_at_50_hz_without_a_stall(seed: int) -> None:
    """Latency 20 to 400 ms with 30 % jitter, chunks of a second; the first answer takes 1.5 s (a cold start)."""
    latencies = itertools.chain([1.5], iter(drawn(seed), None))
    realtime, clock, runner = made(Continuing(50), lambda: next(latencies), mode="rtc")
    sent = drive(realtime, clock, 10 * 60 * 50)
    found = realtime.statistics
    assert found.ticks == 30_000 and found.stalls == 0 and set(found.held) == {"first"} and found.held["first"] == 75
    assert not set(found.events) - {"underestimated"}
    reactions, latency = np.array(found.reactions), np.array([late for _, late in runner.asked[: len(found.reactions)]])
    assert len(reactions) == found.chunks and (reactions / (latency + 1 / 50)).max() <= 1 + 1e-6  # the bar is 1.3
    assert max(found.delays) <= 21
    steps = np.abs(np.diff(np.concatenate([a for a in sent if a is not None])))
    matched = 1 - found.events["underestimated"] / found.chunks
    assert matched > 0.85  # of the answers came within the largest of the last ten delays
    assert np.quantile(steps, matched) <= 0.1 + 1e-9


@given(
    base=st.floats(0.0, 0.4), jitter=st.floats(0, 0.3), rate=st.sampled_from([10.0, 20.0, 50.0]), horizon=st.integers(1, 10),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_stall_while_the_delay_fits_the_chunk(base: float, jitter: float, rate: float, horizon: int, seed: int) -> None:
    """d <= H - s: the bound of real-time chunking, where s is the delay before, or the horizon if that is longer."""
    worst = math.floor(base * (1 + jitter) * rate + 1e-6) + 1
    rng = np.random.default_rng(seed)
    realtime, clock, _ = made(
        Continuing(worst + max(worst, horizon)), lambda: base * (1 + jitter * rng.uniform(-1, 1)), rate, mode="rtc", horizon=horizon
    )
    drive(realtime, clock, 400)
    assert realtime.statistics.stalls == 0
    assert all(reaction <= base * (1 + jitter) + 1 / rate + 1e-9 for reaction in realtime.statistics.reactions)


def test_a_chunk_that_continues_its_prefix_changes_without_a_jump() -> None:
    realtime, clock, _ = made(Continuing(50), lambda: 0.19, mode="rtc", horizon=5)
    sent = [a for a in drive(realtime, clock, 2000) if a is not None]
    assert realtime.statistics.events["underestimated"] == 0 and realtime.statistics.chunks > 100
    assert np.abs(np.diff(np.concatenate(sent))).max() <= 0.1 + 1e-9
    plain, clock, _ = made(Asked(50, 1), lambda: 0.2, mode="async", horizon=5)
    drive(plain, clock, 2000)
    assert np.max(np.stack(list(plain.statistics.jumps))) > 1  # what the prefix is for


@pytest.mark.parametrize("silence", [0.1, 4.0])
def test_a_server_that_dies_means_hold_and_never_a_jump(silence: float) -> None:
    """It dies after 2 s and lives again after 8 s, with a plan far away from where the robot held; errors come after ``silence``."""
    policy = Continuing(50)

    def infer(observation: Any, prefix: np.ndarray | None = None, delay: int = 0) -> np.ndarray:
        if 2 <= clock.now() < 8:
            raise RuntimeError("connection lost")
        return policy(observation, prefix, delay) + (30 if clock.now() >= 8 else 0)

    guard = Guard(ActionLimits([Dimension("joint", mode="absolute", velocity=5.0, state=0)]), 50.0)
    realtime, clock, _ = made(infer, lambda: silence if 2 <= clock.now() < 8 else 0.1, mode="rtc", guard=guard)
    sent = drive(realtime, clock, 15 * 50)
    numbers = np.array([math.nan if a is None else float(a[0]) for a in sent])
    assert not np.isnan(numbers).any()
    assert np.abs(np.diff(numbers)).max() <= 0.1 + 1e-9
    stopped = numbers[int(3.1 * 50) : 8 * 50]  # chunks are a second long
    assert (stopped == stopped[0]).all() and realtime.statistics.held["empty"] >= 200
    event, problem = ("error", "RuntimeError: connection lost") if silence < 1 else ("late", "see whether the server is alive")
    assert realtime.statistics.events[event] > 0 and problem in realtime.problem
    assert realtime.why is None and numbers[-1] > stopped[0] + 5


def test_a_stale_chunk_stops() -> None:
    answers = iter([0.1, 1e9])
    realtime, clock, _ = made(Asked(100), lambda: next(answers, 1e9), mode="async", horizon=1, stale=0.5)
    sent = drive(realtime, clock, 60)
    assert [n for n, action in enumerate(sent) if action is not None] == list(range(5, 26))  # seen at 0, executed until 0.5 s
    assert realtime.why in ("stale", "empty") and realtime.statistics.held["stale"] == 1
    assert realtime.statistics.events["late"] >= 1


def test_an_answer_that_is_too_late_is_not_used() -> None:
    answers = iter([3.0])
    realtime, clock, _ = made(Asked(50), lambda: next(answers, 0.05), mode="async")
    sent = drive(realtime, clock, 160)
    assert realtime.statistics.events["stale"] == 1 and "an answer took 3.00 s" in realtime.problem
    assert sum(action is not None for action in sent) > 0 and all(action is None for action in sent[:153])


def test_observations_that_stop_mean_hold() -> None:
    guard = Guard(ActionLimits([Dimension("dx", mode="relative"), Dimension("gripper", mode="absolute")]), 50.0)
    realtime, clock, runner = made(Asked(50), lambda: 0.1, guard=guard, watchdog=Watchdog(0.2))
    sent = drive(realtime, clock, 200, seen=lambda n: n < 50 or n >= 150)
    assert realtime.statistics.held["starved"] == pytest.approx(90, abs=1)  # 0.2 s after the last one, until the next
    still = sent[65:150]
    assert all(action is not None and action[0] == 0 for action in still)
    assert sent[60] is not None and {float(action[1]) for action in still if action is not None} == {float(sent[60][1])}
    assert not [when for when, _ in runner.asked if 1.0 <= when < 3.0]
    assert realtime.why is None and realtime.statistics.held["first"] == 10  # twice until the first answer: nothing seen before is used


def test_an_observation_that_is_not_newer_is_none() -> None:
    """A camera that repeats its last frame."""
    realtime, clock, runner = made(Asked(50), lambda: 0.05, watchdog=Watchdog(0.2))
    for n in range(50):
        clock.time = n / 50
        realtime.tick({"state": None}, taken=min(clock.time, 0.3))
    assert realtime.why == "starved" and max(when for when, _ in runner.asked) <= 0.3


def test_sync_executes_the_horizon_then_waits() -> None:
    policy = Asked(8)
    realtime, clock, _ = made(policy, lambda: 0.1, mode="sync", horizon=4)
    sent = drive(realtime, clock, 90)
    acted = [action.tolist() for action in sent if action is not None]
    assert acted == [row for answer in policy.answers for row in answer[:4].tolist()][: len(acted)]
    assert [n for n, action in enumerate(sent) if action is not None][:9] == [5, 6, 7, 8, 14, 15, 16, 17, 23]
    assert realtime.statistics.stalls > 40 and all(prefix is None for _, prefix, _ in policy.calls)
    slow, clock, _ = made(Asked(8), lambda: 3.0, mode="sync")
    drive(slow, clock, 400)
    assert slow.statistics.executed == 2 * 8  # a slow server is no reason never to move


@given(latencies=st.lists(st.floats(0, 0.3), min_size=1, max_size=8), horizon=st.integers(1, 5), decay=st.sampled_from([0.01, 0.0, -0.5]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_ensemble_weighs_all_that_covers_an_action(latencies: list[float], horizon: int, decay: float) -> None:
    policy, endless = Asked(20), itertools.cycle(latencies)
    realtime, clock, _ = made(policy, lambda: next(endless), mode="ensemble", horizon=horizon, decay=decay, stale=1e3)
    sent = drive(realtime, clock, 100)
    done, asked, again = 0, -99, itertools.cycle(latencies)
    answers, waiting, there = iter(policy.answers), None, []
    for tick, action in enumerate(sent):
        if waiting is not None and tick / 50 >= waiting[0]:
            there.append(waiting[1:])
            waiting = None
        said = [chunk[done - first] for first, chunk in there if done < first + 20]
        if waiting is None and (not said or tick - asked >= horizon):
            waiting, asked = (tick / 50 + next(again), done, next(answers)), tick
        if not said:
            assert action is None
            continue
        weights = np.exp(-decay * np.arange(len(said)))
        np.testing.assert_allclose(action, np.average(said, axis=0, weights=weights))
        done += 1


def test_fast_answers_at_every_tick() -> None:
    """The understanding at its own period stays in the server (a phase's `period`); the client asks at the control rate."""
    policy = Asked(10)
    realtime, clock, runner = made(policy, lambda: 0.003, mode="async")
    sent = drive(realtime, clock, 500)
    assert len(runner.asked) == 500 and realtime.statistics.stalls == 0 and realtime.statistics.held["first"] == 1
    assert all(action is not None for action in sent[1:])
    np.testing.assert_array_equal(sent[1], policy.answers[0][0])  # the robot held until then, so none was executed
    np.testing.assert_array_equal(sent[300], policy.answers[299][1])
    assert set(realtime.statistics.delays) == {1}
    assert max(realtime.statistics.reactions) <= 0.02 + 1e-9
    every, clock, runner = made(Asked(10), lambda: 0.003, mode="async", horizon=4)
    drive(every, clock, 401)
    assert len(runner.asked) == pytest.approx(100, abs=1) and every.statistics.stalls == 0


def test_the_delay_is_the_largest_of_the_last() -> None:
    latencies = iter([1.0, 0.3, 0.1, 0.1, 0.1, 0.1])
    policy = Asked(200)
    realtime, clock, _ = made(policy, lambda: next(latencies, 0.1), mode="rtc", horizon=50, window=3, longest=12)
    drive(realtime, clock, 500)
    assert [delay for _, _, delay in policy.calls][:8] == [0, 12, 12, 12, 12, 5, 5, 5]
    assert list(realtime.statistics.delays)[:3] == [15, 5, 5] and realtime.delay == 5
    assert realtime.statistics.events["underestimated"] == 1


def test_chunks_fade_into_each_other() -> None:
    level = itertools.count()
    plain, clock, _ = made(lambda observation, prefix, delay: np.full((30, 1), next(level)), lambda: 0.1, mode="async", horizon=10)
    hard = np.concatenate([a for a in drive(plain, clock, 200) if a is not None])
    level = itertools.count()
    faded, clock, _ = made(lambda observation, prefix, delay: np.full((30, 1), next(level)), lambda: 0.1, mode="async", horizon=10, blend=3)
    soft = np.concatenate([a for a in drive(faded, clock, 200) if a is not None])
    assert np.abs(np.diff(hard)).max() == 1 and np.abs(np.diff(soft)).max() == pytest.approx(0.25)
    assert np.unique(hard).tolist() == [x for x in np.unique(soft).tolist() if x == int(x)]
    with pytest.raises(ValueError, match="not blended in mode 'ensemble'"):
        made(Asked(2), lambda: 0.1, mode="ensemble", blend=1)


def test_a_reset_uses_nothing_of_before() -> None:
    policy = Asked(50)
    realtime, clock, _ = made(policy, lambda: 0.09)
    drive(realtime, clock, 52)
    answered = len(policy.answers)
    realtime.reset()
    sent = drive(realtime, clock, 20)
    assert [action is None for action in sent[:6]] == [True] * 5 + [False]
    np.testing.assert_array_equal(sent[5], policy.answers[answered][0])
    assert realtime.statistics.ticks == 20 and realtime.delay == 5


WRONG: dict[str, tuple[Any, str]] = {
    "flat": (np.zeros(3), r"shape \(steps, dimensions\)"),
    "nan": (np.full((4, 2), np.nan), "not finite"),
    "size": (np.zeros((4, 3)), "has 3 dimensions, and those before it had 2"),
    "empty": ({"plan": 1}, "no `actions`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_no_chunk_is_an_error_and_the_robot_goes_on(name: str) -> None:
    wrong, message = WRONG[name]
    good = Asked(50)
    realtime, clock, runner = made(lambda o, prefix, delay: wrong if len(runner.asked) == 2 else good(o), lambda: 0.1, mode="async")
    drive(realtime, clock, 100)
    assert realtime.statistics.events == {"error": 1} and realtime.statistics.stalls == 0
    with pytest.raises(ValueError, match=message):
        raise ValueError(realtime.problem)


def test_what_is_asked_for_wrongly() -> None:
    with pytest.raises(ValueError, match="no mode 'fast'; modes are sync, async, rtc, ensemble"):
        made(Asked(2), lambda: 0.1, mode="fast")
    with pytest.raises(ValueError, match="must be above 0"):
        made(Asked(2), lambda: 0.1, rate=0.0)


def test_statistics_are_plain() -> None:
    realtime, clock, _ = made(Asked(50), lambda: 0.1, mode="async")
    drive(realtime, clock, 100)
    found = realtime.statistics.summary()
    assert found["delays"]["p50"] == 5 and found["reactions"]["p100"] == pytest.approx(0.1, abs=0.02)
    assert found["stalls"] == 0 and len(found["largest_jump"]) == 2 and found["held"] == {"first": 5}


def test_threads_never_make_a_tick_wait() -> None:
    """Real threads: one question hangs, the control loop goes on, and a failing one is an answer too."""
    release = threading.Event()

    def infer(observation: Any, prefix: np.ndarray | None = None, delay: int = 0) -> np.ndarray:
        if observation["n"] == 0:
            release.wait(10)
        return np.zeros((5, 1))

    realtime = Realtime(infer, 1000.0, mode="async")
    began = time.monotonic()
    assert all(realtime.tick({"n": n}) is None for n in range(50))
    assert time.monotonic() - began < 1
    release.set()
    until = time.monotonic() + 10
    while realtime.tick({"n": 1}) is None and time.monotonic() < until:
        time.sleep(0.001)
    assert realtime.statistics.executed == 1

    def fails() -> None:
        raise KeyError("lost")

    answer = Threads().submit(fails)
    while not answer.done():
        time.sleep(0.001)
    assert isinstance(answer.exception(), KeyError)


def test_hung_questions_are_few() -> None:
    realtime, clock, runner = made(Asked(5), lambda: 1e9, stale=0.1)
    drive(realtime, clock, 500)
    assert len(runner.asked) == 3 and realtime.statistics.held["first"] == 500


def test_a_paced_loop_leaves_out_what_it_missed() -> None:
    clock = Clock()
    ticks: Iterator[float] = paced(10.0, clock)
    times = []
    for n, now in enumerate(itertools.islice(ticks, 8)):
        times.append(round(now, 6))
        clock.time += 0.35 if n == 2 else 0.02
    assert times == [0.0, 0.1, 0.2, 0.55, 0.65, 0.75, 0.85, 0.95]

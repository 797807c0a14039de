"""``vla client``: a body driven by a policy behind a server, on the wall clock, and what came of it."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from triune_client import ActionLimits, Client, Guard, ServerError, Watchdog
from triune_client.realtime import Clock, Monotonic, Realtime, paced
from triune_client.wire import WireError

from ..data import Observation
from ..errors import UserError
from .bodies import Body
from .statistics import smoothness, wilson

Mode = Literal["auto", "sync", "async", "rtc", "ensemble"]


@dataclass
class Drive:
    """One episode.

    Attributes:
        success: ``None`` where the body does not know.
        seconds: how long it took; ticks, executed: turns of the control loop, and those in which an action was sent.
        stalls: ticks in which the robot had to hold although it had begun; late: ticks over one and a half periods after the one before.
        held: why it held -> ticks. events: of the executor and of the guard -> how often.
        reaction_ms, delay_ms, jitter_ms: p50, p95, p99 of the time from an observation to the first action computed from it, from a
            question to its answer's effect, and of how much longer than a period two ticks were apart.
        smoothness: mean squared third difference of what was sent; see ``statistics.smoothness``.
        facts: what else the body says.
    """

    seed: int
    success: bool | None = None
    seconds: float = 0.0
    ticks: int = 0
    executed: int = 0
    stalls: int = 0
    late: int = 0
    held: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    reaction_ms: dict[str, float] = field(default_factory=dict)
    delay_ms: dict[str, float] = field(default_factory=dict)
    jitter_ms: dict[str, float] = field(default_factory=dict)
    smoothness: float | None = None
    problem: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """How a body is driven.

    Attributes:
        mode: ``sync`` waits for each answer, in which a simulator stands still; the others never do (``triune_client.realtime``). ``auto``
            is ``rtc`` where the policy goes on from what is left of a chunk, else ``async``.
        executed: actions of a chunk between two questions; in ``sync`` the policy's own unless given, else as soon as an answer is there.
        seconds: after which an episode that did not end by itself is ended.
        rate: control rate in Hz, where it is not the body's.
        guarded: whether actions are kept inside the server's limits here too, where they leave for the robot.
        starved: seconds without an observation after which the robot holds.
        sends: whether the body gets the actions; without, all is computed and checked and the robot stays where it is.
        latency: seconds that every answer is counted as taking, on a clock of its own (``Pretended``) instead of the wall's.
    """

    mode: Mode = "auto"
    executed: int | None = None
    seconds: float = 60.0
    rate: float | None = None
    guarded: bool = True
    starved: float = 1.0
    sends: bool = True
    latency: float | None = None


class Pretended:
    """A clock that moves only when somebody sleeps, and answers that take ``latency`` seconds of it: what a delay costs, however busy this
    machine is. The same seeds give the same episodes."""

    def __init__(self, latency: float) -> None:
        self.latency, self.time = latency, 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def submit(self, work: Callable[[], Any]) -> "_Due":
        """The answer of ``work``, which is done here and now."""
        answer = Future[Any]()
        try:
            answer.set_result(work())
        except (ConnectionError, TimeoutError, ServerError, WireError) as error:
            answer.set_exception(error)
        return _Due(self, self.time + self.latency, answer)


@dataclass(frozen=True)
class _Due:
    """An answer that is there from a moment on."""

    clock: Pretended
    at: float
    answer: Future[Any]

    def done(self) -> bool:
        return self.clock.time >= self.at - 1e-9  # ticks are sums of periods

    def result(self) -> Any:
        return self.answer.result()

    def exception(self) -> BaseException | None:
        return self.answer.exception()


def drive(
    body: Body,
    client: Client,
    loop: Loop,
    seeds: Iterable[int],
    clock: Clock | None = None,
    told: Callable[[Drive], None] | None = None,
) -> list[Drive]:
    """Drive ``body`` for one episode per seed.

    Args:
        told: called after each episode.

    Raises:
        UserError: the body's control rate is not the policy's, it does not go on from what is left as ``rtc`` asks, the server refuses, or
            a latency is pretended for a body whose time goes on.
    """
    pretended = None if loop.latency is None else Pretended(loop.latency)
    if pretended is not None and not body.waits:
        raise UserError(f"{body.name} moves in real time, in which no latency can be pretended; leave --latency out")
    clock = clock or pretended or Monotonic()
    welcome, rate, mode = client.welcome, loop.rate or body.rate, mode_of(client, loop)
    if welcome.rate and welcome.rate != rate:
        raise UserError(
            f"the policy answers for {welcome.rate:g} Hz and {body.name} is driven at {rate:g} Hz: actions would be too fast or too slow; "
            f"drive it at {welcome.rate:g} Hz (--rate), or serve a policy of {rate:g} Hz"
        )
    guard = Guard(ActionLimits.from_dict(welcome.limits), rate) if loop.guarded and welcome.limits is not None else None
    horizon = loop.executed or (welcome.executed if mode == "sync" else None)
    deadline = None if mode == "sync" or pretended else welcome.chunk / rate + 1.0  # then nothing of it is left to be executed
    robot = Realtime(
        lambda seen, prefix, delay: client.infer(_words(seen["observation"]), prefix=prefix, delay=delay, deadline=deadline),
        rate,
        mode=mode,
        horizon=horizon,
        longest=None if welcome.guided else welcome.prefix,
        guard=guard,
        watchdog=Watchdog(loop.starved),
        clock=clock,
        runner=pretended,
    )
    drives = []
    for seed in seeds:
        drives.append(_episode(body, client, robot, loop, rate, seed, clock))
        if told is not None:
            told(drives[-1])
    return drives


def mode_of(client: Client, loop: Loop) -> str:
    """The mode that ``loop`` comes to for the policy of a server.

    Raises:
        UserError: it is ``rtc``, and the policy goes on from nothing.
    """
    goes_on = client.welcome.guided or client.welcome.prefix > 0
    if loop.mode == "rtc" and not goes_on:
        raise UserError(f"{client.welcome.policy} does not go on from what is left of a chunk, as rtc asks; take --mode async or ensemble")
    return ("rtc" if goes_on else "async") if loop.mode == "auto" else loop.mode


def _episode(body: Body, client: Client, robot: Realtime, loop: Loop, rate: float, seed: int, clock: Clock) -> Drive:
    try:
        client.reset(seed=seed)
    except ServerError as error:
        raise UserError(str(error)) from None
    body.begin(seed)
    robot.reset()
    before = dict(robot.guard.totals) if robot.guard is not None else {}
    sent: list[np.ndarray] = []
    lateness: list[float] = []
    begun = last = clock.now()
    for now in paced(rate, clock):
        if body.over or now - begun > loop.seconds:
            break
        lateness.append(max(0.0, now - last - 1 / rate))
        last = now
        seen = body.look()
        action = robot.tick({"observation": seen, "state": seen.state}, now)
        if robot.why is None:
            assert action is not None, "without a reason to hold there is an action"
            if loop.sends:
                body.act(action)
            sent.append(action)
        elif loop.sends and not (body.waits and (robot.why == "first" or robot.mode == "sync")):
            body.hold(action)
    counted, guarded = robot.statistics, robot.guard.totals if robot.guard is not None else {}
    events = {f"guard {kind}": count - before.get(kind, 0) for kind, count in guarded.items() if count > before.get(kind, 0)}
    return Drive(
        seed=seed,
        success=body.success,
        seconds=round(clock.now() - begun, 3),
        ticks=counted.ticks,
        executed=counted.executed,
        stalls=counted.stalls,
        late=sum(late > 0.5 / rate for late in lateness),
        held=dict(counted.held),
        events=dict(counted.events) | events,
        reaction_ms=_quantiles([1e3 * s for s in counted.reactions]),
        delay_ms=_quantiles([1e3 * steps / rate for steps in counted.delays]),
        jitter_ms=_quantiles([1e3 * s for s in lateness]),
        smoothness=smoothness(np.stack(sent), body.contract.action.names) if sent else None,
        problem=robot.problem or None,
        facts=body.facts(),
    )


def summary(body: Body, client: Client, loop: Loop, drives: list[Drive]) -> dict[str, Any]:
    """All episodes together: JSON for machines."""
    judged = [d.success for d in drives if d.success is not None]
    ticks = sum(d.ticks for d in drives)
    total: dict[str, Any] = {
        "episodes": len(drives),
        "ticks": ticks,
        "stalls": sum(d.stalls for d in drives),
        "late": sum(d.late for d in drives),
        "stalled_share": round(sum(d.stalls for d in drives) / ticks, 4) if ticks else None,
    }
    for name in ("reaction_ms", "delay_ms", "jitter_ms"):
        found = [getattr(d, name) for d in drives if getattr(d, name)]
        if found:
            total[f"{name} p50"] = round(float(np.median([quantiles["p50"] for quantiles in found])), 1)
            total[f"{name} p99, worst episode"] = max(quantiles["p99"] for quantiles in found)
    smooth = [d.smoothness for d in drives if d.smoothness is not None]
    total |= {"smoothness": float(np.mean(smooth))} if smooth else {}
    if judged:
        total |= {"successes": sum(judged), "rate": sum(judged) / len(judged), "ci95": list(wilson(sum(judged), len(judged)))}
    welcome = client.welcome
    server = {"url": client.url, "server": welcome.server, "policy": welcome.policy}
    return {
        "body": body.name,
        **server,
        **asdict(loop),
        "mode": mode_of(client, loop),
        "total": total,
        "episodes": [asdict(d) for d in drives],
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 95, 99)} if values else {}


def _words(seen: Observation) -> dict[str, Any]:
    """An observation as the wire has it."""
    return {"images": seen.images, "state": seen.state, "instruction": seen.instruction, "timestamp": seen.timestamp}

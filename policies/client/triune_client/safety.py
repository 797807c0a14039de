"""What may be sent to a robot: limits of actions, the guard that keeps them, the watchdog over observations. numpy only, no I/O.

A dimension of an action is *absolute* (the number is where to go), *relative* (the number is the step to take from where the robot is) or
unknown. What a limit means follows from that; ``dt`` is one control period:

============== ===================================================== ======================================================================
limit          absolute                                              relative
============== ===================================================== ======================================================================
min, max       of the number                                         of the number: of one step
low, high      of the number (workspace)                             of the reported state, plus ``scale`` x the steps sent since then
velocity       change of the number / dt                             the step / dt
acceleration   change of that velocity / dt                          the same
hold           the last number sent, or the reported state           no step
============== ===================================================== ======================================================================

Limits are positions first, then velocity, then acceleration: what is inside its positions never leaves them, and brakes in time where an
acceleration is given. What is outside, for it was put there by hand, is led back no faster than velocity and acceleration allow, and a
relative dimension is never forced to move, only kept from going further out. The same action limited twice is the same as limited once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

MODES = ("absolute", "relative", None)
UNCOUNTED = 1e-6
"""Changes smaller than this, relative to the number where that is above 1, are rounding and count as no event."""
LARGEST = float(np.finfo(np.float64).max)
EVERYTHING = np.array(-np.inf), np.array(np.inf)


@dataclass(frozen=True)
class Dimension:
    """Limits of one action dimension, in ``unit``, per second and per second squared; ``None`` is no limit.

    Attributes:
        mode: ``absolute``, ``relative``, or ``None``: unknown; then only ``min`` and ``max`` can be kept, and nothing can be held.
        state: the dimension of the state that reports where this one is.
        scale: one ``unit`` of the action in the unit of that state.
        low, high: the workspace, in the unit of the state.

    Raises:
        ValueError: one sentence that names the dimension.
    """

    name: str
    unit: str | None = None
    mode: str | None = None
    min: float | None = None
    max: float | None = None
    velocity: float | None = None
    acceleration: float | None = None
    state: int | None = None
    scale: float = 1.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{self.name}: mode is {self.mode!r}; say absolute, relative or nothing")
        for key in ("min", "max", "velocity", "acceleration", "scale", "low", "high"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
                raise ValueError(f"{self.name}: {key} is {value!r}; give a finite number or leave it out")
        for key in ("velocity", "acceleration", "scale"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ValueError(f"{self.name}: {key} is {getattr(self, key):g}; it must be above 0")
        if self.state is not None and (isinstance(self.state, bool) or not isinstance(self.state, int) or self.state < 0):
            raise ValueError(f"{self.name}: state is {self.state!r}; give the index of a state dimension")
        lows, highs = [_or(self.min, -math.inf)], [_or(self.max, math.inf)]
        if self.mode == "relative":
            if lows[0] > 0 or highs[0] < 0:
                raise ValueError(f"{self.name}: a step of 0 is outside min and max, so the robot could never stand still")
            if (self.low is not None or self.high is not None) and self.state is None:
                raise ValueError(f"{self.name}: a workspace of steps needs the state dimension that says where the robot is")
        elif self.mode is None and any(v is not None for v in (self.velocity, self.acceleration, self.low, self.high)):
            raise ValueError(f"{self.name}: say whether it is absolute or relative; without, only min and max have a meaning")
        else:
            lows.append(_or(self.low, -math.inf))
            highs.append(_or(self.high, math.inf))
        if max(lows) > min(highs) or _or(self.low, -math.inf) > _or(self.high, math.inf):
            raise ValueError(f"{self.name}: no number is inside its limits")


class ActionLimits:
    """Limits of all dimensions of an action, in order.

    Args:
        dimensions: one for each dimension.
        source: where the numbers come from, in words.

    Raises:
        ValueError: there are no dimensions.
    """

    def __init__(self, dimensions: Sequence[Dimension], source: str = "") -> None:
        if not dimensions:
            raise ValueError("action limits need at least one dimension")
        self.dimensions = tuple(dimensions)
        self.source = source
        self.relative = np.array([d.mode == "relative" for d in dimensions])
        self.known = np.array([d.mode is not None for d in dimensions])
        self.state = np.array([-1 if d.state is None else d.state for d in dimensions])
        self.scale = np.array([d.scale for d in dimensions])
        self.min, self.max = self._column("min", -np.inf), self._column("max", np.inf)
        self.low, self.high = self._column("low", -np.inf), self._column("high", np.inf)
        self.velocity, self.acceleration = self._column("velocity", np.inf), self._column("acceleration", np.inf)

    @property
    def size(self) -> int:
        return len(self.dimensions)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> ActionLimits:
        """
        Args:
            tree: ``{"dimensions": [{"name": ..., fields of Dimension}, ...], "source": words}``, as ``to_dict`` gives it.

        Raises:
            ValueError: a sentence about what is wrong.
        """
        known = {field.name for field in fields(Dimension)}
        rows = tree.get("dimensions")
        if set(tree) - {"dimensions", "source"} or not isinstance(rows, (list, tuple)):
            raise ValueError("action limits are a mapping of `dimensions`, a list with one mapping for each, and `source`")
        for row in rows:
            if not isinstance(row, Mapping) or not isinstance(row.get("name"), str) or set(row) - known:
                others = ", ".join(sorted(known - {"name"}))
                raise ValueError(f"{row!r} is no dimension of action limits; it has a name and may have {others}")
        return cls([Dimension(**row) for row in rows], str(tree.get("source", "")))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not limited is left out."""
        rows = [{key: value for key, value in asdict(d).items() if value is not None} for d in self.dimensions]
        return {"dimensions": rows, "source": self.source}

    def _column(self, key: str, absent: float) -> np.ndarray:
        return np.array([_or(getattr(d, key), absent) for d in self.dimensions], dtype=np.float64)


class Event(NamedTuple):
    """An action was changed, or a limit could not be checked.

    Attributes:
        kind: ``nan``, ``position``, ``workspace``, ``velocity``, ``acceleration``; ``unchecked``: the workspace of a relative dimension,
            since the state was never reported.
        name: the action dimension; the first that was not finite, where kind is ``nan``.
        wanted, allowed: the number before and after.
    """

    kind: str
    name: str
    wanted: float
    allowed: float
    unit: str | None

    @property
    def sentence(self) -> str:
        if self.kind == "nan":
            return f"the action is not finite in {self.name}; the robot holds"
        if self.kind == "unchecked":
            return f"the workspace of {self.name} is not checked until the state says where it is"
        unit = "" if not self.unit or self.unit == "1" else f" x {self.unit}" if self.unit[0].isdigit() else f" {self.unit}"
        return f"{self.name}: {self.wanted:.6g}{unit} is over its {self.kind} limit; {self.allowed:.6g}{unit} is sent"


class _Memory(NamedTuple):
    """What the robot was sent: ``last`` (A,) numbers, NaN before the first; ``before`` (A,) the step that led there; ``place`` (A,) where
    it is, in the state's unit, NaN where unknown."""

    last: np.ndarray
    before: np.ndarray
    place: np.ndarray


class Guard:
    """Keeps what is sent inside ``limits``. One for each robot, where its actions leave for it.

    Args:
        limits: of the actions.
        rate: actions per second.

    Attributes:
        counts: (kind, name) -> events so far.
    """

    def __init__(self, limits: ActionLimits, rate: float) -> None:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"the control rate is {rate}; velocities need one above 0 Hz")
        self.limits, self.rate = limits, float(rate)
        self._reach, self._change = limits.velocity / rate, limits.acceleration / rate**2
        self._slows, self._brakes = (bool(np.isfinite(most).any()) for most in (self._reach, self._change))
        self._boxed = limits.relative & (np.isfinite(limits.low) | np.isfinite(limits.high))
        self._steps, self._places = bool(limits.relative.any()), bool(self._boxed.any())
        self.counts: Counter[tuple[str, str]] = Counter()
        self.reset()
        self._asks = int(limits.state.max())
        self._always: tuple[np.ndarray, np.ndarray] | None = None  # (lowest, highest) where they depend on nothing
        if not (self._slows or self._brakes or self._places):
            _, low, high = self._stages(self._memory)[-1]
            self._always = np.maximum(low, -LARGEST), np.minimum(high, LARGEST)

    @property
    def totals(self) -> dict[str, int]:
        """Events by kind."""
        found: Counter[str] = Counter()
        for (kind, _), count in self.counts.items():
            found[kind] += count
        return dict(found)

    def reset(self) -> None:
        """An episode begins: the robot stands still, and the state reported with the first action says where. Counts go on."""
        self._memory = self._begin()

    def check(self, action: np.ndarray, state: np.ndarray | None = None) -> tuple[np.ndarray | None, list[Event]]:
        """What to send now instead of ``action`` (A,), and why; it counts as sent.

        Args:
            state: (S,) the newest one; a dimension that was never sent starts from it, and workspaces of steps count from it.

        Returns:
            float64 (A,), and the events. ``None`` where the action is not finite and nobody knows what would hold the robot.

        Raises:
            ValueError: the action has another size, or the state lacks a dimension that the limits name.
        """
        memory = self._told(self._memory, state)
        safe, events = self._limit(self._shaped(action, 1), memory)
        self._memory = memory if safe is None else self._moved(memory, safe)
        self.counts.update((event.kind, event.name) for event in events)
        return safe, events

    def check_chunk(self, actions: np.ndarray, state: np.ndarray | None = None) -> tuple[np.ndarray | None, list[Event]]:
        """The same for actions (C, A) to come: each after those before it. They do not count as sent; the events count.

        Returns:
            float64 (C, A), or ``None`` where the first action is not finite and nothing is known to hold the robot.
        """
        given, actions = actions, self._shaped(actions, 2)
        if self._always is not None and _inside(actions, *self._always):
            return (actions.copy() if actions is given else actions), []
        memory = self._told(self._memory, state)
        chunk: np.ndarray | None
        chunk, events = self._passing(actions, memory)
        if len(chunk) < len(actions):
            found, memory = list(chunk), self._after(chunk, memory)
            for action in actions[len(found) :]:
                safe, new = self._limit(action, memory)
                events += new
                if safe is None:
                    break
                memory = self._moved(memory, safe)
                found.append(safe)
            chunk = np.stack(found) if len(found) == len(actions) else None
        self.counts.update((event.kind, event.name) for event in events)
        return chunk, events

    def hold(self, state: np.ndarray | None = None) -> np.ndarray | None:
        """The action (A,) that keeps the robot where it is, or brings it there within its acceleration; it counts as sent.

        ``None``: nothing is known to hold it (nothing was sent and no state reported, or a mode is unknown); send nothing.
        """
        memory = self._told(self._memory, state)
        safe = self._held(memory)
        self._memory = memory if safe is None else self._moved(memory, safe)
        return safe

    def sent(self, actions: np.ndarray, state: np.ndarray | None = None) -> None:
        """Actions (C, A) or (A,) went to the robot without ``check``, such as the executed part of a chunk that ``check_chunk`` gave for
        ``state``."""
        actions = np.atleast_2d(actions)
        if self._always is not None:
            actions = actions[-1:]  # nothing depends on those before
        actions = self._shaped(actions, 2)
        self._memory = self._after(actions, self._told(self._memory, state))

    def _begin(self) -> _Memory:
        unknown = np.full(self.limits.size, np.nan)
        return _Memory(unknown, np.zeros(self.limits.size), unknown)

    def _shaped(self, actions: np.ndarray, rank: int) -> np.ndarray:
        found = np.asarray(actions, dtype=np.float64)
        if found.ndim != rank or found.shape[-1] != self.limits.size:
            names = ", ".join(d.name for d in self.limits.dimensions)
            raise ValueError(f"actions have shape {found.shape}; the limits are of {self.limits.size} dimensions ({names})")
        return found

    def _told(self, memory: _Memory, state: np.ndarray | None) -> _Memory:
        """``memory`` with what ``state`` says; numbers in it that are not finite say nothing."""
        limits = self.limits
        if state is None or self._asks < 0:
            return memory
        state = np.asarray(state, dtype=np.float64)
        if state.ndim != 1 or self._asks >= len(state):
            raise ValueError(f"the state has shape {state.shape}; the limits name its dimension {self._asks}")
        said = np.where(limits.state >= 0, state[limits.state], np.nan)
        said[~np.isfinite(said)] = np.nan
        start = np.isnan(memory.last) & ~limits.relative & limits.known
        return memory._replace(last=np.where(start, said / limits.scale, memory.last), place=np.where(np.isnan(said), memory.place, said))

    def _moved(self, memory: _Memory, action: np.ndarray) -> _Memory:
        relative = self.limits.relative
        step = np.where(relative, action, action - memory.last)
        place = np.where(relative, memory.place + self.limits.scale * action, memory.place)
        return _Memory(action, np.where(np.isnan(step), 0.0, step), place)

    def _held(self, memory: _Memory) -> np.ndarray | None:
        still = np.where(self.limits.relative, 0.0, memory.last)
        if np.isnan(still).any() or not self.limits.known.all():
            return None
        return _clip(still, *self._stages(memory, widened=True)[-1][1:])

    def _after(self, actions: np.ndarray, memory: _Memory) -> _Memory:
        """``_moved`` by each of ``actions`` (C, A)."""
        if not len(actions):
            return memory
        if self._always is not None:  # nothing depends on more than where the robot is held
            return memory._replace(last=actions[-1].copy())
        relative, last = self.limits.relative, memory.last if len(actions) == 1 else actions[-2]
        step = np.where(relative, actions[-1], actions[-1] - last)
        place = self._along(actions, memory)[-1] if self._steps else memory.place
        return _Memory(actions[-1].copy(), np.where(np.isnan(step), 0.0, step), place)

    def _ahead(self, actions: np.ndarray, memory: _Memory) -> _Memory:
        """What will have been sent before each of ``actions`` (C, A), as far as ``_stages`` asks for it."""
        last, before, place = np.concatenate([memory.last[None], actions[:-1]]), memory.before, memory.place
        if self._brakes:
            steps = np.where(self.limits.relative, actions, actions - last)[:-1]
            before = np.concatenate([memory.before[None], np.where(np.isnan(steps), 0.0, steps)])
        if self._places:
            place = self._along(actions, memory)[:-1]
        return _Memory(last, before, place)

    def _along(self, actions: np.ndarray, memory: _Memory) -> np.ndarray:
        """Where the robot is before each of ``actions`` (C, A) and after the last one: (C + 1, A)."""
        return np.concatenate([memory.place[None], np.where(self.limits.relative, self.limits.scale * actions, 0.0)]).cumsum(0)

    def _passing(self, actions: np.ndarray, memory: _Memory) -> tuple[np.ndarray, list[Event]]:
        """The first of ``actions`` (C, A), those to which nothing but ``min`` and ``max`` is done, and the events of that."""
        if self._unseen(memory).any() or not len(actions):
            return actions[:0], []
        inside = _clip(actions, self.limits.min, self.limits.max)
        low, high = self._always or self._stages(self._ahead(inside, memory))[-1][1:]
        fine = np.isfinite(actions) & (low <= inside) & (inside <= high)
        count = len(fine) if fine.all() else int(fine.all(1).argmin())
        inside, actions = inside[:count], actions[:count]
        rows, events = self.limits.dimensions, []
        if (inside != actions).any():
            for k, i in np.argwhere(_differ(inside, actions)):
                events.append(Event("position", rows[i].name, float(actions[k, i]), float(inside[k, i]), rows[i].unit))
        return inside, events

    def _unseen(self, memory: _Memory) -> np.ndarray:
        """(A,) whether there is a workspace of steps, and no state said where they begin."""
        return self._boxed & np.isnan(memory.place)

    def _limit(self, action: np.ndarray, memory: _Memory) -> tuple[np.ndarray | None, list[Event]]:
        rows, wrong = self.limits.dimensions, np.flatnonzero(~np.isfinite(action))
        if len(wrong):
            first = rows[wrong[0]]
            safe = self._held(memory)
            allowed = np.nan if safe is None else float(safe[wrong[0]])
            return safe, [Event("nan", first.name, float(action[wrong[0]]), allowed, first.unit)]
        events = []
        for i in np.flatnonzero(self._unseen(memory)):
            events.append(Event("unchecked", rows[i].name, float(action[i]), float(action[i]), rows[i].unit))
        stages = self._stages(memory)
        safe = _clip(action, *stages[-1][1:])
        changed = _differ(safe, action)
        if changed.any():
            for kind, low, high in stages:
                limited = _clip(action, low, high)
                for i in np.flatnonzero(changed & _differ(limited, action)):
                    events.append(Event(kind, rows[i].name, float(action[i]), float(limited[i]), rows[i].unit))
                action = limited
        return safe, events

    def _stages(self, memory: _Memory, widened: bool = False) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(kind, lowest, highest) of the next action, the last of them being what may be sent; they do not depend on the action. Rows of a
        memory (C, A) are apart.

        Args:
            widened: positions include where the robot is, as holding it needs.
        """
        limits, relative = self.limits, self.limits.relative
        base = np.where(relative, 0.0, memory.last)  # the action that does not move the robot
        box = limits.low / limits.scale, limits.high / limits.scale
        if self._places:
            told = (limits.low - memory.place) / limits.scale, (limits.high - memory.place) / limits.scale
            unseen = np.isnan(memory.place)
            steps = np.where(unseen, -np.inf, np.minimum(told[0], 0.0)), np.where(unseen, np.inf, np.maximum(told[1], 0.0))
            box = np.where(relative, steps[0], box[0]), np.where(relative, steps[1], box[1])
        low, high = np.maximum(limits.min, box[0]), np.minimum(limits.max, box[1])
        if widened:
            low, high = np.fmin(low, base), np.fmax(high, base)
        slow = _around(base, -self._reach, self._reach) if self._slows else EVERYTHING
        within = last = _into((low, high), slow)
        if self._brakes:
            room = np.where(relative, -box[0], base - low), np.where(relative, box[1], high - base)
            stop = _around(base, -_braking(room[0], self._change), _braking(room[1], self._change))
            even = _into(_into(_around(base, memory.before - self._change, memory.before + self._change), slow), stop)
            kept, led_back = _into(even, within), _into((low, high), even)
            inside = ~((base < low) | (base > high))
            last = np.where(inside, kept[0], led_back[0]), np.where(inside, kept[1], led_back[1])
        return [
            ("position", limits.min, limits.max),
            ("workspace", low, high),
            ("velocity", within[0], within[1]),
            ("acceleration", last[0], last[1]),
        ]


class Watchdog:
    """Says when observations stopped.

    Args:
        timeout: seconds without a new one.
    """

    def __init__(self, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"the watchdog's timeout is {timeout}; it must be above 0 seconds")
        self.timeout = float(timeout)
        self.seen: float | None = None

    def reset(self) -> None:
        """Nothing was seen yet; what never began has not stopped."""
        self.seen = None

    def feed(self, now: float) -> None:
        """A new observation came at ``now`` (seconds)."""
        self.seen = now

    def starved(self, now: float) -> bool:
        """Whether the last observation is older than the timeout."""
        return self.seen is not None and now - self.seen > self.timeout


def _or(value: float | None, absent: float) -> float:
    return absent if value is None else value


def _clip(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(value, low), high)


def _inside(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether all are between both, which are finite: so are they."""
    return np.count_nonzero((actions >= low) & (actions <= high)) == actions.size


def _differ(safe: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Where the change from ``action`` is more than rounding."""
    return np.abs(safe - action) > UNCOUNTED * np.maximum(1.0, np.abs(action))


def _around(base: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An interval about ``base``; everything where that is unknown."""
    low, high, free = base + low, base + high, np.isnan(base)
    return (np.where(free, -np.inf, low), np.where(free, np.inf, high)) if free.any() else (low, high)


def _into(inner: tuple[np.ndarray, np.ndarray], outer: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The part of an interval that is inside another one; the nearest number of the other where they do not meet."""
    return _clip(inner[0], *outer), _clip(inner[1], *outer)


def _braking(room: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The largest step from which steps that shrink by ``change`` each come to rest within ``room``; infinite where either is.

    A step d and n after it, d - change, ..., d - n change, cover (n + 1) d - change n (n + 1) / 2; n is such that the last one is the first
    below ``change``.
    """
    bounded = np.isfinite(room) & np.isfinite(change)
    room, change = np.where(bounded, np.maximum(room, 0.0), 0.0), np.where(bounded, change, 1.0)
    n = np.floor((np.sqrt(1 + 8 * room / change) - 1) / 2)
    return np.where(bounded, (room + change * n * (n + 1) / 2) / (n + 1), np.inf)

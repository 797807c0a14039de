"""What a guard lets through: whatever the policy wants, positions, velocities and accelerations hold, and once is enough."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triune_client.safety import ActionLimits, Dimension, Guard, Watchdog

NUMBER = st.floats(-1e3, 1e3)
ANY = st.one_of(NUMBER, st.sampled_from([1e30, -1e30, 0.0]))
ABSOLUTE: dict[str, Any] = {"name": "joint", "unit": "degree", "mode": "absolute", "min": -10.0, "max": 10.0, "state": 0}
RELATIVE: dict[str, Any] = {"name": "dx", "unit": "0.05 m", "mode": "relative", "min": -1.0, "max": 1.0, "state": 0, "scale": 0.05}


def guard(*rows: dict[str, Any], rate: float = 10.0) -> Guard:
    return Guard(ActionLimits.from_dict({"dimensions": list(rows)}), rate)


def allowed(made: Guard, wanted: float, state: float | None = None) -> tuple[float, list[str]]:
    safe, events = made.check(np.array([wanted]), None if state is None else np.array([state]))
    assert safe is not None
    return float(safe[0]), [event.kind for event in events]


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """One dimension with some of all limits."""
    mode = draw(st.sampled_from(["absolute", "relative"]))
    row: dict[str, Any] = {"name": "d", "mode": mode, "state": 0, "scale": draw(st.sampled_from([1.0, 0.05, 57.3]))}
    ends = sorted(draw(st.tuples(NUMBER, NUMBER)))
    if draw(st.booleans()):
        row["min"], row["max"] = (min(ends[0], 0), max(ends[1], 0)) if mode == "relative" else ends
    if draw(st.booleans()) and (mode == "relative" or "min" not in row):
        row["low"], row["high"] = sorted(draw(st.tuples(NUMBER, NUMBER)))
    row |= {key: draw(st.floats(0.01, 1e3)) for key in ("velocity", "acceleration") if draw(st.booleans())}
    return row


@given(row=rows(), wanted=st.lists(ANY, min_size=1, max_size=25), start=NUMBER, rate=st.sampled_from([5.0, 20.0, 50.0]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_limits_hold_for_whatever_is_wanted(row: dict[str, Any], wanted: list[float], start: float, rate: float) -> None:
    made = guard(row, rate=rate)
    relative, scale = row["mode"] == "relative", row["scale"]
    low, high = (row.get("low", -math.inf), row.get("high", math.inf)) if relative else (
        max(row.get("min", -math.inf), row.get("low", -math.inf) / scale),
        min(row.get("max", math.inf), row.get("high", math.inf) / scale),
    )  # fmt: skip
    place = start if relative else start / scale
    reach, change = row.get("velocity", math.inf) / rate, row.get("acceleration", math.inf) / rate**2
    before, began_inside = 0.0, low <= place <= high
    for index, want in enumerate(wanted):
        safe, _ = allowed(made, want, start if index == 0 else None)
        step = safe if relative else safe - place
        size = max(1.0, abs(place), abs(safe), abs(start))
        assert abs(step) <= reach + 1e-9 * size
        if began_inside or not relative:
            assert abs(step - before) <= change + 1e-7 * size
        if relative:
            assert row.get("min", -math.inf) <= safe <= row.get("max", math.inf)
        now = place + scale * step if relative else safe
        slack = 1e-9 * size if relative else 0.0
        if low <= place <= high:
            assert low - slack <= now <= high + slack
        else:
            assert min(place, low) - slack <= now <= max(place, high) + slack  # no further out than it was
        place, before = now, step


@given(row=rows(), history=st.lists(ANY, max_size=4), want=ANY, state=st.one_of(st.none(), NUMBER))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_limiting_twice_is_limiting_once(row: dict[str, Any], history: list[float], want: float, state: float | None) -> None:
    first, second = guard(row), guard(row)
    told = None if state is None else np.array([state])
    for past in history:
        assert allowed(first, past, state) == allowed(second, past, state)
    once, _ = first.check(np.array([want]), told)
    assert once is not None
    twice, events = second.check(once, told)
    assert twice is not None
    assert float(twice[0]) == float(once[0])
    assert [e for e in events if e.kind != "unchecked"] == []


@given(data=st.data(), several=st.lists(rows(), min_size=1, max_size=4), count=st.integers(1, 10), small=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_dimensions_do_not_meet(data: st.DataObject, several: list[dict[str, Any]], count: int, small: bool) -> None:
    """Each dimension of a chunk is what a guard of its own makes of it."""
    wide = st.floats(-1, 1) if small else ANY
    many = [{**row, "name": f"d{i}", "state": i} for i, row in enumerate(several)]
    chunk = np.array([[data.draw(wide) for _ in many] for _ in range(count)])
    state = np.array([data.draw(NUMBER) for _ in many])
    told = state if data.draw(st.booleans()) else None
    safe, events = guard(*many).check_chunk(chunk, told)
    assert safe is not None
    alone = 0
    for i, row in enumerate(several):
        one, found = guard(row | {"state": 0}).check_chunk(chunk[:, i : i + 1], None if told is None else state[i : i + 1])
        assert one is not None
        np.testing.assert_array_equal(safe[:, i], one[:, 0])
        alone += len(found)
    assert alone == len(events)


@given(row=rows(), wanted=st.lists(ANY, min_size=1, max_size=10), state=NUMBER)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_chunk_is_its_actions_one_by_one(row: dict[str, Any], wanted: list[float], state: float) -> None:
    ahead, along = guard(row), guard(row)
    chunk, _ = ahead.check_chunk(np.array(wanted)[:, None], np.array([state]))
    assert chunk is not None
    singly = [allowed(along, want, state if i == 0 else None)[0] for i, want in enumerate(wanted)]
    np.testing.assert_array_equal(chunk[:, 0], singly)
    assert ahead.counts == along.counts
    ahead.sent(chunk[:1], np.array([state]))
    if len(chunk) > 1:
        rest, events = ahead.check_chunk(chunk[1:])
        np.testing.assert_array_equal(rest, chunk[1:])
        assert events == []


@given(data=st.data(), row=rows(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_not_finite_holds(data: st.DataObject, row: dict[str, Any], bad: float) -> None:
    made = guard(row, {"name": "grip", "mode": "absolute"})
    last, _ = made.check(np.array([data.draw(NUMBER), 0.5]), np.array([data.draw(NUMBER)]))
    wrong = np.array([bad, 0.1]) if data.draw(st.booleans()) else np.array([0.0, bad])
    held, events = made.check(wrong)
    assert last is not None and held is not None
    assert [event.kind for event in events] == ["nan"]
    assert held[1] == 0.5  # the whole action is distrusted
    if "acceleration" not in row:
        assert held[0] == (0.0 if row["mode"] == "relative" else last[0])


def test_nothing_known_means_nothing_sent() -> None:
    made = guard(ABSOLUTE)
    assert made.check(np.array([np.nan]))[0] is None and made.hold() is None
    assert made.check_chunk(np.array([[np.nan], [1.0]]))[0] is None
    assert made.totals == {"nan": 2}
    assert made.hold(np.array([3.0])) == np.array([3.0])  # where the state says that it is
    unknown = guard({"name": "d", "min": -1.0, "max": 1.0})
    assert allowed(unknown, 5.0) == (1.0, ["position"])
    assert unknown.hold() is None and unknown.check(np.array([np.nan]))[0] is None


def test_the_first_action_is_measured_from_the_state() -> None:
    made = guard(ABSOLUTE | {"velocity": 20.0})
    assert allowed(made, 9.0, 1.0) == (3.0, ["velocity"])
    assert allowed(made, 9.0, -8.0) == (5.0, ["velocity"])  # later ones from what was sent
    made.reset()
    assert allowed(made, 9.0, -8.0) == (-6.0, ["velocity"])
    unmeasured = guard({**ABSOLUTE, "velocity": 20.0, "state": None})
    assert allowed(unmeasured, 9.0, 1.0) == (9.0, [])


def test_an_arm_outside_is_led_back_slowly_and_held_where_it_is() -> None:
    made = guard(ABSOLUTE | {"velocity": 20.0})
    held = made.hold(np.array([15.0]))
    assert held is not None and held[0] == 15.0
    assert allowed(made, 30.0) == (13.0, ["position", "velocity"])
    assert [allowed(made, 30.0)[0] for _ in range(3)] == [11.0, 10.0, 10.0]


def test_it_brakes_before_a_limit() -> None:
    """At 10 Hz and 100 degrees/s^2 a step changes by 1 degree: 1, 2, 3, then as fast as it can stop again."""
    made = guard(ABSOLUTE | {"acceleration": 100.0})
    places = [0.0] + [allowed(made, 10.0, 0.0)[0] for _ in range(9)]
    steps = np.diff(places)
    assert steps[:3].tolist() == [1.0, 2.0, 3.0]
    assert np.abs(np.diff(steps, prepend=0)).max() <= 1 + 1e-12
    assert places[-1] == 10.0 and max(places) == 10.0
    running = guard(ABSOLUTE | {"acceleration": 100.0, "min": -100.0, "max": 100.0})
    gone = [allowed(running, 100.0, 0.0)[0] for _ in range(3)]
    stopped = [float(running.hold()[0]) for _ in range(3)]  # type: ignore[index]  # something was sent
    assert np.diff([gone[-1], *stopped]).tolist() == [2.0, 1.0, 0.0]


def test_the_workspace_of_steps_counts_from_the_report() -> None:
    made = guard(RELATIVE | {"low": -0.1, "high": 0.1})
    assert allowed(made, 1.0) == (1.0, ["unchecked"])
    safe, kinds = allowed(made, 1.0, 0.08)
    assert (round(safe, 9), kinds) == (0.4, ["workspace"])
    safe, kinds = allowed(made, 1.0)  # no report since: it is thought to be at the edge
    assert abs(safe) < 1e-12 and kinds == ["workspace"]
    assert allowed(made, -0.5, 0.2) == (-0.5, [])
    assert allowed(made, 0.5, 0.2) == (0.0, ["workspace"])  # outside: no further, and not pushed back
    assert allowed(made, 0.5, math.nan)[1] == ["workspace"]  # a state that is no number says nothing
    assert allowed(made, -0.5, -0.2) == (0.0, ["workspace"]) and allowed(made, 0.5, -0.2) == (0.5, [])
    assert allowed(made, 0.0, 0.2) == allowed(made, 0.0, -0.2) == (0.0, [])


def test_events_are_sentences_and_counted() -> None:
    made = guard(ABSOLUTE | {"velocity": 20.0}, {"name": "gripper", "mode": "absolute", "min": 0.0, "max": 1.0, "unit": "1"})
    made.check(np.array([1.0, 0.5]), np.array([1.0]))
    _, events = made.check(np.array([50.0, 1.2]))
    assert [event.sentence for event in events] == [
        "joint: 50 degree is over its position limit; 10 degree is sent",
        "gripper: 1.2 is over its position limit; 1 is sent",
        "joint: 10 degree is over its velocity limit; 3 degree is sent",
    ]
    _, (event,) = made.check(np.array([np.nan, 0.0]))
    assert event.sentence == "the action is not finite in joint; the robot holds"
    assert made.counts[("position", "joint")] == made.counts[("velocity", "joint")] == 1
    assert made.totals == {"position": 2, "velocity": 1, "nan": 1}
    _, events = made.check(np.array([3.0, 1 + 1e-8]))
    assert events == []  # rounding


def test_a_server_s_limits_travel_as_json() -> None:
    tree = {"dimensions": [ABSOLUTE | {"velocity": 20.0, "scale": 1.0}, RELATIVE | {"low": -0.1, "high": 0.1}], "source": "mine"}
    limits = ActionLimits.from_dict(json.loads(json.dumps(tree)))
    assert limits.to_dict() == tree and limits.source == "mine" and limits.size == 2


WRONG: dict[str, tuple[Any, str]] = {
    "key": ({"name": "a", "maximum": 1}, "may have acceleration"),
    "name": ({"min": 1}, "is no dimension"),
    "nan": ({"name": "a", "min": math.nan}, "a: min is nan; give a finite number"),
    "text": ({"name": "a", "min": "1"}, "a: min is '1'"),
    "bool": ({"name": "a", "max": True}, "a: max is True"),
    "empty": ({"name": "a", "min": 2, "max": 1}, "no number is inside"),
    "apart": ({"name": "a", "mode": "absolute", "min": 2, "high": 1}, "no number is inside"),
    "mode": ({"name": "a", "mode": "delta"}, "a: mode is 'delta'"),
    "unknown": ({"name": "a", "velocity": 1}, "say whether it is absolute or relative"),
    "still": ({"name": "a", "mode": "relative", "min": 1}, "could never stand still"),
    "blind": ({"name": "a", "mode": "relative", "low": 1}, "needs the state dimension"),
    "velocity": ({"name": "a", "mode": "absolute", "velocity": 0}, "velocity is 0; it must be above 0"),
    "state": ({"name": "a", "state": -1}, "state is -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_limits_that_are_none(name: str) -> None:
    row, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ActionLimits.from_dict({"dimensions": [row]})


def test_what_does_not_fit() -> None:
    made = guard(ABSOLUTE, RELATIVE)
    with pytest.raises(ValueError, match=r"shape \(3,\); the limits are of 2 dimensions \(joint, dx\)"):
        made.check(np.zeros(3))
    with pytest.raises(ValueError, match="the limits name its dimension 0"):
        made.check(np.zeros(2), np.zeros(0))
    with pytest.raises(ValueError, match="above 0 Hz"):
        Guard(ActionLimits([Dimension("a")]), 0.0)
    with pytest.raises(ValueError, match="at least one dimension"):
        ActionLimits.from_dict({"dimensions": []})
    with pytest.raises(ValueError, match="a mapping of `dimensions`"):
        ActionLimits.from_dict({})


def test_the_watchdog() -> None:
    dog = Watchdog(0.5)
    assert not dog.starved(100.0)
    dog.feed(100.0)
    assert not dog.starved(100.5) and dog.starved(100.51)
    dog.reset()
    assert not dog.starved(200.0)
    with pytest.raises(ValueError, match="above 0 seconds"):
        Watchdog(0.0)


def test_a_chunk_that_passes_is_a_copy() -> None:
    guard = Guard(ActionLimits.from_dict({"dimensions": [{"name": "x"}]}), 10.0)
    asked = np.zeros((3, 1))
    safe, _ = guard.check_chunk(asked)
    assert safe is not None and not np.shares_memory(safe, asked)

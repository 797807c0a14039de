"""Limits from a checkpoint and from a robot's mapping are what the guard reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triune_client.safety import ActionLimits, Guard

import triune
from triune.data.contract import Contract, Vector
from triune.data.robot import load_robot
from triune.data.statistics import statistics_of
from triune.data.transforms import Affine, Relative, RelativePose
from triune.policies.inputs import Settings
from triune.policies.safety import default_limits

ROBOTS = sorted(path.stem for path in (Path(triune.__file__).parent / "configs/robot").glob("*.yaml"))


def statistics(action: np.ndarray, state: np.ndarray) -> dict[str, Any]:
    return {"action": statistics_of(action), "observation.state": statistics_of(state)}


def contract(action: Mapping[str, Any], **state: Any) -> Contract:
    return Contract(cameras=(), state=Vector(**{"names": ("a", "b"), **state}), action=Vector(**action))


def by_name(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ActionLimits.from_dict(tree)
    return {row["name"]: row for row in tree["dimensions"]}


def test_training_actions_pass_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    action, state = rng.uniform(-3, 7, (500, 2)), rng.uniform(-1, 1, (500, 2))
    known = contract({"names": ("a", "gripper"), "units": ("rad", "1"), "mode": "absolute"}, units=("rad", "rad"))
    rows = by_name(default_limits(statistics(action, state), known))
    assert rows["a"]["state"] == 0 and "state" not in rows["gripper"]
    guard = Guard(ActionLimits.from_dict(default_limits(statistics(action, state), known)), 20.0)
    for row in action:
        safe, events = guard.check(row)
        assert events == []
        np.testing.assert_array_equal(safe, row)
    safe, events = guard.check(np.array([8.0, -4.0]))
    assert safe is not None and [event.kind for event in events] == ["position", "position"]
    np.testing.assert_allclose(safe, [7.5, -3.5], atol=0.1)


def test_a_step_of_zero_is_allowed_and_a_gripper_keeps_closed() -> None:
    action = np.random.default_rng(0).uniform(0.5, 1, (100, 2))
    tree = default_limits(statistics(action, action), contract({"names": ("dx", "gripper"), "mode": "relative"}))
    assert by_name(tree)["dx"]["min"] == 0 and by_name(tree)["gripper"]["mode"] == "absolute"
    guard = Guard(ActionLimits.from_dict(tree), 20.0)
    guard.check(np.array([0.7, 0.9]))
    np.testing.assert_array_equal(guard.check(np.array([np.nan, 0.6]))[0], [0, 0.9])


def test_actions_counted_from_the_state() -> None:
    """The statistics are of offsets, the actions are places."""
    offset, state = np.array([[-1.0, 0.0], [1.0, 5.0]]), np.array([[10.0, 0.0], [20.0, 0.0]])
    settings = Settings(relative=Relative(state_of=(0, None)))
    rows = by_name(default_limits(statistics(offset, state), contract({"names": ("a", "b"), "mode": "absolute"}), settings))
    assert (rows["a"]["min"], rows["a"]["max"]) == pytest.approx((9 - 0.6, 21 + 0.6))
    assert (rows["b"]["min"], rows["b"]["max"]) == pytest.approx((-0.25, 5.25))


def test_what_is_unknown_is_not_limited() -> None:
    names = tuple(f"p{i}" for i in range(9)) + ("gripper",)
    action, state = np.random.default_rng(0).normal(size=(9, 10)), np.zeros((9, 9))
    posed = contract({"names": names}, names=tuple(f"s{i}" for i in range(9)))
    rows = by_name(default_limits(statistics(action, state), posed, Settings(poses=(RelativePose(action=0, state=0),))))
    assert rows["p0"] == {"name": "p0"} and set(rows["gripper"]) == {"name", "min", "max"}
    imported = Affine(shift=(0.0,) * 10, scale=(1.0,) * 10)
    tree = default_limits({"action": imported, "observation.state": imported}, posed)
    assert all(set(row) == {"name"} for row in tree["dimensions"])


@pytest.mark.parametrize("name", ROBOTS)
def test_shipped_robots_have_limits_that_a_guard_reads(name: str) -> None:
    robot = load_robot(name)
    assert robot.action_limits is not None
    limits = ActionLimits.from_dict(robot.action_limits)
    assert [d.name for d in limits.dimensions] == list(robot.contract.action.names)
    guard = Guard(limits, robot.rate or 0.0)
    state = np.zeros(robot.contract.state.size)
    safe, events = guard.check(np.full(limits.size, 1e3), state)
    assert safe is not None and np.isfinite(safe).all() and {event.kind for event in events} <= {"position", "velocity"}
    assert guard.check(np.full(limits.size, np.nan))[0] is not None


def test_the_so100_moves_at_most_180_degrees_a_second() -> None:
    tree = load_robot("so100").action_limits
    assert tree is not None
    guard = Guard(ActionLimits.from_dict(tree), 30.0)
    safe, _ = guard.check(np.array([90.0, -200.0, 3.0, 0.0, 0.0, 70.0]), np.zeros(6))
    np.testing.assert_allclose(safe, [6, -6, 3, 0, 0, 70])


def test_the_workspace_of_steps_in_the_state_s_unit() -> None:
    """A step of LIBERO is 5 cm; 2 cm are left to the wall."""
    robot = load_robot("libero", ["limits.workspace={x: [-0.3, 0.3]}"])
    assert robot.action_limits is not None
    guard = Guard(ActionLimits.from_dict(robot.action_limits), 20.0)
    state = np.zeros(8)
    state[0] = 0.28
    safe, events = guard.check(np.ones(7), state)
    assert safe is not None and [event.sentence for event in events] == ["dx: 1 x 0.05 m is over its workspace limit; 0.4 x 0.05 m is sent"]
    np.testing.assert_allclose(safe, [0.4, 1, 1, 1, 1, 1, 1])

"""Mappings: what they refuse, what ``unknown`` means, and that a view is the same data under other names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import triune
from triune.config import parse
from triune.data import ChunkSampler, Contract, Dataset, Episode, open_dataset
from triune.data.robot import Robot, load_robot
from triune.errors import UserError

MakeDataset = Callable[..., Path]
MakeEpisode = Callable[..., Episode]
MAPPING = """
name: mine
rate: unknown
cameras:
  wrist: {source: observation.images.agentview, height: 16, width: 16, colour: bgr, flip: rotate180}
  agentview: {source: wrist, flip: unknown}
state:
  frame: base
  slots:
    - {name: height, source: "observation.state[2]", unit: m}
    - {name: push, source: "action.expert[0]", unit: unknown}
action:
  mode: relative
  gripper: "+1 closes"
  slots:
    - {name: gripper, source: "action[2]", unit: "1"}
    - {name: dx, source: "action[0]", unit: m}
"""


def robot(**changes: object) -> Robot:
    return parse(Robot, yaml.safe_load(MAPPING) | changes, "mine.yaml")


def test_a_view(make_dataset: MakeDataset, make_episode: MakeEpisode) -> None:
    dataset = open_dataset(make_dataset(2))
    view = robot().view(dataset)
    np.testing.assert_array_equal(
        view.vectors["observation.state"], np.stack([dataset.vectors["observation.state"][:, 2], dataset.vectors["action.expert"][:, 0]], 1)
    )
    np.testing.assert_array_equal(view.vectors["action"], dataset.vectors["action"][:, [2, 0]])
    np.testing.assert_array_equal(view.vectors["action.expert"], dataset.vectors["action.expert"][:, [2, 0]])
    assert (view.cameras, view.fps, view.tasks, len(view)) == (("wrist", "agentview"), 20.0, dataset.tasks, len(dataset))
    np.testing.assert_array_equal(view.frames("agentview", [5, 2]), dataset.frames("wrist", [5, 2]))
    np.testing.assert_array_equal(view.frames("wrist", [5, 2]), dataset.frames("agentview", [5, 2])[:, ::-1, ::-1, ::-1])
    wrist, agentview = view.contract.cameras
    assert (wrist.flip, wrist.colour, agentview.flip, agentview.colour) == ("none", "rgb", None, None)
    assert (view.contract.rate, view.contract.state.units, view.contract.action.units) == (20.0, None, ("1", "m"))
    assert view.contract.action.mode == "relative" and view.contract.render == "fast"
    batch = ChunkSampler(view, 4, 3, seed=0).batch(0)
    assert (batch["state"].shape, batch["action"].shape) == ((3, 2), (3, 4, 2))


def test_a_view_of_all_is_the_same_data(make_dataset: MakeDataset, contract: Contract) -> None:
    """No copy, no change."""
    dataset = open_dataset(make_dataset(1))
    slots = {
        p: [{"name": n, "source": f"{k}[{i}]"} for i, n in enumerate(getattr(contract, p).names)]
        for p, k in (("state", "observation.state"), ("action", "action"))
    }
    same = robot(
        cameras={c: {"source": c} for c in dataset.cameras}, state={"slots": slots["state"]}, action={"slots": slots["action"]}
    ).view(dataset)
    assert all(same.vectors[key] is dataset.vectors[key] for key in dataset.vectors)
    assert same.sources == dataset.sources
    assert not same.contract.conflicts(dataset.contract)


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "camera": ({"cameras": {"front": {"source": "top"}}}, r"has no camera top \(it has agentview, wrist\)"),
    "slot": (
        {"state": {"slots": [{"name": "a", "source": "observation.state[3]"}]}},
        r"has no observation.state\[3\] \(it has .*action\[0..2\]",
    ),
    "feature": ({"action": {"slots": [{"name": "a", "source": "actions[0]"}]}}, r"has no actions\[0\]"),
    "rate": ({"rate": 10}, "rate is 10 Hz in the mapping and 20 Hz in the dataset"),
    "size": ({"cameras": {"wrist": {"source": "wrist", "height": 480}}}, "height is 480 in the mapping and 16 in the dataset"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str, make_dataset: MakeDataset) -> None:
    changes, message = WRONG[name]
    dataset = open_dataset(make_dataset(1))
    with pytest.raises(UserError, match=message):
        robot(**changes).view(dataset)


INVALID: dict[str, tuple[dict[str, object], str]] = {
    "key": ({"camras": {}}, "unknown key 'camras'; did you mean 'cameras'"),
    "source": ({"state": {"slots": [{"name": "a", "source": "observation.state"}]}}, r"must name a feature of the dataset and a dimension"),
    "twice": ({"state": {"slots": [{"name": "a", "source": "x[0]"}, {"name": "a", "source": "x[1]"}]}}, "several slots named a"),
    "none": ({"state": {"slots": []}}, "state needs at least one slot"),
    "name": ({"name": "unknown"}, "'name': Input should be a valid string"),
    "rate": ({"rate": 0}, "'rate': Input should be greater than 0"),
    "flip": ({"cameras": {"wrist": {"source": "wrist", "flip": "upside down"}}}, "'cameras.wrist.flip'"),
    "limits": ({"limits": {"action": {"dx": {"maximum": 1}}}}, "unknown key 'limits.action.dx.maximum'; did you mean 'max'"),
    "limited": ({"limits": {"action": {"dy": {"max": 1}}}}, "limits.action names dy; slots of the action are gripper, dx"),
    "velocity": ({"limits": {"action": {"dx": {"velocity": 0}}}}, "'limits.action.dx.velocity': Input should be greater than 0"),
    "ends": ({"limits": {"action": {"dx": {"min": 1, "max": 0}}}}, "limits.action.dx: min 1 is above max 0"),
    "still": ({"limits": {"action": {"dx": {"min": 1}}}}, "limits.action.dx: a step of 0 is outside"),
    "no state": ({"limits": {"action": {"dx": {"state": "x"}}}}, "limits.action.dx: the state has no slot 'x'; it has height, push"),
    "units": ({"limits": {"action": {"dx": {"state": "push"}}}}, "its unit and that of state push are 'm' and unknown; write the same one"),
    "idle": ({"limits": {"workspace": {"height": [0, 1]}}}, "no slot of the action has `state: height`, so nothing would keep it"),
    "nowhere": ({"limits": {"workspace": {"x": [0, 1]}}}, "limits.workspace: the state has no slot 'x'"),
    "space": (
        {"limits": {"action": {"dx": {"state": "height"}}, "workspace": {"height": [1, 0]}}},
        "limits.workspace.height: 1 is above 0",
    ),
    "mode": (
        {"action": {"slots": [{"name": "d", "source": "action[0]"}]}, "limits": {"action": {"d": {"velocity": 1}}}},
        "limits.action.d: say `mode`",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_mapping(name: str) -> None:
    changes, message = INVALID[name]
    with pytest.raises(UserError, match=message):
        robot(**changes)


def test_unknown_conflicts_with_nothing(make_dataset: MakeDataset, contract: Contract) -> None:
    unknown = {"state": {"slots": [{"name": n, "source": f"observation.state[{i}]", "unit": "unknown"} for i, n in enumerate("xyz")]}}
    assert not contract.model_copy(update={"action": robot().action.vector}).conflicts(robot(**unknown, cameras={
        name: {"source": name, "flip": "unknown", "colour": "unknown", "height": "unknown"} for name in contract.camera_names
    }).contract)  # fmt: skip


def test_a_missing_mapping_names_the_known() -> None:
    with pytest.raises(UserError, match=r"there is no robot config 'libreo'; did you mean 'libero'\?"):
        load_robot("libreo")


@pytest.mark.parametrize("path", sorted((Path(triune.__file__).parent / "configs/robot").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_mappings_are_valid(path: Path) -> None:
    found = load_robot(path.stem)
    assert found.name == path.stem
    assert found.contract.action.size == len(found.action.slots)


def test_views_of_views(make_dataset: MakeDataset) -> None:
    """A view is a dataset: another mapping may look through it."""
    view: Dataset = robot().view(open_dataset(make_dataset(1)))
    again = robot(
        cameras={"a": {"source": "wrist"}},
        state={"slots": [{"name": "h", "source": "observation.state[0]"}]},
        action={"slots": [{"name": "g", "source": "action[0]"}]},
    ).view(view)
    np.testing.assert_array_equal(again.frames("a", [1]), view.frames("wrist", [1]))
    np.testing.assert_array_equal(again.vectors["action"][:, 0], view.vectors["action"][:, 0])


def test_limits_are_rows_of_the_action_s_slots() -> None:
    assert robot().action_limits is None
    limits = {"action": {"dx": {"velocity": 2, "max": "unknown", "state": "height"}, "gripper": {"mode": "absolute", "min": 0, "max": 1}}}
    tree = robot(limits=limits | {"workspace": {"height": [0.1, 0.4]}}).action_limits
    assert tree == {
        "dimensions": [
            {"name": "gripper", "unit": "1", "mode": "absolute", "min": 0, "max": 1},
            {"name": "dx", "unit": "m", "mode": "relative", "velocity": 2, "state": 0, "scale": 1, "low": 0.1, "high": 0.4},
        ],
        "source": "robot mine",
    }


def test_a_place_starts_from_the_state_of_its_name() -> None:
    slots = [{"name": "push", "source": "action[0]", "unit": "m"}, {"name": "height", "source": "action[1]", "unit": "cm"}]
    state = [{"name": name, "source": f"observation.state[{i}]", "unit": "m"} for i, name in enumerate(("push", "height"))]
    tree = robot(action={"mode": "absolute", "slots": slots}, state={"slots": state}, limits={}).action_limits
    assert tree is not None
    assert tree["dimensions"] == [
        {"name": "push", "unit": "m", "mode": "absolute", "state": 0, "scale": 1.0},
        {"name": "height", "unit": "cm", "mode": "absolute"},
    ]

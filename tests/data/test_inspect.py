"""The inspector finds what was planted, and stays silent over clean data; its proposal is a mapping that opens the data."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triune.config import load
from triune.data import Camera, Contract, Dataset, Vector, checks
from triune.data.inspect import inspect
from triune.data.propose import propose, write_images, write_proposal
from triune.data.readers import EpisodeInfo
from triune.data.robot import Robot
from triune.errors import UserError

LENGTH, SIDE = 60, 8


class Pictures:
    """Frames that show their own number; those in ``frozen`` show the one before."""

    def __init__(self, frozen: set[int]) -> None:
        self.frozen = frozen

    def read(self, indices: np.ndarray) -> np.ndarray:
        shown = [int(i) - (int(i) in self.frozen) for i in indices]
        return np.stack([np.full((SIDE, SIDE, 3), number % 251, np.uint8) for number in shown])


@dataclass
class Arm:
    """Two joints that move smoothly and a gripper that follows its command, recorded for some episodes."""

    mode: str = "relative"
    closes: float = 1.0
    episodes: int = 6
    seed: int = 0
    late: bool = False
    known: bool = False
    frozen: set[int] = field(default_factory=set)

    def record(self) -> Dataset:
        generator = np.random.default_rng(self.seed)
        states, actions = [], []
        for _ in range(self.episodes):
            waves = generator.normal(size=(2, 5)), generator.uniform(0, 6, (2, 5))
            times = np.linspace(0, 3, LENGTH + 1)[:, None, None]
            joints = (waves[0] * np.sin(times * (1 + np.arange(5)) + waves[1])).sum(2)
            command = np.where((np.arange(LENGTH + 1) // 12 + generator.integers(2)) % 2, 1.0, -1.0)
            width = np.empty(LENGTH + 1)
            width[0] = 0.02
            for t in range(LENGTH):
                width[t + 1] = np.clip(width[t] - 0.01 * self.closes * command[t], 0, 0.04)
            move = np.diff(joints, axis=0) * 20 if self.mode == "relative" else joints[1:]
            actions.append(np.column_stack([move, command[:-1]]))
            state = np.column_stack([joints, width])
            states.append(state[1:] if self.late else state[:-1])
        episodes = [EpisodeInfo(i, i * LENGTH, LENGTH, "pick it up") for i in range(self.episodes)]
        named = Vector(names=("j0", "j1", "width"), units=("rad", "rad", "m"), frame="base", mode="absolute")
        acts = Vector(names=("a0", "a1", "hand"))
        if self.known:
            acts = acts.model_copy(update={"mode": self.mode, "gripper": "known", "units": ("1",) * 3, "frame": "base"})
        camera = Camera(name="top", height=SIDE, width=SIDE, flip="none" if self.known else None)
        contract = Contract(cameras=(camera,), state=named, action=acts, rate=20.0, render="fast")
        vectors = {"observation.state": np.concatenate(states).astype(np.float32), "action": np.concatenate(actions).astype(np.float32)}
        stamps = np.tile(np.arange(LENGTH) / 20, self.episodes).astype(np.float32)
        tasks = np.zeros(LENGTH * self.episodes, np.int64)
        return Dataset(Path("arm"), contract, 20.0, {"top": Pictures(self.frozen)}, episodes, vectors, ("pick it up",), tasks, stamps)


def found(dataset: Dataset) -> dict[str, dict[str, Any]]:
    report = inspect(dataset)
    json.dumps(report, allow_nan=False)
    return {finding["check"]: finding for finding in report["findings"]}


def test_clean_and_known_data_has_no_findings() -> None:
    assert found(Arm(known=True).record()) == {}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("closes", [1.0, -1.0])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_mode_and_gripper(mode: str, closes: float, seed: int) -> None:
    report = inspect(Arm(mode, closes, seed=seed).record())
    assert report["mode"] == mode
    (hand,) = report["gripper"]
    assert (hand["name"], hand["values"], hand["closes"]) == ("hand", (-1.0, 1.0), "high" if closes > 0 else "low")
    assert f"{closes:g} closes (a guess)" in hand["guess"]


def test_noise_has_no_mode_and_no_answering_gripper() -> None:
    dataset = Arm().record()
    generator = np.random.default_rng(0)
    dataset.vectors["action"] = generator.normal(size=dataset.vectors["action"].shape).astype(np.float32)
    dataset.vectors["action"][:, 2] = np.sign(dataset.vectors["action"][:, 2])
    report = inspect(dataset)
    assert (report["mode"], report["gripper"][0]["state"]) == (None, None)
    assert "cannot be told" in found(dataset)["mode"]["sentence"]


def test_a_contract_that_says_otherwise() -> None:
    dataset = Arm("absolute", known=True).record()
    dataset.contract = dataset.contract.model_copy(update={"action": dataset.contract.action.model_copy(update={"mode": "relative"})})
    assert found(dataset)["mode"]["sentence"] == "the contract says that actions are relative, and they look absolute"


def test_rows_that_are_late() -> None:
    assert "one step late" in found(Arm(late=True).record())["late"]["sentence"]
    assert "late" not in found(Arm().record())


def test_idle_frames() -> None:
    dataset = Arm(known=True).record()
    state = dataset.vectors["observation.state"]
    for info in dataset.episodes:
        state[info.start : info.start + 15] = state[info.start + 14]
        state[info.frames.stop - 6 : info.frames.stop] = state[info.frames.stop - 6]
    idle = inspect(dataset)["idle"]
    assert (idle["longest_start"], idle["longest_end"]) == (14, 5)
    assert (round(idle["starts"] * LENGTH), round(idle["ends"] * LENGTH), round(idle["share"] * LENGTH)) == (14, 5, 19)
    assert "idle" in found(dataset)
    state[:] = 0
    assert inspect(dataset)["idle"] is None


def test_clipping() -> None:
    dataset = Arm(known=True).record()
    action = dataset.vectors["action"]
    limit = np.quantile(np.abs(action[:, 1]), 0.7)
    action[:, 1] = np.clip(action[:, 1], -limit, limit)
    report = inspect(dataset)
    assert report["clipped"]["a0"] == 0 and report["clipped"]["hand"] == 0
    assert report["clipped"]["a1"] == pytest.approx(0.3, abs=0.01)
    assert f"a1 {report['clipped']['a1']:.0%}" in found(dataset)["clipped"]["sentence"]


def test_values_that_are_not_numbers() -> None:
    dataset = Arm(known=True).record()
    dataset.vectors["action"][130, 0] = np.nan
    dataset.vectors["action"][200, 1] = np.inf
    findings = found(dataset)
    assert findings["not_finite"]["sentence"] == "action has NaN or infinity in 2 frames, of episodes 2, 3"
    assert inspect(dataset)["ranges"]["action"][0]["not_finite"] == 1
    assert "mode" not in findings


def test_pictures_that_stand_still() -> None:
    dataset = Arm(known=True, frozen=set(range(1, 6 * LENGTH, 2))).record()
    (camera,) = inspect(dataset)["cameras"]
    assert 0 < camera["duplicates"] < camera["pairs"]
    assert "same picture twice" in found(dataset)["duplicates"]["sentence"]


class Broken:
    def read(self, indices: np.ndarray) -> np.ndarray:
        raise OSError("broken data stream")


def test_pictures_that_do_not_decode() -> None:
    dataset = Arm(known=True).record()
    dataset.sources["top"] = Broken()
    (camera,) = inspect(dataset)["cameras"]
    assert (camera["decodes"], camera["decoded"]) == (False, None)
    assert "broken data stream" in found(dataset)["decode"]["sentence"]


def test_sizes_that_are_wrong() -> None:
    dataset = Arm(known=True).record()
    dataset.contract = dataset.contract.model_copy(update={"cameras": (Camera(name="top", height=480, width=640),)})
    assert found(dataset)["size"]["sentence"] == "camera top is said to be 480x640 and decodes to 8x8"


def test_clocks() -> None:
    dataset = Arm(known=True).record()
    stamps = dataset.timestamps
    assert stamps is not None
    stamps[70:120] += 0.3  # six frames are missing, and in the middle of the same episode one step jumps back to its end
    gaps = found(dataset)["clock"]["sentence"]
    assert gaps.startswith("1 steps leave out one or more frames")
    stamps[70:120] -= 0.3
    stamps[1::2] += 0.01
    assert "off by more than a tenth of a frame (up to 10.0 ms)" in found(dataset)["clock"]["sentence"]
    dataset.timestamps = None
    assert "clock" not in found(dataset)


def test_short_episodes_and_bare_instructions() -> None:
    dataset = Arm(known=True).record()
    first, *rest = dataset.episodes
    dataset.episodes = [EpisodeInfo(0, 0, 5, "lift"), EpisodeInfo(1, 5, LENGTH - 5, "lift"), *rest]
    dataset.tasks = ("lift",)
    findings = found(dataset)
    assert findings["short"]["sentence"].endswith("shorter than a quarter of the median of 60 frames: 0")
    assert "'lift', which is no sentence" in findings["instruction"]["sentence"]


def test_angles_that_wrap() -> None:
    dataset = Arm(known=True).record()
    angle = np.linspace(0, 40, len(dataset)) % (2 * np.pi) - np.pi
    dataset.vectors["observation.state"][:, 0] = angle
    assert "state j0 jumps by a whole turn" in found(dataset)["wraps"]["sentence"]
    assert checks.wraps(np.linspace(0, 6.2, 50)[:, None], [EpisodeInfo(0, 0, 50, "")]) == {}


def test_names_that_are_not_ours() -> None:
    dataset = Arm().record()
    dataset.vectors = {
        f"observation.{k}": v
        for k, v in (("eef_pos", dataset.vectors["observation.state"]), ("object", np.ones((len(dataset), 9), np.float32)))
    } | {"actions": dataset.vectors["action"]}
    report = inspect(dataset)
    assert (report["state"], report["action"], report["mode"]) == (["observation.eef_pos"], "actions", "relative")
    assert "not under their names" in found(dataset)["names"]["sentence"]


def test_a_proposal_opens_the_data(tmp_path: Path) -> None:
    dataset = Arm().record()
    report = inspect(dataset)
    path = tmp_path / "arm.yaml"
    written = write_proposal(dataset, report, path)
    read = load(Robot, path)
    assert read == written
    assert (read.name, read.rate, read.action.mode, read.action.gripper) == ("arm", 20.0, None, None)
    assert (read.state.vector, read.cameras["agentview"].source) == (dataset.contract.state, "top")
    text = path.read_text()
    assert "gripper: unknown  # action hand switches between -1 and 1" in text
    assert "mode: unknown  # actions look relative: " in text
    assert "flip: unknown  # none, vertical" in text
    view = read.view(dataset)
    assert view.vectors["action"] is dataset.vectors["action"]
    assert {finding["check"] for finding in inspect(view)["findings"]} == {"gripper", "mode", "flip"}
    with pytest.raises(UserError, match="is there already"):
        write_proposal(dataset, report, path)
    with pytest.raises(UserError, match="let its name end in .yaml"):
        write_proposal(dataset, report, tmp_path / "arm")
    (picture,) = write_images(dataset, tmp_path / "pictures")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_propose() -> None:
    dataset = Arm().record()
    dataset.vectors = {"observation.state": dataset.vectors["observation.state"]}
    with pytest.raises(UserError, match="which feature is the action cannot be told"):
        propose(dataset, inspect(dataset), "x")


def test_odd_names_survive_the_yaml(tmp_path: Path) -> None:
    """Names with colons, quotes, braces or the look of numbers come back as they were."""
    dataset = Arm().record()
    odd = ("a: b", "{'x\"", "1e3")
    dataset.contract = dataset.contract.model_copy(update={"state": Vector(names=odd), "action": Vector(names=("yes", "#", "-"))})
    write_proposal(dataset, inspect(dataset), tmp_path / "odd.yaml")
    robot = load(Robot, tmp_path / "odd.yaml")
    assert robot.state.vector.names == odd
    assert robot.action.vector.names == ("yes", "#", "-")

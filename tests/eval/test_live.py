"""Bodies driven through a real server: a simulated world, recorded episodes, a robot of lerobot."""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triune_client import Client

from triune.data import Contract
from triune.errors import UserError
from triune.eval.bodies import EpisodeBody, RobotBody, WorldBody, open_body
from triune.eval.live import Loop, drive, summary
from triune.policies.serve import Serve, Source
from triune.policies.serve.local import serving

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's process finds ``served``, and this one ``mock_arm``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(str(HERE))
    importlib.import_module("mock_arm")


def robot(tmp_path: Path, **options: Any) -> RobotBody:
    return RobotBody({"type": "mock_arm", "calibration_dir": str(tmp_path), "id": "one"} | options, "so100", "wave")


def test_a_robot_of_lerobot_moves_as_the_policy_says_inside_its_limits(tmp_path: Path) -> None:
    source = Source("served:arm", {"mapping": "so100", "swing": 120.0, "seconds": 0.05})
    with serving(source, "waves", Serve(port=0, robot="so100")) as server, Client(server.url) as client:
        body = robot(tmp_path)
        try:
            (done,) = drive(body, client, Loop(seconds=3.0), [0])
            sent = [list(action.values()) for action in body.robot.sent]
        finally:
            body.close()
    assert not body.robot.is_connected
    assert done.success is None and done.stalls == 0 and done.executed > 60 and done.executed == len(sent) - done.held.get("first", 0)
    assert done.reaction_ms["p50"] >= 50 and done.smoothness is not None
    moved, most = np.array(sent), np.array([114.6, 100.3, 90, 106, 180, 100])
    assert (np.abs(moved) <= most + 1e-6).all() and (moved[:, 5] >= 0).all()
    assert (np.abs(np.diff(moved[:, :5], axis=0)) <= 180 / 30 + 1e-6).all()  # 180 degree/s
    assert any(kind.startswith("guard") for kind in done.events)
    assert summary(body, client, Loop(), [done])["mode"] == "async"


def test_a_camera_that_hangs_makes_the_robot_hold_and_then_go_on(tmp_path: Path) -> None:
    source = Source("served:arm", {"mapping": "so100"})
    with serving(source, "waves", Serve(port=0, robot="so100")) as server, Client(server.url) as client:
        body = robot(tmp_path, blind_after=30, blind_seconds=1.0)
        try:
            (done,) = drive(body, client, Loop(seconds=3.0, starved=0.3), [0])
        finally:
            body.close()
    assert done.late >= 1 and done.executed > 40  # one tick came a second late; none were made up for


def test_what_a_mapping_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lerobot knows no robot 'hexapod'"):
        RobotBody({"type": "hexapod"}, "so100", "wave")
    with pytest.raises(UserError, match="the options of mock_arm"):
        robot(tmp_path, colour="red")
    with pytest.raises(UserError, match=r"slot x of the mapping libero is .*mend the mapping"):
        RobotBody({"type": "mock_arm", "calibration_dir": str(tmp_path)}, "libero", "wave")
    for named, said in (({}, "name one thing"), ({"world": "a", "episode": "b"}, "--world and --episode"), ({"robot": {}}, "--mapping")):
        nothing: dict[str, Any] = {"world": None, "episode": None, "robot": None, "mapping": None, "instruction": "", "like": None}
        with pytest.raises(UserError, match=said):
            open_body(**(nothing | named))


def test_a_world_stands_still_while_an_answer_is_awaited() -> None:
    source = Source("served:world", {"name": "cubes/lift-red", "seconds": 0.1})
    with serving(source, "waves", Serve(port=0, limits=False)) as server, Client(server.url) as client:
        body = WorldBody("cubes/lift-red", Contract.model_validate(client.welcome.contract))
        try:
            first, again = (drive(body, client, Loop("sync", seconds=1.5), [7])[0] for _ in range(2))
        finally:
            body.close()
    assert first.held and first.executed > 0 and first.success is False
    steps = min(first.executed, again.executed) // 10 * 10
    assert steps >= 10 and first.smoothness == pytest.approx(again.smoothness, rel=0.5)


def test_a_pretended_latency_gives_the_same_episode_again(tmp_path: Path) -> None:
    source = Source("served:world", {"name": "cubes/lift-red"})
    with serving(source, "waves", Serve(port=0, limits=False)) as server, Client(server.url) as client:
        body = WorldBody("cubes/lift-red", Contract.model_validate(client.welcome.contract))
        try:
            first, again, none = (drive(body, client, Loop("async", seconds=1.5, latency=late), [7])[0] for late in (0.15, 0.15, 0.0))
        finally:
            body.close()
        arm = robot(tmp_path)
        try:
            with pytest.raises(UserError, match="moves in real time"):
                drive(arm, client, Loop(latency=0.1), [0])
        finally:
            arm.close()
    assert first == again and first.executed > 20
    assert (first.delay_ms["p99"], none.delay_ms["p99"]) == (150.0, 50.0)  # at least a tick
    assert first.held == {"first": 3} and first.late == 0 and first.smoothness != none.smoothness


def test_another_rate_and_a_mode_that_the_policy_does_not_have_are_refused() -> None:
    source = Source("served:world", {"name": "cubes/lift-red"})
    with serving(source, "waves", Serve(port=0)) as server, Client(server.url) as client:
        body = WorldBody("cubes/lift-red")
        try:
            with pytest.raises(UserError, match="driven at 30 Hz: actions would be too fast"):
                drive(body, client, Loop(rate=30.0), [0])
            with pytest.raises(UserError, match="does not go on from what is left"):
                drive(body, client, Loop("rtc"), [0])
        finally:
            body.close()


def test_recorded_episodes_say_how_far_the_actions_are(tmp_path: Path) -> None:
    from triune.data import Camera, Episode, Vector
    from triune.data.writer import DatasetWriter

    cameras = tuple(Camera(name=name, height=64, width=64) for name in ("top", "wrist"))
    joints = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    contract = Contract(cameras=cameras, state=Vector(names=joints), action=Vector(names=joints), rate=30.0)
    at = np.arange(40)[:, None] / 30
    actions = (30 * np.sin(at + np.arange(6)) + 2).astype(np.float32)
    with DatasetWriter(tmp_path / "data", contract, 30) as writer:
        images = {c.name: np.zeros((40, 64, 64, 3), np.uint8) for c in cameras}
        writer.add(Episode(images, actions, actions, "wave", {"world": "none", "seed": 0, "success": True}))
    source = Source("served:arm", {"mapping": "so100"})
    with serving(source, "waves", Serve(port=0, limits=False)) as server, Client(server.url) as client:
        body = EpisodeBody(str(tmp_path / "data"))
        (done,) = drive(body, client, Loop("sync", seconds=10.0), [0])
    assert done.executed == 40 and done.success is None
    for error in done.facts["error"].values():
        assert error == pytest.approx(2.0, abs=1e-3)


def test_a_dry_run_moves_nothing(tmp_path: Path) -> None:
    source = Source("served:arm", {"mapping": "so100"})
    with serving(source, "waves", Serve(port=0, robot="so100")) as server, Client(server.url) as client:
        body = robot(tmp_path)
        try:
            (done,) = drive(body, client, Loop(seconds=1.0, sends=False), [0])
        finally:
            body.close()
    assert done.executed > 10 and not body.robot.sent

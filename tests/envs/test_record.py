"""Recordings are a function of the seeds: for any number of workers, after any kill, and when replayed."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

from triune.data import Dataset, open_dataset
from triune.envs.record import SETTLE, demonstrate, record, record_all
from triune.envs.replay import replay
from triune.errors import UserError


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``point_world``, importable in the processes that simulate too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("point_world")


def seeds(dataset: Dataset, world: str) -> list[int]:
    return [episode.meta["seed"] for episode in dataset.episodes if episode.meta["world"] == world]


def same_files(one: Path, other: Path) -> None:
    """Two folders hold the same files: the same bytes, and the same rows in the same row groups of parquet files."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    for name in names:
        if not name.endswith(".parquet"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
            continue
        ours, theirs = pq.ParquetFile(one / name), pq.ParquetFile(other / name)
        assert ours.num_row_groups == theirs.num_row_groups, name
        assert ours.read().equals(theirs.read()), name


def test_pushes_are_marked_and_recovered_from(points: ModuleType) -> None:
    world, expert = points.make("point/a", points.VIEW)
    episodes = [demonstrate(world, expert, seed=seed, pushes=0.1) for seed in (1, 2, 4, 5, 7, 8)]
    marked = [episode.extra["disturbed"][:, 0] > 0 for episode in episodes]
    assert any(mark.any() for mark in marked) and all(episode.meta["success"] for episode in episodes)
    for episode, mark in zip(episodes, marked, strict=True):
        differs = (episode.action != episode.extra["action.expert"]).any(1)
        np.testing.assert_array_equal(differs, mark)
        assert (np.abs(episode.action[mark, 2]) == 1).all() and np.abs(episode.action[mark, :2]).max(initial=0) <= 0.4
    np.testing.assert_array_equal(demonstrate(world, expert, seed=2, pushes=0.1).action, episodes[1].action)
    assert "disturbed" not in demonstrate(world, expert, seed=2).extra


def test_one_episode(points: ModuleType) -> None:
    world, expert = points.make("point/a", points.VIEW)
    episode = demonstrate(world, expert, seed=1, noise=0.3)
    assert episode.meta["success"]
    assert len(episode) == episode.meta["first_success_step"] + SETTLE
    executed, wanted = episode.action, episode.extra["action.expert"]
    assert (executed[:, 2] == wanted[:, 2]).all()  # no noise on the gripper
    assert (executed[:, :2] != wanted[:, :2]).any()
    assert np.abs(executed).max() <= 1
    np.testing.assert_array_equal(demonstrate(world, expert, seed=1, noise=0.3).action, executed)
    clean = demonstrate(world, expert, seed=1)
    np.testing.assert_array_equal(clean.action, clean.extra["action.expert"])
    obs, _ = world.reset(seed=1)
    np.testing.assert_array_equal(clean.images["wrist"][0], obs["pixels"]["wrist"])  # the frame before the first action
    np.testing.assert_array_equal(clean.state[0], obs["agent_pos"])


def test_any_number_of_workers(points: ModuleType, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    one, three = (tmp_path / name for name in ("one", "three"))
    record_all(
        {"point/a": 4, "point/b": 2}, one, workers=1, noise=0.1, view=points.VIEW, make=points.make, progress=lambda *at: said.append(at)
    )
    record_all({"point/a": 4, "point/b": 2}, three, workers=3, noise=0.1, view=points.VIEW, make=points.make)
    same_files(one, three)
    assert said == [(count, 6) for count in range(7)]
    dataset = open_dataset(one)
    assert (seeds(dataset, "point/a"), seeds(dataset, "point/b")) == ([1, 2, 4, 5], [1, 2])
    assert dataset.tasks == ("go to the goal of point/a", "go to the goal of point/b")
    facts = dataset.episodes[0].meta
    assert (facts["render"], facts["noise"], facts["success"]) == ("fast", 0.1, True)
    for index in range(6):
        found = replay(dataset, index, make=points.make)
        assert (found.frames, found.first_difference) == (dataset.episodes[index].length, None)
    dataset.vectors["action"][2, 0] += 0.01
    assert replay(dataset, 0, make=points.make).first_difference == 3


def test_goes_on(points: ModuleType, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"workers": 2, "noise": 0.1, "view": points.VIEW, "make": points.make}
    record_all({"point/a": 5}, whole, **options)
    for count in (2, 2, 5):
        record_all({"point/a": count}, parts, **options)
    same_files(whole, parts)
    assert seeds(open_dataset(parts), "point/a") == [1, 2, 4, 5, 7]


def test_failures(points: ModuleType, tmp_path: Path) -> None:
    record_all({"point/a": 4}, tmp_path / "all", workers=2, view=points.VIEW, make=points.make, keep_failures=True)
    dataset = open_dataset(tmp_path / "all")
    assert [episode.meta["success"] for episode in dataset.episodes] == [False, True, True, False]
    assert dataset.episodes[0].length == 40
    with pytest.raises(UserError, match="the expert of point/a succeeded in 0 of 20 episodes"):
        record_all({"point/a": 4}, tmp_path / "none", workers=2, view=points.VIEW, make=points.hopeless)


def test_refuses_another_dataset(points: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not a dataset"):
        record_all({"point/a": 1}, tmp_path / "d", workers=1, view=points.VIEW, make=points.make)


@pytest.mark.slow
def test_killed(points: ModuleType, tmp_path: Path) -> None:
    """SIGKILL to the recorder: what it reported is there, its workers leave, and the rest is as if nothing had happened."""
    out = tmp_path / "d"
    code = "import sys; sys.path.insert(0, sys.argv[1]); import point_world; point_world.record_for_ever(sys.argv[2])"
    with subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(8)][-1]
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(process.pid, signal.SIGKILL)
    kept = len(open_dataset(out).episodes)
    assert kept >= reported
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    record_all({"point/a": kept + 3}, out, workers=2, view=points.VIEW, make=points.make)
    record_all({"point/a": kept + 3}, tmp_path / "whole", workers=2, view=points.VIEW, make=points.make)
    same_files(out, tmp_path / "whole")


@pytest.mark.slow
def test_replays_in_the_simulator(tmp_path: Path) -> None:
    """robosuite's frames come back bit for bit, in another process than the one that recorded them."""
    record("cubes/lift-red", 2, tmp_path / "d", noise=0.1, workers=2)
    dataset = open_dataset(tmp_path / "d")
    for index in range(2):
        found = replay(dataset, index)
        assert found.first_difference is None, found
    assert {"agentview", "wrist"} == set(dataset.episodes[0].meta["cameras"])

"""What is written is read back, by us and by lerobot; a recorder may die at any moment."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from triune.data import Camera, Contract, Episode, Vector, open_dataset, tail
from triune.data import writer as module
from triune.data.writer import DatasetWriter
from triune.data.writer_v21 import WriterV21
from triune.errors import UserError

MakeEpisode = Callable[..., Episode]
MakeDataset = Callable[..., Path]


def same(folder: Path, episodes: list[Episode]) -> None:
    """The dataset holds exactly these episodes."""
    dataset = open_dataset(folder)
    assert [e.length for e in dataset.episodes] == [len(e) for e in episodes]
    for info, episode in zip(dataset.episodes, episodes, strict=True):
        assert info.task == episode.task
        assert info.meta["seed"] == episode.meta["seed"]
        np.testing.assert_array_equal(dataset.vectors["observation.state"][info.frames], episode.state)
        np.testing.assert_array_equal(dataset.vectors["action"][info.frames], episode.action)
        np.testing.assert_array_equal(dataset.vectors["action.expert"][info.frames], episode.extra["action.expert"])
        for camera, images in episode.images.items():
            np.testing.assert_array_equal(dataset.frames(camera, range(info.start, info.start + info.length)), images)


def same_statistics(one: Path, other: Path) -> None:
    assert (one / "meta/stats.json").read_bytes() == (other / "meta/stats.json").read_bytes()


def same_in_lerobot(folder: Path, episodes: list[Episode]) -> None:
    """lerobot's own reader finds them too, and their frames at the right indices."""
    from lerobot.datasets import LeRobotDataset

    theirs = LeRobotDataset("local/test", root=folder, video_backend="pyav")
    assert (theirs.num_episodes, len(theirs)) == (len(episodes), sum(map(len, episodes)))
    index = 0
    for number, episode in enumerate(episodes):
        for step in (0, len(episode) - 1):
            item = theirs[index + step]
            assert (int(item["episode_index"]), int(item["frame_index"]), item["task"]) == (number, step, episode.task)
            np.testing.assert_array_equal(item["action"].numpy(), episode.action[step])
            image = (item["observation.images.wrist"] * 255).round().byte().permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(image, episode.images["wrist"][step])
        index += len(episode)


def test_round_trip(make_dataset: MakeDataset, make_episode: MakeEpisode) -> None:
    folder = make_dataset(5)
    episodes = [make_episode(i) for i in range(5)]
    same(folder, episodes)
    same_in_lerobot(folder, episodes)
    facts = open_dataset(folder).episodes[1].meta
    assert facts["cameras"]["wrist"]["intrinsics"] == np.eye(3).tolist()
    assert not (folder / module.STAGING).exists()


def test_statistics_stand_in_order(make_dataset: MakeDataset) -> None:
    """lerobot writes them in the order of a set, another one in every process: two recordings of the same would differ."""
    folder = make_dataset(2)
    found = json.loads((folder / "meta" / "stats.json").read_text())
    assert list(found) == sorted(found) and {"action", "observation.state"} <= found.keys()


def test_rows_are_those_of_lerobots_recorder(make_dataset: MakeDataset, make_episode: MakeEpisode, tmp_path: Path) -> None:
    """The short way of writing images gives the same files as ``LeRobotDataset.add_frame``."""
    from lerobot.datasets import LeRobotDataset

    ours = make_dataset(2)
    features = {
        k: v for k, v in json.loads((ours / "meta/info.json").read_text())["features"].items() if "index" not in k and k != "timestamp"
    }
    theirs = LeRobotDataset.create("local/test", 20, features, root=tmp_path / "theirs", use_videos=False, video_backend="pyav")
    for index in range(2):
        episode = make_episode(index)
        columns = {"observation.state": episode.state, "action": episode.action, **episode.extra}
        columns |= {f"observation.images.{camera}": images for camera, images in episode.images.items()}
        for step in range(len(episode)):
            theirs.add_frame({key: value[step] for key, value in columns.items()} | {"task": episode.task})
        theirs.save_episode()
    theirs.finalize()
    data = [pq.read_table(root / "data/chunk-000/file-000.parquet") for root in (ours, tmp_path / "theirs")]
    assert data[0].schema.equals(data[1].schema)
    for name in data[0].schema.names:
        if "images" not in name:
            assert data[0][name].combine_chunks().equals(data[1][name].combine_chunks()), name
        else:
            assert [row["path"] for row in data[0][name].to_pylist()] == [row["path"] for row in data[1][name].to_pylist()]
    rows = [pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet") for root in (ours, tmp_path / "theirs")]
    assert {(f.name, f.type) for f in rows[0].schema} == {(f.name, f.type) for f in rows[1].schema}
    for name in rows[0].schema.names:
        if not name.startswith("stats/observation.images"):  # ours are of fewer pixels
            assert rows[0][name].to_pylist() == rows[1][name].to_pylist(), name
    info = [json.loads((root / "meta/info.json").read_text()) for root in (ours, tmp_path / "theirs")]
    assert info[0] == info[1]


def test_continues(make_dataset: MakeDataset, make_episode: MakeEpisode, contract: Contract) -> None:
    folder = make_dataset(2)
    with DatasetWriter(folder, contract, 20) as writer:
        assert len(writer) == 2
        assert writer.add(make_episode(2)) == 2
    episodes = [make_episode(i) for i in range(3)]
    same(folder, episodes)
    same_in_lerobot(folder, episodes)


def test_begins_new_files(make_dataset: MakeDataset, make_episode: MakeEpisode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "FILE_BYTES", 20_000)
    folder = make_dataset(6)
    assert 1 < len(list((folder / "data").rglob("*.parquet"))) < 6
    episodes = [make_episode(i) for i in range(6)]
    same(folder, episodes)
    same_in_lerobot(folder, episodes)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the writer's state survives but its files."""


POINTS = ("data", "episodes", "tasks", "stats", "info")


@pytest.mark.parametrize("bytes_per_file", [tail.FILE_BYTES, 1], ids=["same file", "new file"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", range(len(POINTS)), ids=POINTS)
def test_killed_while_publishing(
    point: int, after: bool, bytes_per_file: int, make_dataset: MakeDataset, make_episode: MakeEpisode, contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = make_dataset(1)
    publish, calls = module.publish, iter(range(100))
    monkeypatch.setattr(tail, "FILE_BYTES", bytes_per_file)

    def dies(temporary: Path, path: Path) -> None:
        here = next(calls) == point
        if here and not after:
            raise Killed
        publish(temporary, path)
        if here:
            raise Killed

    writer = DatasetWriter(folder, contract, 20)
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", dies)
        patch.setattr(tail, "publish", dies)
        with pytest.raises(Killed):
            writer.add(make_episode(1))
    writer.close()
    survivors = 2 if after and POINTS[point] == "info" else 1
    same(folder, [make_episode(i) for i in range(survivors)])
    same_in_lerobot(folder, [make_episode(i) for i in range(survivors)])
    with DatasetWriter(folder, contract, 20) as again:
        for index in range(survivors, 3):
            again.add(make_episode(index))
    same(folder, [make_episode(i) for i in range(3)])
    same_in_lerobot(folder, [make_episode(i) for i in range(3)])
    same_statistics(folder, make_dataset(3, "straight"))


def test_killed_in_the_first_episode(
    tmp_path: Path, make_episode: MakeEpisode, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(temporary: Path, path: Path) -> None:
        raise Killed

    writer = DatasetWriter(tmp_path / "d", contract, 20)
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", dies)
        patch.setattr(tail, "publish", dies)
        with pytest.raises(Killed):
            writer.add(make_episode(0))
    writer.close()
    with DatasetWriter(tmp_path / "d", contract, 20) as again:
        again.add(make_episode(0))
    same(tmp_path / "d", [make_episode(0)])


@pytest.mark.parametrize("writer", [DatasetWriter, WriterV21])
def test_killed_before_the_first_file_has_its_name(writer: Callable[..., Any], tmp_path: Path, contract: Contract) -> None:
    (tmp_path / "d/meta").mkdir(parents=True)
    (tmp_path / "d/meta/.tmp-triune.json").write_text('{"vers')
    with writer(tmp_path / "d", contract, 20) as again:
        assert len(again) == 0
    assert [path.name for path in (tmp_path / "d").rglob("*") if path.is_file()] == ["triune.json"]


def test_episodes_without_their_count_are_not_begun_anew(make_dataset: MakeDataset, contract: Contract) -> None:
    """A copy that lost ``info.json`` holds episodes that somebody may still want."""
    folder = make_dataset(2)
    (folder / "meta/info.json").unlink()
    before = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for writer in (DatasetWriter, WriterV21):
        with pytest.raises(UserError, match="holds 2 episodes but no meta/info.json"):
            writer(folder, contract, 20)
    assert before == {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_torn_line_of_facts(make_dataset: MakeDataset, make_episode: MakeEpisode, contract: Contract) -> None:
    folder = make_dataset(1)
    with (folder / "meta/triune_episodes.jsonl").open("a") as file:
        file.write('{"episode_index": 1, "wor')
    same(folder, [make_episode(0)])
    with DatasetWriter(folder, contract, 20) as writer:
        writer.add(make_episode(1))
    same(folder, [make_episode(0), make_episode(1)])


def test_video(make_episode: MakeEpisode, contract: Contract, tmp_path: Path) -> None:
    """AV1 keeps the frames apart and in order, if not bit for bit; a second writer goes on from the first."""
    cameras = tuple(camera.model_copy(update={"height": 64, "width": 64}) for camera in contract.cameras)
    large = contract.model_copy(update={"cameras": cameras})
    levels = np.arange(36).reshape(3, 12) * 7
    for group in ((0, 1), (2,)):
        with DatasetWriter(tmp_path / "video", large, 20, video=True) as writer:
            for index in group:
                episode = make_episode(index, 12)
                grey = np.broadcast_to(levels[index, :, None, None, None], (12, 64, 64, 3)).astype(np.uint8)
                writer.add(Episode(dict.fromkeys(large.camera_names, grey), episode.state, episode.action, episode.task, episode.meta))
    dataset = open_dataset(tmp_path / "video")
    read = dataset.load_images("agentview")
    assert np.abs(read.astype(float).mean((1, 2, 3)) - levels.reshape(-1)).max() < 3
    order = np.random.default_rng(0).permutation(36)
    np.testing.assert_array_equal(dataset.frames("wrist", order), read[order])
    with DatasetWriter(tmp_path / "tiny", contract, 20, video=True) as writer, pytest.raises(UserError, match="at least 64 pixels"):
        writer.add(make_episode(0))


def test_one_writer_at_a_time(make_dataset: MakeDataset, contract: Contract) -> None:
    folder = make_dataset(1)
    with DatasetWriter(folder, contract, 20), pytest.raises(UserError, match="being written by another recorder"):
        DatasetWriter(folder, contract, 20)
    DatasetWriter(folder, contract, 20).close()


def test_refusals(make_dataset: MakeDataset, make_episode: MakeEpisode, contract: Contract, tmp_path: Path) -> None:
    folder = make_dataset(1)
    other = contract.model_copy(update={"cameras": (Camera(name="front"),)})
    with pytest.raises(UserError, match="camera front is expected"):
        DatasetWriter(folder, other, 20)
    before = (folder / "meta" / "triune.json").read_bytes()
    with pytest.raises(UserError, match="camera wrist is expected but there is only agentview"):
        DatasetWriter(folder, contract.model_copy(update={"cameras": contract.cameras[:1]}), 20)
    assert (folder / "meta" / "triune.json").read_bytes() == before
    with pytest.raises(UserError, match="20 frames per second, not 80"):
        DatasetWriter(folder, contract.model_copy(update={"rate": None}), 80)
    with pytest.raises(UserError, match="whole number"):
        DatasetWriter(tmp_path / "new", contract, 12.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a dataset"):
        DatasetWriter(tmp_path / "mine", contract, 20)
    wide = contract.model_copy(update={"action": Vector(names=("a", "b"))})
    with (
        DatasetWriter(tmp_path / "new", wide, 20) as writer,
        pytest.raises(UserError, match="action has 3 dimensions and the contract's 2"),
    ):
        writer.add(make_episode(0))
    episode = make_episode(1)
    bare = Episode(episode.images, episode.state, episode.action, episode.task)
    with DatasetWriter(folder, contract, 20) as writer, pytest.raises(UserError, match=r"action\.expert is absent"):
        writer.add(bare)


@pytest.mark.slow
def test_sigkill(make_episode: MakeEpisode, tmp_path: Path, contract: Contract) -> None:
    """A real process, killed for real while it writes."""
    import os
    import signal
    import subprocess
    import sys

    code = """
import sys, numpy as np
from triune.data import Camera, Contract, Episode, Vector
from triune.data.writer import DatasetWriter
from triune.data.writer_v21 import WriterV21
contract = Contract.model_validate_json(sys.argv[2])
with DatasetWriter(sys.argv[1], contract, 20) as writer:
    while True:
        index = len(writer)
        images = {name: np.full((30, 96, 96, 3), index, np.uint8) for name in contract.camera_names}
        writer.add(Episode(images, np.full((30, 3), index), np.full((30, 3), index), "task", {"seed": index}))
        print(index, flush=True)
"""
    bigger = tuple(camera.model_copy(update={"height": 96, "width": 96}) for camera in contract.cameras)
    spoken = contract.model_copy(update={"cameras": bigger}).model_dump_json()
    folder = tmp_path / "killed"
    for round_ in range(2):
        with subprocess.Popen([sys.executable, "-c", code, str(folder), spoken], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            last = [int(process.stdout.readline()) for _ in range(4 + round_)][-1]
            os.kill(process.pid, signal.SIGKILL)
        dataset = open_dataset(folder)
        assert len(dataset.episodes) > last
        for info in dataset.episodes:
            assert (dataset.vectors["action"][info.frames] == info.index).all()
            assert info.meta["seed"] == info.index
        from lerobot.datasets import LeRobotDataset

        theirs = LeRobotDataset("local/test", root=folder, video_backend="pyav")
        assert theirs.num_episodes == len(dataset.episodes)
        assert float(theirs[len(theirs) - 1]["action"][0]) == len(dataset.episodes) - 1
    shutil.rmtree(folder)


def test_no_frame_of_a_video_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that stalls for a second, as on a busy machine: lerobot's queue of 30 frames overflows, and what follows moves up."""
    from lerobot.datasets.compute_stats import RunningQuantileStats

    size, count = 64, 60
    vectors = {name: Vector(names=("x",)) for name in ("state", "action")}
    contract = Contract(cameras=(Camera(name="top", height=size, width=size),), **vectors, rate=10.0)
    levels = 4 * np.arange(count, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (count, size, size, 3))
    still = np.zeros((count, 1), np.float32)
    stalls = iter([1.0])
    update = RunningQuantileStats.update
    monkeypatch.setattr(RunningQuantileStats, "update", lambda self, batch: (time.sleep(next(stalls, 0.0)), update(self, batch))[1])
    with DatasetWriter(tmp_path / "stalled", contract, 10, video=True) as writer:
        writer.add(Episode({"top": images}, still, still, "lift"))
    read = open_dataset(tmp_path / "stalled").load_images("top")
    np.testing.assert_allclose(read.mean((1, 2, 3)), levels, atol=3)

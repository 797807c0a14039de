"""Every format is read into the same dataset: LeRobotDataset v2.0 and v2.1, HDF5, and ids of the hub."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from triune.data import Episode, open_dataset
from triune.data.robot import load_robot
from triune.errors import UserError

MakeEpisode = Callable[..., Episode]
MakeV2 = Callable[..., Path]
MakeHdf5 = Callable[..., Path]
INFO = "meta/info.json"
ENV = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}}


@pytest.mark.parametrize(("version", "video"), [("v2.0", False), ("v2.1", False), ("v2.1", True)])
def test_v2(version: str, video: bool, make_v2: MakeV2, make_episode: MakeEpisode) -> None:
    dataset = open_dataset(make_v2(3, version, video))
    episodes = [make_episode(i, 8) for i in range(3)]
    assert (dataset.fps, dataset.cameras, dataset.contract.rate) == (20.0, ("top",), 20.0)
    assert dataset.tasks == ("lift the red cube", "stack the red cube")
    assert dataset.contract.state.names == ("x", "y", "z")
    assert dataset.contract.cameras[0].flip is None
    for info, episode in zip(dataset.episodes, episodes, strict=True):
        assert (info.length, info.task, dataset.task_of_frame[info.start]) == (8, episode.task, episode.task)
        np.testing.assert_array_equal(dataset.vectors["observation.state"][info.frames], episode.state)
        np.testing.assert_array_equal(dataset.vectors["action"][info.frames], episode.action)
    np.testing.assert_allclose(np.asarray(dataset.timestamps), np.tile(np.arange(8) / 20, 3), atol=1e-7)
    whole = np.concatenate([episode.images["agentview"] for episode in episodes])
    order = np.random.default_rng(0).permutation(24)
    if not video:
        np.testing.assert_array_equal(dataset.frames("top", order), whole[order])
        return
    read = dataset.load_images("top")
    np.testing.assert_array_equal(dataset.frames("top", order), read[order])
    distance = np.abs(read[:, None].astype(int) - whole[None]).mean((2, 3, 4))
    assert (distance.argmin(1) == np.arange(24)).all()  # noise as video: each frame is still nearest to its own


def test_v2_with_other_names(make_v2: MakeV2, make_episode: MakeEpisode) -> None:
    """openpi's LIBERO calls them image, state and actions: it opens, and a mapping gives them our names."""
    folder = make_v2(1)
    file = folder / INFO
    text = (
        file.read_text()
        .replace('"observation.images.top"', '"image"')
        .replace('"observation.state"', '"state"')
        .replace('"action"', '"actions"')
    )
    file.write_text(text)
    data = folder / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(data)
    names = {"observation.images.top": "image", "observation.state": "state", "action": "actions"}
    pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), data)
    dataset = open_dataset(folder)
    assert set(dataset.vectors) == {"state", "actions"}
    np.testing.assert_array_equal(dataset.frames("image", [3])[0], make_episode(0, 8).images["agentview"][3])


def test_hdf5(make_hdf5: MakeHdf5, make_episode: MakeEpisode) -> None:
    pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    episodes = [make_episode(i) for i in range(12)]
    language = {"language_instruction": "put the bowl on the plate"}
    path = make_hdf5(episodes, env_args=ENV, problem_info=language, macros_image_convention="opengl")
    dataset = open_dataset(path)
    assert (dataset.fps, dataset.cameras, dataset.tasks) == (20.0, ("agentview_rgb", "eye_in_hand_rgb"), ("put the bowl on the plate",))
    assert [camera.flip for camera in dataset.contract.cameras] == ["vertical", "vertical"]
    assert [info.meta["demo"] for info in dataset.episodes] == [f"demo_{i}" for i in range(12)]  # not demo_10 before demo_2
    assert (dataset.episodes[0].meta["filters"], "filters" in dataset.episodes[1].meta) == (["train"], False)
    assert set(dataset.vectors) == {"action", "observation.ee_pos", "observation.ee_ori", "observation.gripper_states"}
    whole = np.concatenate([episode.images["wrist"] for episode in episodes])[:, ::-1]
    order = np.random.default_rng(0).permutation(len(dataset))
    np.testing.assert_array_equal(dataset.frames("eye_in_hand_rgb", order), whole[order])
    np.testing.assert_array_equal(dataset.load_images("agentview_rgb", threads=2)[-1], episodes[-1].images["agentview"][-1, ::-1])
    libero = load_robot(
        "libero", ["cameras.agentview.height=16", "cameras.agentview.width=16", "cameras.wrist.height=16", "cameras.wrist.width=16"]
    )
    view = libero.view(dataset)
    assert (view.cameras, view.vectors["observation.state"].shape[1], view.contract.cameras[0].flip) == (("agentview", "wrist"), 8, "none")
    np.testing.assert_array_equal(view.frames("wrist", order), whole[order][:, ::-1])
    np.testing.assert_array_equal(view.vectors["observation.state"][:, 3:6], -view.vectors["observation.state"][:, :3])


def test_hdf5_folders_and_what_nobody_says(make_hdf5: MakeHdf5, make_episode: MakeEpisode, tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    for name, task in (("a", "open the drawer"), ("b", "close the drawer")):
        make_hdf5([make_episode(i) for i in range(2)], f"suite/{name}.hdf5", env_args=ENV, problem_info={"language_instruction": task})
    dataset = open_dataset(tmp_path / "suite")
    assert [info.task for info in dataset.episodes] == ["open the drawer"] * 2 + ["close the drawer"] * 2
    assert [camera.flip for camera in dataset.contract.cameras] == [None, None]
    np.testing.assert_array_equal(dataset.frames("agentview_rgb", [0, len(dataset) - 1])[1], make_episode(1).images["agentview"][-1, ::-1])
    bare = open_dataset(make_hdf5([make_episode(0)], "bare.hdf5"))
    assert math.isnan(bare.fps)
    assert (bare.contract.rate, bare.tasks) == (None, ("unknown task",))
    sizes = [f"cameras.{camera}.{side}=16" for camera in ("agentview", "wrist") for side in ("height", "width")]
    robot = load_robot("libero", [*sizes, "rate=unknown"])
    with pytest.raises(UserError, match="neither says the control rate"):
        robot.view(bare)
    make_hdf5([make_episode(0)], "suite/c.hdf5", env_args={"env_kwargs": {"control_freq": 10}})
    with pytest.raises(UserError, match="differ in control_freq"):
        open_dataset(tmp_path / "suite")


def test_hub_ids(make_v2: MakeV2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only where no such folder exists, and only in the form user/name; a revision comes behind @."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, asked = make_v2(1), []

    def download(repository: str, repo_type: str, revision: str | None) -> str:
        asked.append((repository, repo_type, revision))
        if repository == "lerobot/nothing":
            raise LocalEntryNotFoundError("not in the cache")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert len(open_dataset("lerobot/pusht")) == len(open_dataset("lerobot/pusht@v2.1")) == 8
    with pytest.raises(UserError, match="nor such a dataset of the hub in the cache"):
        open_dataset("lerobot/nothing")
    for local in ("runs/typo", "typo", "/nowhere/typo", "a/b/c"):
        with pytest.raises(UserError, match="there is no dataset folder"):
            open_dataset(local)
    assert asked == [("lerobot/pusht", "dataset", None), ("lerobot/pusht", "dataset", "v2.1"), ("lerobot/nothing", "dataset", None)]


NO_LIBRARY = """
import sys
from triune.data import open_dataset
open_dataset(sys.argv[1]).frames("top", [0])
print(sorted({"lerobot", "torch", "datasets"} & set(sys.modules)))
"""


def test_reading_needs_no_lerobot(make_v2: MakeV2) -> None:
    done = subprocess.run([sys.executable, "-c", NO_LIBRARY, str(make_v2(1))], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "no episodes": (lambda d: (d / "meta/episodes.jsonl").unlink(), "episodes.jsonl is missing"),
    "torn line": (lambda d: edit(d / "meta/episodes.jsonl", '{"episode_index": 0, ', '{"episode'), "is no JSON in line 1"),
    "lost line": (lambda d: edit(d / "meta/episodes.jsonl", '{"episode_index": 1, "tasks"', "{}\n"), "line 3|without valid episode_index"),
    "no tasks": (lambda d: (d / "meta/tasks.jsonl").write_text(""), "names no task"),
    "unknown task": (lambda d: edit(d / "meta/tasks.jsonl", '"task_index": 3', '"task_index": 5'), "tasks that its list of tasks"),
    "lost data": (lambda d: (d / "data/chunk-000/episode_000001.parquet").unlink(), "episode_000001.parquet is missing"),
    "wrong length": (
        lambda d: edit(d / "meta/episodes.jsonl", '"length": 8', '"length": 7'),
        "holds 16 frames where the metadata counts 14",
    ),
    "wrong width": (lambda d: edit(d / INFO, '"shape": [3]', '"shape": [4]'), "does not hold '.*' with 4 numbers"),
    "no such column": (lambda d: edit(d / INFO, '"action"', '"acts"'), "does not hold 'acts'"),
    "no vectors": (lambda d: edit(d / INFO, '"shape": [3]', '"shape": [1, 3]'), "neither states nor actions"),
    "strange path": (lambda d: edit(d / INFO, "{episode_chunk:03d}/episode", "{episode_chunk.__class__}/episode"), "is not a path with"),
    "path that leads out": (lambda d: edit(d / INFO, "data/chunk-{", "../../chunk-{"), "leads out of the dataset"),
    "fps": (lambda d: edit(d / INFO, '"fps": 20', '"fps": -1'), "'fps': Input should be greater than 0"),
    "features": (lambda d: edit(d / INFO, '"dtype": "image"', '"dtype": 7'), "'features.observation.images.top.dtype'"),
    "nested": (lambda d: (d / INFO).write_text("[" * 100_000), "is cut off or not JSON"),
    "a list": (lambda d: (d / INFO).write_text("[]"), "holds no JSON object"),
    "no folder": (shutil.rmtree, "there is no dataset folder"),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_v2(name: str, make_v2: MakeV2) -> None:
    folder = make_v2(2)
    harm, message = BREAK[name]
    harm(folder)
    with pytest.raises(UserError, match=message):
        open_dataset(folder)


def test_a_writer_refuses_v2(make_v2: MakeV2, contract: object) -> None:
    from triune.data.writer import DatasetWriter

    with pytest.raises(UserError, match="is a LeRobotDataset v2.1, v3 is needed; convert it with `vla data convert"):
        DatasetWriter(make_v2(1), contract, 20)  # type: ignore[arg-type]


def test_a_last_line_that_was_being_written(make_v2: MakeV2) -> None:
    folder = make_v2(2)
    with (folder / "meta/episodes.jsonl").open("a") as file:
        file.write('{"episode_index": 2, "tas')
    assert len(open_dataset(folder).episodes) == 2
    assert json.loads((folder / INFO).read_text())["total_episodes"] == 2

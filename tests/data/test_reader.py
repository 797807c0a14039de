"""Opening datasets: ours, lerobot's own, and what is wrong with broken ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from triune.data import Contract, Episode, open_dataset
from triune.data.inspect import inspect
from triune.errors import UserError

MakeEpisode = Callable[..., Episode]
MakeDataset = Callable[..., Path]


def test_contract_comes_with_the_data(make_dataset: MakeDataset, contract: Contract) -> None:
    dataset = open_dataset(make_dataset(1))
    assert dataset.contract == contract
    assert dataset.cameras == contract.camera_names
    assert dataset.fps == 20.0


def test_contract_of_others_says_what_is_unknown(make_dataset: MakeDataset, contract: Contract) -> None:
    folder = make_dataset(1)
    (folder / "meta/triune.json").unlink()
    (folder / "meta/triune_episodes.jsonl").unlink()
    dataset = open_dataset(folder)
    found = dataset.contract
    assert [(c.name, c.height, c.width, c.flip) for c in found.cameras] == [("agentview", 16, 16, None), ("wrist", 16, 16, None)]
    assert (found.state.names, found.action.names) == (contract.state.names, contract.action.names)
    assert (found.state.units, found.action.gripper, found.action.mode, found.render, found.rate) == (None, None, None, None, 20.0)
    assert not contract.conflicts(found)
    assert dataset.episodes[0].meta == {}


def test_numbered_names_are_unknown(contract: Contract) -> None:
    """Who knows nothing of a state's dimensions numbers them, which is no conflict; the number of them is."""
    nameless = contract.state.model_copy(update={"names": ("state_0", "state_1", "state_2")})
    assert not contract.conflicts(contract.model_copy(update={"state": nameless}))
    other = contract.state.model_copy(update={"names": ("x", "y", "yaw")})
    assert "state: names" in contract.conflicts(contract.model_copy(update={"state": other}))[0]
    shorter = contract.state.model_copy(update={"names": ("state_0",)})
    assert "3 dimensions" in contract.conflicts(contract.model_copy(update={"state": shorter}))[0]


def test_lerobots_own_dataset(tmp_path: Path) -> None:
    """Names as mappings, scalar features, channel-first shapes: what other recorders write."""
    from lerobot.datasets import LeRobotDataset

    features = {
        "observation.images.top": {"dtype": "image", "shape": (16, 24, 3), "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": (1,), "names": None},
        "action": {"dtype": "float64", "shape": (2,), "names": {"motors": ["shoulder", "elbow"]}},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }
    theirs = LeRobotDataset.create("local/test", 10, features, root=tmp_path / "d", use_videos=False, video_backend="pyav")
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)
    for step in range(6):
        row = {
            "observation.images.top": images[step],
            "observation.state": np.float32([step]),
            "action": np.array([step, -step], np.float64),
        }
        theirs.add_frame(row | {"next.reward": np.float32([0.5]), "next.done": np.array([step == 5]), "task": "fold"})
    theirs.save_episode()
    theirs.finalize()
    dataset = open_dataset(tmp_path / "d")
    assert dataset.contract.action.names == ("shoulder", "elbow")
    assert dataset.contract.state.names == ("state_0",)
    assert {key: value.shape for key, value in dataset.vectors.items()} == {
        "observation.state": (6, 1),
        "action": (6, 2),
        "next.reward": (6, 1),
    }
    assert all(value.dtype == np.float32 for value in dataset.vectors.values())
    np.testing.assert_array_equal(dataset.load_images("top"), images)


def test_frames_in_any_order(make_dataset: MakeDataset, make_episode: MakeEpisode) -> None:
    dataset = open_dataset(make_dataset(4))
    whole = np.concatenate([make_episode(i).images["wrist"] for i in range(4)])
    order = np.random.default_rng(0).integers(0, len(dataset), 100)
    np.testing.assert_array_equal(dataset.frames("wrist", order), whole[order])
    seen: list[tuple[int, int]] = []
    np.testing.assert_array_equal(dataset.load_images("wrist", threads=2, progress=lambda *at: seen.append(at)), whole)
    assert dataset.task_of_frame[0] == "lift the red cube"
    assert dataset.task_of_frame[-1] == "stack the red cube"
    with pytest.raises(UserError, match="no camera 'front'; it has agentview, wrist"):
        dataset.frames("front", [0])
    with pytest.raises(IndexError, match="of a dataset of"):
        dataset.frames("wrist", [len(dataset)])


def test_inspect(make_dataset: MakeDataset) -> None:
    found = json.loads(json.dumps(inspect(make_dataset(2))))
    assert (found["episodes"], found["frames"], found["episode_length"]) == (2, 11, {"min": 5, "mean": 5.5, "max": 6})
    assert found["tasks"] == {"lift the red cube": 1, "stack the red cube": 1}
    assert [row["name"] for row in found["ranges"]["action"]] == ["dx", "dy", "gripper"]
    assert "action units" in found["unknown"]
    assert "state units" not in found["unknown"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_info(folder: Path, **changes: object) -> None:
    file = folder / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "there is no dataset folder"),
    "not a dataset": (lambda d: shutil.rmtree(d / "meta"), "is not a LeRobotDataset"),
    "torn info": (lambda d: (d / "meta/info.json").write_text('{"codebase'), "cut off or not JSON"),
    "version": (lambda d: edit_info(d, codebase_version="v1.6"), "is a LeRobotDataset v1.6, v2.0 or v2.1 or v3 is needed"),
    "wrong version": (lambda d: edit_info(d, codebase_version="v2.1"), "meta/episodes.jsonl is missing; copy the dataset again"),
    "empty": (lambda d: edit_info(d, total_episodes=0), "holds no episodes yet"),
    "unfinalised data": (lambda d: truncate(d / "data/chunk-000/file-000.parquet"), "stopped before finalize"),
    "unfinalised episodes": (lambda d: truncate(d / "meta/episodes/chunk-000/file-000.parquet"), "stopped before finalize"),
    "lost data": (lambda d: (d / "data/chunk-000/file-000.parquet").unlink(), "is missing; copy the dataset again"),
    "lost episodes": (lambda d: shutil.rmtree(d / "meta/episodes"), "describes 0 of the 2 episodes"),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken(name: str, make_dataset: MakeDataset) -> None:
    folder = make_dataset(2)
    harm, message = BREAK[name]
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(folder)
    assert "\n" not in str(error.value)

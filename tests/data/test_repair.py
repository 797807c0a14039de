"""A recorder is killed, files are cut: every whole episode is saved, for us and for lerobot."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triune.data import Episode, open_dataset
from triune.data.repair import repair
from triune.data.salvage import read_row_groups, rebuild
from triune.data.thrift import read_struct, write_struct
from triune.data.writer_v21 import encode_video
from triune.errors import UserError

MakeDataset = Callable[..., Path]
MakeEpisode = Callable[..., Episode]

RECORDER = """
import os, sys
import numpy as np
from lerobot.datasets import LeRobotDataset

alive = []
for kind in ("image", "video"):
    features = {
        "observation.images.top": {"dtype": kind, "shape": (64, 64, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }
    video = kind == "video"
    dataset = LeRobotDataset.create("local/test", 10, features, root=f"{sys.argv[1]}/{kind}", use_videos=video, video_backend="pyav",
                                    streaming_encoding=video)
    for episode in range(4):
        length = 6 + episode
        for step in range(length):
            picture = np.full((64, 64, 3), 10 * episode + 3 * step, np.uint8)
            dataset.add_frame({"observation.images.top": picture, "observation.state": np.float32([episode, step, 0.5]),
                               "action": np.float32([step, -episode]), "next.done": np.array([step == length - 1]),
                               "task": f"task {episode % 2}"})
        dataset.save_episode()
    alive.append(dataset)  # a deleted one would finalize itself
os._exit(9)  # before finalize(): no footer, no row of any episode
"""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes (6, 7, 8, 9 frames) of lerobot's own recorder, which died before finalize(), as images and as videos."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, "-c", RECORDER, str(folder)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    return folder


@pytest.fixture(params=["image", "video"])
def killed(request: pytest.FixtureRequest, recordings: Path) -> tuple[Path, str]:
    return recordings / request.param, request.param


def holds(folder: Path, episodes: list[int], tolerance: float) -> None:
    """The dataset has these of the recorder's episodes, for our reader and for lerobot's."""
    from lerobot.datasets import LeRobotDataset

    dataset = open_dataset(folder)
    theirs = LeRobotDataset("local/test", root=folder, video_backend="pyav")
    assert (len(dataset.episodes), theirs.num_episodes, len(theirs)) == (len(episodes), len(episodes), len(dataset))
    for info, number in zip(dataset.episodes, episodes, strict=True):
        steps = np.arange(6 + number)
        assert info.length == len(steps)
        np.testing.assert_array_equal(dataset.vectors["action"][info.frames], np.stack([steps, np.full_like(steps, -number)], 1))
        pictures = dataset.frames("top", info.start + steps).astype(float).mean((1, 2, 3))
        np.testing.assert_allclose(pictures, 10 * number + 3 * steps, atol=tolerance)
        item = theirs[info.start + len(steps) - 1]
        assert (item["task"], int(item["episode_index"]), bool(item["next.done"])) == (f"task {number % 2}", info.index, True)
        assert abs(float(item["observation.images.top"].mean()) * 255 - (10 * number + 3 * steps[-1])) <= tolerance + 1e-3
    assert json.loads((folder / "meta/info.json").read_text())["total_frames"] == len(dataset)
    assert set(json.loads((folder / "meta/stats.json").read_text())) >= {"action", "observation.images.top"}


def test_a_recorder_that_was_killed(killed: tuple[Path, str], tmp_path: Path) -> None:
    folder, kind = tmp_path / "d", killed[1]
    shutil.copytree(killed[0], folder)
    with pytest.raises(UserError, match="vla data repair"):
        open_dataset(folder)
    done = repair(folder)
    assert (done["changed"], done["kept"], done["lost"], done["path"]) == (True, 4, [], str(folder))
    holds(folder, [0, 1, 2, 3], 0 if kind == "image" else 2)
    assert (Path(done["backup"]) / "meta/info.json").is_file()
    assert repair(folder) == {"path": str(folder), "backup": None, "changed": False, "kept": 4, "lost": []}


def test_data_cut_anywhere(killed: tuple[Path, str], tmp_path: Path) -> None:
    content = (killed[0] / "data/chunk-000/file-000.parquet").read_bytes()
    sizes = np.random.default_rng(0).integers(0, len(content), 4).tolist()
    kept = []
    for size in sorted([50, *sizes, len(content) - 1]):
        folder, out = tmp_path / f"{size}", tmp_path / f"out{size}"
        shutil.copytree(killed[0], folder)
        (folder / "data/chunk-000/file-000.parquet").write_bytes(content[:size])
        kept.append(saved(folder, out))
        if kept[-1]:
            holds(out, list(range(kept[-1])), 0 if killed[1] == "image" else 2)
    assert kept == sorted(kept) and (kept[0], kept[-1]) == (0, 3)


def saved(folder: Path, out: Path) -> int:
    """How many episodes a repair keeps; the last ones of four are lost."""
    try:
        done = repair(folder, out)
    except UserError:
        assert not out.exists()
        return 0
    assert [entry["episode"] for entry in done["lost"]] == list(range(done["kept"], 4))
    return int(done["kept"])


@pytest.mark.parametrize("killed", ["video"], indirect=True)
def test_video_cut(killed: tuple[Path, str], tmp_path: Path) -> None:
    """A video that ends early costs the episodes at its end."""
    folder = tmp_path / "d"
    shutil.copytree(killed[0], folder)
    pictures = [np.full((64, 64, 3), 10 * episode + 3 * step, np.uint8) for episode in range(4) for step in range(6 + episode)]
    video = folder / "videos/observation.images.top/chunk-000/file-000.mp4"
    encode_video(video, np.stack(pictures[:17]), 10)  # of 30 frames: two episodes and a bit
    done = repair(folder)
    assert done["kept"] == 2
    assert [entry["why"] for entry in done["lost"]] == ["its video of observation.images.top is cut off"] * 2
    holds(folder, [0, 1], 2)
    content = video.read_bytes()
    video.write_bytes(content[:-200])
    with pytest.raises(UserError, match="no whole episode"):
        repair(folder)
    video.write_bytes(content)
    assert repair(folder)["changed"] is False


BREAK: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "lost rows of episodes": (lambda d: shutil.rmtree(d / "meta/episodes"), [0, 1, 2, 3]),
    "cut rows of episodes": (lambda d: cut(d / "meta/episodes/chunk-000/file-000.parquet"), [0, 1, 2, 3]),
    "lost tasks": (lambda d: (d / "meta/tasks.parquet").unlink(), [0, 1, 2, 3]),
    "cut statistics and a high count": (lambda d: (cut(d / "meta/stats.json"), count(d, 9)), [0, 1, 2, 3, None, None, None, None, None]),
    "low count": (lambda d: count(d, 2), [0, 1, 2, 3]),
    "cut data": (lambda d: cut(d / "data/chunk-000/file-000.parquet"), [0, 1, 2, 3]),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def count(folder: Path, episodes: int) -> None:
    file = folder / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_episodes": episodes}))


@pytest.mark.parametrize("name", BREAK)
def test_our_own_recordings(name: str, make_dataset: MakeDataset, make_episode: MakeEpisode) -> None:
    folder = make_dataset(4)
    harm, episodes = BREAK[name]
    harm(folder)
    done = repair(folder)
    assert (done["changed"], done["kept"]) == (True, 4)
    assert [entry["episode"] for entry in done["lost"]] == [i for i, e in enumerate(episodes) if e is None]
    dataset = open_dataset(folder)
    for info in dataset.episodes:
        episode = make_episode(info.index)
        np.testing.assert_array_equal(dataset.vectors["action.expert"][info.frames], episode.extra["action.expert"])
        np.testing.assert_array_equal(dataset.frames("wrist", range(info.start, info.frames.stop)), episode.images["wrist"])
        assert info.task == (episode.task if name != "lost tasks" else info.task) and info.meta["seed"] == info.index
    assert dataset.contract.action.gripper == "+1 closes"


def test_an_episode_in_the_middle(make_dataset: MakeDataset, make_episode: MakeEpisode, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is gone; the episodes behind it move up."""
    from triune.data import tail

    monkeypatch.setattr(tail, "FILE_BYTES", 1)
    folder = make_dataset(4)
    (folder / "data/chunk-000/file-001.parquet").unlink()
    done = repair(folder)
    assert (done["kept"], done["lost"]) == (3, [{"episode": 1, "why": "its frames are gone"}])
    dataset = open_dataset(folder)
    assert [info.meta["seed"] for info in dataset.episodes] == [0, 2, 3]
    np.testing.assert_array_equal(dataset.vectors["action"][dataset.episodes[1].frames], make_episode(2).action)


def test_refusals(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder = make_dataset(1)
    (folder / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        repair(folder, tmp_path / "there")
    with pytest.raises(UserError, match="no whole episode"):
        repair(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dataset", "there"]


@pytest.mark.parametrize("dictionary", [False, True])
def test_footers_are_rebuilt(dictionary: bool) -> None:
    """Row groups of all kinds of columns, several pages in some, with and without dictionaries."""
    generator = np.random.default_rng(0)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("done", pa.bool_()), ("state", pa.list_(pa.float32(), 3)), ("task", pa.string()), ("index", pa.int64())]
    )
    entries = [1, 1, 1, 3, 1, 1]
    buffer = io.BytesIO()
    groups = []
    with pq.ParquetWriter(buffer, schema, compression="snappy", use_dictionary=dictionary, data_page_size=2000) as writer:
        for rows in (40, 7, 300):
            blobs = [generator.bytes(100) for _ in range(rows)]
            columns = {
                "image": [{"bytes": blob, "path": None} for blob in blobs],
                "done": generator.integers(0, 2, rows).astype(bool),
                "state": generator.normal(size=(rows, 3)).astype(np.float32).tolist(),
                "task": ["fold"] * rows,
                "index": np.arange(rows),
            }
            groups.append(pa.table(columns, schema=schema))
            writer.write_table(groups[-1])
        unfinished = buffer.getvalue()
    whole = buffer.getvalue()
    footer = whole[-8 - int.from_bytes(whole[-8:-4], "little") : -8]
    assert write_struct(read_struct(footer, 0)[0]) == footer
    rebuilt = rebuild(unfinished, schema, entries)
    assert rebuilt is not None
    assert pq.read_table(io.BytesIO(rebuilt)).equals(pa.concat_tables(groups))
    before = 0
    for size in sorted(generator.integers(0, len(unfinished), 30).tolist()):
        part = rebuild(unfinished[:size], schema, entries)
        count = 0 if part is None else pq.ParquetFile(io.BytesIO(part)).num_row_groups
        if part is not None:
            assert pq.read_table(io.BytesIO(part)).equals(pa.concat_tables(groups[:count]))
        assert count >= before
        before = count


def test_hostile_bytes(tmp_path: Path) -> None:
    """Changed bytes in a file without footer: some row groups, or none; never an error, never a hang."""
    generator = np.random.default_rng(1)
    schema = pa.schema([("a", pa.int64()), ("b", pa.list_(pa.float32(), 2))])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="snappy") as writer:
        for _ in range(3):
            writer.write_table(pa.table({"a": np.arange(50), "b": generator.normal(size=(50, 2)).tolist()}, schema=schema))
        content = buffer.getvalue()
    file = tmp_path / "f.parquet"
    for _ in range(150):
        harmed = bytearray(content)
        for place in generator.integers(4, len(content), 3):
            harmed[place] = generator.integers(0, 256)
        file.write_bytes(bytes(harmed))
        groups, _ = read_row_groups(file, schema, [1, 2])
        assert all(len(group) == 50 for group in groups)

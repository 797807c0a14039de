"""Every format into every other: the same numbers, the same pixels; killed conversions go on; lerobot's converter takes our v2.1."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triune.data import Camera, Contract, Episode, Vector, open_dataset, writer_v21
from triune.data.convert import WRITERS, convert
from triune.data.readers.lerobot import Dataset
from triune.data.robot import load_robot
from triune.data.writer_v21 import WriterV21
from triune.errors import UserError

MakeDataset = Callable[..., Path]
MakeEpisode = Callable[..., Episode]
Make = Callable[..., Path]


def equal(a: Dataset, b: Dataset) -> None:
    assert (a.cameras, a.fps, a.contract) == (b.cameras, b.fps, b.contract)
    assert [(e.start, e.length, e.task, e.meta) for e in a.episodes] == [(e.start, e.length, e.task, e.meta) for e in b.episodes]
    assert set(a.vectors) == set(b.vectors)
    for key in a.vectors:
        np.testing.assert_array_equal(a.vectors[key], b.vectors[key])
    for camera in a.cameras:
        np.testing.assert_array_equal(a.load_images(camera), b.load_images(camera))


def test_there_and_back(make_dataset: MakeDataset, tmp_path: Path) -> None:
    first = open_dataset(make_dataset(3))
    done = convert(first, tmp_path / "v21", "v2.1")
    assert done["images"] == {"agentview": "equal", "wrist": "equal"}
    assert (done["version"], done["episodes"], done["frames"], done["skipped"]) == ("v2.1", 3, len(first), [])
    second = open_dataset(tmp_path / "v21")
    equal(first, second)
    steps: list[tuple[int, int]] = []
    convert(second, tmp_path / "v30", "v3.0", progress=lambda *at: steps.append(at))
    equal(first, open_dataset(tmp_path / "v30"))
    assert steps == [(i + 1, 6) for i in range(6)]


@pytest.mark.parametrize("video", [False, True])
def test_lerobots_converter_takes_our_v21(video: bool, make_dataset: MakeDataset, make_episode: MakeEpisode, tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDataset
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    folder = tmp_path / "v21"
    convert(open_dataset(make_dataset(3)), folder, "v2.1", video=video)
    before = open_dataset(folder)
    convert_dataset("local/test", root=folder, push_to_hub=False)
    after, theirs = open_dataset(folder), LeRobotDataset("local/test", root=folder, video_backend="pyav")
    for key in before.vectors:
        np.testing.assert_array_equal(before.vectors[key], after.vectors[key])
    assert [e.task for e in before.episodes] == [e.task for e in after.episodes]
    if not video:
        np.testing.assert_array_equal(after.load_images("wrist"), np.concatenate([make_episode(i).images["wrist"] for i in range(3)]))
    assert (theirs.num_episodes, len(theirs)) == (3, len(before))
    np.testing.assert_array_equal(theirs[7]["action"].numpy(), before.vectors["action"][7])
    assert theirs[7]["task"] == before.task_of_frame[7]


def test_video_says_how_much_was_lost(make_dataset: MakeDataset, make_episode: MakeEpisode, contract: Contract, tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 200, 16)[None, :, None, None], (8, 16, 16, 3)).astype(np.uint8)
    episode = make_episode(0, 8)
    moving = smooth + np.arange(8, dtype=np.uint8)[:, None, None, None]
    with WriterV21(tmp_path / "a", contract, 20) as writer:
        writer.add(Episode(dict.fromkeys(contract.camera_names, moving), episode.state, episode.action, episode.task, {}, episode.extra))
    done = convert(open_dataset(tmp_path / "a"), tmp_path / "b", "v2.1", video=True)
    assert done["images"]["wrist"]["mean_db"] >= done["images"]["wrist"]["worst_db"] > 35
    with WriterV21(tmp_path / "b", contract, 20) as writer, pytest.raises(UserError, match=r"its observation\.images\.agentview is image"):
        writer.add(episode)
    small = Episode({n: i[:, :15] for n, i in episode.images.items()}, episode.state, episode.action, episode.task)
    with WriterV21(tmp_path / "c", contract, 20, video=True) as writer, pytest.raises(UserError, match="even height and width"):
        writer.add(small)


def test_hdf5_through_a_mapping(make_hdf5: Make, make_episode: MakeEpisode, tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    env = {"env_name": "Lift", "env_kwargs": {"control_freq": 20}}
    path = make_hdf5([make_episode(i) for i in range(3)], env_args=env, macros_image_convention="opengl")
    sizes = [f"cameras.{camera}.{side}=16" for camera in ("agentview", "wrist") for side in ("height", "width")]
    view = load_robot("libero", sizes).view(open_dataset(path))
    for version in WRITERS:
        convert(view, tmp_path / version, version, robot="panda")
        equal(view, open_dataset(tmp_path / version))
        assert json.loads((tmp_path / version / "meta/info.json").read_text())["robot_type"] == "panda"
    np.testing.assert_array_equal(open_dataset(tmp_path / "v3.0").frames("wrist", [0])[0], make_episode(0).images["wrist"][0])
    with pytest.raises(UserError, match=r"has no observation.state under that name .* give it as --robot"):
        convert(open_dataset(path), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_vectors_alone(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """A dataset without cameras."""
    first = open_dataset(make_dataset(2))
    bare = first.contract.model_copy(update={"cameras": ()})
    view = Dataset(first.path, bare, first.fps, {}, first.episodes, first.vectors, first.tasks, first.task_index)
    for version in WRITERS:
        assert convert(view, tmp_path / version, version)["images"] == {}
        equal(view, open_dataset(tmp_path / version))


class Killed(BaseException):
    """Stands for SIGKILL."""


POINTS = ("frames", "episodes", "stats", "facts", "info")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", range(len(POINTS)), ids=POINTS)
def test_a_killed_conversion_goes_on(
    point: int, after: bool, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead at any file of the third episode: two (or three) are there and readable; the same call finishes the rest."""
    source, out = open_dataset(make_dataset(4)), tmp_path / "v21"
    names = ("publish", "append_json", "append_json", "append_json", "write_file")
    calls = {"publish": 0, "append_json": 0, "write_file": 0}
    # of the third episode: its one file, its lines, info.json (write_file also writes the contract once)
    fatal = {"publish": 2, "append_json": 2 * 3 + 2, "write_file": 3}
    ordinal = fatal[names[point]] + (point - 1 if names[point] == "append_json" else 0)

    def dying(name: str) -> Callable[..., object]:
        real = getattr(writer_v21, name)

        def call(*arguments: object) -> object:
            here = name == names[point] and calls[name] == ordinal
            calls[name] += 1
            if here and not after:
                raise Killed
            done = real(*arguments)
            if here:
                raise Killed
            return done

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(writer_v21, name, dying(name))
        with pytest.raises(Killed):
            convert(source, out, "v2.1")
    there = open_dataset(out)
    assert len(there.episodes) == (3 if after and POINTS[point] == "info" else 2)
    np.testing.assert_array_equal(there.vectors["action"], source.vectors["action"][: len(there)])
    convert(source, out, "v2.1")
    equal(source, open_dataset(out))
    lines = [(out / "meta" / name).read_text().count("\n") for name in ("episodes.jsonl", "episodes_stats.jsonl", "tasks.jsonl")]
    assert lines == [4, 4, 2]


def test_refusals(make_dataset: MakeDataset, make_v2: Make, tmp_path: Path) -> None:
    source = open_dataset(make_dataset(2))
    convert(source, tmp_path / "out", "v2.1")
    with pytest.raises(UserError, match="episodes that are not those of"):
        convert(open_dataset(make_dataset(1, "other")), tmp_path / "out", "v2.1")
    with pytest.raises(UserError, match="choose v3.0 or v2.1"):
        convert(source, tmp_path / "out2", "v1.6")
    with pytest.raises(UserError, match="is the source itself"):
        convert(source, source.path)
    with pytest.raises(UserError, match="is a LeRobotDataset v2.1, v3 is needed"):
        convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="names its files otherwise"):
        WriterV21(make_v2(1), source.contract, 20)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a dataset"):
        convert(source, tmp_path / "mine", "v2.1")
    with WriterV21(tmp_path / "out", source.contract, 20), pytest.raises(UserError, match="being written by another"):
        WriterV21(tmp_path / "out", source.contract, 20)
    data = tmp_path / "out/data/chunk-000"
    shutil.copyfile(data / "episode_000001.parquet", data / "episode_000000.parquet")
    with pytest.raises(UserError, match="in another order or of other lengths|holds .* frames where"):
        convert(source, tmp_path / "out", "v2.1")


def test_one_frame_is_left_out(make_v2: Make, tmp_path: Path) -> None:
    source = open_dataset(make_v2(2))
    first, second = source.episodes
    source.episodes = [type(first)(0, 0, 1, first.task), type(first)(1, 1, 7, first.task), type(first)(2, 8, 8, second.task)]
    done = convert(source, tmp_path / "out", "v2.1")
    assert (done["skipped"], done["episodes"], done["frames"]) == ([0], 2, 15)


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Contract, list[Episode]]:
    """One to three episodes of any small sizes, values and texts."""
    cameras = draw(st.lists(st.sampled_from(["top", "wrist", "side"]), max_size=2, unique=True))
    height, width, state, action = (draw(st.integers(1, n)) for n in (9, 9, 4, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    named = [Vector(names=tuple(f"{letter}{i}" for i in range(count))) for letter, count in (("s", state), ("a", action))]
    contract = Contract(
        cameras=tuple(Camera(name=c, height=height, width=width) for c in cameras), state=named[0], action=named[1], rate=10
    )
    episodes = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(2, 5))
        images = {c: generator.integers(0, 256, (count, height, width, 3), np.uint8) for c in cameras}
        numbers = [generator.normal(size=(count, n)).astype(np.float32) * 10.0 ** draw(st.integers(-9, 9)) for n in (state, action)]
        task = draw(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1, max_size=12))
        episodes.append(Episode(images, numbers[0], numbers[1], task, {"seed": draw(st.integers(0, 9))}))
    return contract, episodes


@pytest.mark.parametrize(("version", "examples"), [("v2.1", 25), ("v3.0", 6)])
def test_write_then_read(version: str, examples: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Property: what any writer wrote is what the reader reads."""

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(recordings())
    def check(recorded: tuple[Contract, list[Episode]]) -> None:
        contract, episodes = recorded
        folder = tmp_path_factory.mktemp(version)
        with WRITERS[version](folder / "d", contract, 10) as writer:
            for episode in episodes:
                writer.add(episode)
        dataset = open_dataset(folder / "d")
        assert [(e.length, e.task, e.meta) for e in dataset.episodes] == [(len(e), e.task, e.meta) for e in episodes]
        assert dataset.contract == contract
        for key, values in (("observation.state", [e.state for e in episodes]), ("action", [e.action for e in episodes])):
            np.testing.assert_array_equal(dataset.vectors[key], np.concatenate(values))
        for camera in dataset.cameras:
            np.testing.assert_array_equal(dataset.load_images(camera), np.concatenate([e.images[camera] for e in episodes]))

    check()

"""Recording and converting, killed at any moment or out of disk: nothing that was there is lost, and the end is that of a straight run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from triune.data import open_dataset

from ..kills import Ended, Stage, filled, killed
from .test_record import same_files

EPISODES = 5
WARM = (
    "triune.cli.main",
    "triune.envs.record",
    "triune.data.convert",
    "lerobot.datasets",
    "datasets",
    "h5py",
    "PIL.PngImagePlugin",
    "point_world",
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage"), *WARM) as stage:
        yield stage


class Trial:
    """A command that writes a dataset, run as often as it takes.

    Args:
        kind: ``record``, or the version to convert into.
        source: what is converted.
    """

    def __init__(self, stage: Stage, kind: str, source: Path | None, folder: Path) -> None:
        self.stage, self.kind, self.source, self.out = stage, kind, source, folder / "data"
        self.have = 0
        folder.mkdir(parents=True)

    def go(self, **plan: float) -> Ended:
        if self.kind == "record":
            return self.stage.run("point_world:record_some", self.out, str(EPISODES), beneath=self.out, **plan)  # type: ignore[arg-type]
        command = ("data", "convert", self.source or "", self.out, "--to", self.kind)
        return self.stage.run("triune.cli.main:main", *command, beneath=self.out, **plan)  # type: ignore[arg-type]

    def another(self, folder: Path) -> "Trial":
        """The same command, into another folder."""
        return Trial(self.stage, self.kind, self.source, folder)

    def check(self) -> None:
        """What is counted is whole and no less than before; now and then also for lerobot."""
        if (self.out / "meta/info.json").exists():
            dataset = open_dataset(self.out)
            assert len(dataset.episodes) >= self.have
            self.have = len(dataset.episodes)
            for camera in dataset.cameras:
                assert len(dataset.load_images(camera)) == len(dataset)
            if self.out.parent.name.endswith("4") and self.kind != "v2.1":
                check_in_lerobot(self.out)
        assert (self.out / "meta/info.json").exists() or not self.have


def check_in_lerobot(folder: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    ours, theirs = open_dataset(folder), LeRobotDataset("local/test", root=folder, video_backend="pyav")
    assert (theirs.num_episodes, len(theirs)) == (len(ours.episodes), len(ours))
    for index in (0, len(ours) - 1):
        np.testing.assert_array_equal(theirs[index]["action"].numpy(), ours.vectors["action"][index])
        picture = (theirs[index]["observation.images.wrist"] * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(picture, ours.frames("wrist", [index])[0])


@pytest.fixture(scope="module")
def straights(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trial, Ended]]:
    """Kind -> the dataset that nothing happened to; the second run, once everything is warm."""
    found: dict[str, tuple[Trial, Ended]] = {}
    for kind in ("record", "v3.0", "v2.1"):
        for attempt in ("first", "second"):
            source = found["record"][0].out if found else None
            trial = Trial(stage, kind, source, tmp_path_factory.mktemp("straight") / attempt)
            ended = trial.go()
            assert ended.code == 0, ended.said
        found[kind] = trial, ended
    return found


@pytest.mark.parametrize(("kind", "kills"), [("record", 2), ("v3.0", 1), ("v2.1", 1)])
def test_killed_at_random_moments(kind: str, kills: int, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    expected, whole = straights[kind]
    for trial in killed(expected.another, whole, tmp_path, kills):
        same_files(trial.out, expected.out)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("record", 30), ("v3.0", 15), ("v2.1", 15)])
def test_killed_at_many_moments(kind: str, kills: int, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    expected, whole = straights[kind]
    for trial in killed(expected.another, whole, tmp_path, kills, first=1000):
        same_files(trial.out, expected.out)


@pytest.mark.parametrize("kind", ["record", "v3.0", "v2.1"])
def test_a_full_disk_is_one_sentence(kind: str, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    expected = straights[kind][0]
    for trial in filled(expected.another, expected.out, tmp_path, [0.5]):
        same_files(trial.out, expected.out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["record", "v3.0", "v2.1"])
def test_a_disk_that_is_full_at_any_byte(kind: str, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    expected = straights[kind][0]
    for trial in filled(expected.another, expected.out, tmp_path, [0.0, 0.002, 0.01, *np.random.default_rng(0).uniform(0, 0.95, 8)]):
        same_files(trial.out, expected.out)

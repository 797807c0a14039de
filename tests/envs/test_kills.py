"""Recording and converting, killed at any moment or out of disk: nothing that was there is lost, and the end is that of a straight run."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from triune.data import Dataset, open_dataset

from ..kills import Ended, Stage
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
        folder.mkdir(parents=True)

    def go(self, **plan: float) -> Ended:
        if self.kind == "record":
            return self.stage.run("point_world:record_some", self.out, str(EPISODES), beneath=self.out, **plan)  # type: ignore[arg-type]
        command = ("data", "convert", self.source or "", self.out, "--to", self.kind)
        return self.stage.run("triune.cli.main:main", *command, beneath=self.out, **plan)  # type: ignore[arg-type]

    def check(self, least: int) -> int:
        """What is counted is whole, for us and for lerobot, and no less than before. Returns how many episodes there are."""
        if not (self.out / "meta/info.json").exists():
            assert least == 0
            return 0
        dataset = open_dataset(self.out)
        assert len(dataset.episodes) >= least
        return len(dataset.episodes)


def contents(dataset: Dataset) -> list[np.ndarray]:
    return [*dataset.vectors.values(), *(dataset.load_images(camera) for camera in dataset.cameras)]


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


def kill(stage: Stage, straight: tuple[Trial, Ended], folder: Path, kills: int, first: int = 0) -> None:
    """Datasets whose writers are each killed about twice, until there were so many kills."""
    expected, whole = straight
    done = 0
    for seed in range(first, first + 10 * kills):
        rng = np.random.default_rng(seed)
        trial = Trial(stage, expected.kind, expected.source, folder / str(seed))
        have = 0
        for attempt in range(2 if done + 1 < kills else 1):
            by_operation, part = bool(rng.integers(2)), rng.random() / (1 + attempt)
            ended = trial.go(**({"at": 1 + int(part * whole.operations)} if by_operation else {"seconds": part * whole.seconds}))
            assert ended.code in (0, -signal.SIGKILL), ended.said
            done += ended.code != 0
            have = trial.check(have)
            if have and trial.kind != "v2.1" and seed % 5 == 4:
                check_in_lerobot(trial.out)
        ended = trial.go()
        assert ended.code == 0, (seed, ended.said)
        same_files(trial.out, expected.out)
        shutil.rmtree(folder / str(seed))
        if done >= kills:
            return
    raise AssertionError(f"only {done} of the kills hit")


@pytest.mark.parametrize(("kind", "kills"), [("record", 2), ("v3.0", 1), ("v2.1", 1)])
def test_killed_at_random_moments(kind: str, kills: int, stage: Stage, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    kill(stage, straights[kind], tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("record", 30), ("v3.0", 15), ("v2.1", 15)])
def test_killed_at_many_moments(kind: str, kills: int, stage: Stage, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    kill(stage, straights[kind], tmp_path, kills, first=1000)


def full(straight: tuple[Trial, Ended], folder: Path, shares: list[float]) -> None:
    """The disk is full once these shares of the dataset's bytes are written; then there is room again."""
    size = sum(path.stat().st_size for path in straight[0].out.rglob("*") if path.is_file())
    for number, share in enumerate(shares):
        trial = Trial(straight[0].stage, straight[0].kind, straight[0].source, folder / str(number))
        ended = trial.go(room=int(share * size))
        assert ended.code == 2, ended.said
        assert "Traceback" not in ended.said and "no room left on the disk" in " ".join(ended.said.split("error: ")[1].split()), ended.said
        trial.check(0)
        ended = trial.go()
        assert ended.code == 0, ended.said
        same_files(trial.out, straight[0].out)


@pytest.mark.parametrize("kind", ["record", "v3.0", "v2.1"])
def test_a_full_disk_is_one_sentence(kind: str, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    full(straights[kind], tmp_path, [0.5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["record", "v3.0", "v2.1"])
def test_a_disk_that_is_full_at_any_byte(kind: str, straights: dict[str, tuple[Trial, Ended]], tmp_path: Path) -> None:
    full(straights[kind], tmp_path, [0.0, 0.002, 0.01, *np.random.default_rng(0).uniform(0, 0.95, 8)])

"""Training through the command line, killed at any moment, out of disk, or stopped: always the straight run in the end, bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from triune.data.files import sha256
from triune.policies import load_policy, read_checkpoint, verify
from triune.policies.train.logs import read_log
from triune.policies.train.state import step_folders

from ..kills import Ended, Stage, filled, killed

WARM = (
    "triune.cli.main", "triune.policies.train.policy", "torch.utils.tensorboard", "torch._dynamo", "peft", "lerobot.datasets", "num2words",
    "scipy.stats", "diffusers.models.autoencoders.autoencoder_tiny", "transformers.models.smolvlm.modeling_smolvlm",
    "transformers.models.smolvlm.processing_smolvlm",
)  # fmt: skip
CLOCK = ("data_ms", "compute_ms")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage"), *WARM) as stage:
        yield stage


@pytest.fixture(scope="module")
def recipe(recipe_tree: dict, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters on a checkpoint, images decoded ahead, a part held out: five steps, three checkpoints of which two stay."""
    tree = {key: value for key, value in recipe_tree.items() if key not in ("spec", "executed")}
    train = {"steps": 5, "log_every": 1, "save_every": 2, "validate_every": 3, "keep": 2, "warmup": 2, "ema": 0.9}
    tree |= {
        "init": str(checkpoint),
        "experts": {"und": {"lora": {"rank": 2}}, "act": {"lora": {"rank": 2}}},
        "cache": {"limit_gb": 1e-9, "images_gb": 2e-4},
        "hold_out": 0.3,
        "validation_batches": 1,
        "train": {**recipe_tree["train"], **train},
    }
    file = tmp_path_factory.mktemp("recipe") / "lora.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


class Trial:
    """A run in ``folder / "run"``, and the frames that its steps were given, however often it was begun."""

    def __init__(self, stage: Stage, recipe: Path, folder: Path) -> None:
        self.stage, self.recipe = stage, recipe
        self.out, self.order = folder / "run", folder / "order.jsonl"
        folder.mkdir()

    def go(self, *more: str, **plan: float) -> Ended:
        """Begin or resume."""
        resume = ["--resume"] if (self.out / "recipe.yaml").exists() else []
        return self.stage.run("kills:train", self.order, self.recipe, "--out", self.out, *resume, *more, beneath=self.out, **plan)  # type: ignore[arg-type]

    def another(self, folder: Path) -> "Trial":
        """The same run in another folder."""
        return Trial(self.stage, self.recipe, folder)

    def check(self) -> None:
        """What is there is whole: every hash of the newest checkpoint, and of the state that continues it."""
        folders = step_folders(self.out)
        if folders:
            read_checkpoint(folders[-1])
            state = json.loads((folders[-1] / "training/state.json").read_text())
            assert sha256(folders[-1] / "training/state.safetensors") == state["sha256"]
            assert (folders[-1].with_name("last")).resolve() in folders or len(folders) == 1
        read_log(self.out / "log.jsonl")


def curve(out: Path) -> list[dict]:
    """The rows of a run's log without what a clock measured."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_log(out / "log.jsonl")]


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint; the clock has a part in ``state.json`` alone."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "state.json"}


def same(trial: Trial, straight: Trial) -> None:
    """Losses, held-out losses, data order and every tensor of the last checkpoint, bit for bit; nothing else is left."""
    assert curve(trial.out) == curve(straight.out)
    assert (trial.out / "validation.jsonl").read_bytes() == (straight.out / "validation.jsonl").read_bytes()
    orders = [{line for line in t.order.read_text().splitlines(keepends=True) if line.endswith("\n")} for t in (trial, straight)]
    assert orders[0] == orders[1]
    assert files(trial.out / "checkpoints/last") == files(straight.out / "checkpoints/last")
    folders = [sorted(path.name for path in (t.out / "checkpoints").iterdir()) for t in (trial, straight)]
    assert folders[0] == folders[1] == ["last", "step-000004", "step-000005"]


@pytest.fixture(scope="module")
def straight(stage: Stage, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Ended]:
    """The run that nothing happens to, once everything is warm."""
    trial = Trial(stage, recipe, tmp_path_factory.mktemp("straight") / "first")
    assert trial.go().code == 0
    trial = Trial(stage, recipe, trial.out.parent.with_name("second"))
    ended = trial.go()
    assert ended.code == 0, ended.said
    return trial, ended


def test_killed_at_random_moments(straight: tuple[Trial, Ended], tmp_path: Path) -> None:
    expected, whole = straight
    for trial in killed(expected.another, whole, tmp_path, kills=3):
        same(trial, expected)
    policy = load_policy(straight[0].out)
    assert all(row.passed for row in verify(read_checkpoint(straight[0].out), policy))


@pytest.mark.slow
def test_killed_at_fifty_random_moments(straight: tuple[Trial, Ended], tmp_path: Path) -> None:
    expected, whole = straight
    for trial in killed(expected.another, whole, tmp_path, kills=50, first=1000):
        same(trial, expected)


def test_a_full_disk_is_one_sentence(straight: tuple[Trial, Ended], tmp_path: Path) -> None:
    for trial in filled(straight[0].another, straight[0].out, tmp_path, [0.0, 0.5]):
        same(trial, straight[0])


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_byte(straight: tuple[Trial, Ended], tmp_path: Path) -> None:
    for trial in filled(
        straight[0].another, straight[0].out, tmp_path, [*np.random.default_rng(0).uniform(0, 0.95, 12), 0.001, 0.002, 0.01]
    ):
        same(trial, straight[0])


def test_the_same_seed_in_another_process_and_with_another_number_of_workers(
    recipe: Path, straight: tuple[Trial, Ended], tmp_path: Path
) -> None:
    """Not a fork: another interpreter with another hash seed; one thread decodes instead of four."""
    command = [sys.executable, "-m", "triune", "train", str(recipe), "workers=1", "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}, timeout=300)
    assert curve(tmp_path / "run") == curve(straight[0].out)
    assert files(tmp_path / "run/checkpoints/last") == files(straight[0].out / "checkpoints/last")

"""A policy is judged in the world that its data came from: the suite says no more than the task."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from triune.config import dump
from triune.data import Camera, Contract
from triune.data.files import atomic_folder
from triune.data.statistics import statistics_of
from triune.envs import make_world
from triune.errors import UserError
from triune.eval import evaluate, runner, write_report
from triune.eval.film import Cinema, Imagined, Reel, encode, pictures
from triune.eval.runner import mean_state
from triune.policies.checkpoint import write_checkpoint
from triune.policies.train.policy_recipe import references
from triune.policies.triune import graph_info
from triune.vla import build

from .fakes import FakePolicy

SIZES = {"agentview": (40, 56), "sideview": (32, 32), "wrist": (48, 36)}
TASK = "robosuite/lift"


def contract() -> Contract:
    """Of the world that the policies below were made for: 10 Hz, three cameras of unequal sizes."""
    return make_world(TASK, cameras=tuple(SIZES), size=SIZES, rate=10).contract.model_copy(update={"chunk": 6, "executed": 6})


def with_cameras(*cameras: Camera) -> Contract:
    return contract().model_copy(update={"cameras": cameras})


def suite(folder: Path, **more: Any) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"title": "Where it comes from", "tasks": {TASK: {}}, "episodes": 1, **more}))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path, make_spec: Any) -> Path:
    """A policy with random weights; its pictures are scaled into squares for its VLM."""
    names = list(SIZES)
    change: dict[str, Any] = {"streams": {"obs": {"length": 48}, "future": {"length": 12}}, "cameras": names, "state_dim": 10}
    spec = make_spec(**change, heads={"future": {"cameras": names}, "action": {"action_dim": 7}})
    model = build(spec)
    draw = np.random.default_rng(0)
    with atomic_folder(tmp_path / "policy") as folder:
        write_checkpoint(
            folder,
            spec=dump(spec),
            contract=contract(),
            statistics={
                "observation.state": statistics_of(draw.normal(size=(50, 10)).astype(np.float32)).model_dump(mode="json"),
                "action": statistics_of(draw.uniform(-1, 1, (50, 7)).astype(np.float32)).model_dump(mode="json"),
            },
            weights={name: value.detach().contiguous() for name, value in model.trained().items()},
            references=references(spec),
            settings={"resize": {"height": 32, "width": 32}},
            graph=graph_info(spec),
        )
    return tmp_path / "policy"


def test_a_suite_that_says_nothing_shows_the_world_as_the_policy_knows_it(checkpoint: Path, tmp_path: Path) -> None:
    results = evaluate(suite(tmp_path), str(checkpoint), out=tmp_path / "out", seed=500_000, workers=1)
    view = {"render": "fast", "rate": 10.0, "cameras": {name: list(size) for name, size in SIZES.items()}}
    assert results["tasks"][0]["view"] == view
    row = json.loads((tmp_path / "out" / "episodes.jsonl").read_text())
    assert row["error"] is None and row["video"] is not None and (row["success_any"] or row["steps"] == 40)
    page = write_report(tmp_path / "out").read_text()
    assert "agentview 40 x 56, sideview 32 x 32, wrist 48 x 36, 10 Hz, rendered fast" in page
    assert len(mean_state(checkpoint)) == 10


@pytest.mark.parametrize(
    ("said", "policy", "message"),
    [
        ({"size": 96}, contract, "camera agentview: height is 40 here and 96 there"),
        ({"size": {"wrist": [48, 48]}}, contract, "camera wrist: width is 36 here and 48 there"),
        ({"cameras": ["agentview", "wrist"]}, contract, "camera sideview is expected but there is only agentview, wrist"),
        ({"rate": 20}, contract, "contract: rate is 10.0 here and 20.0 there"),
        ({"render": "default"}, contract, "contract: render is fast here and default there"),
        ({}, lambda: with_cameras(Camera(name="top_cam")), "has no camera 'top_cam'; it has agentview, wrist, sideview"),
        ({}, lambda: with_cameras(Camera(name="top", optional=True)), "camera top is expected but there is only agentview, wrist"),
        ({"tasks": {"metaworld/push-v3": {}}}, contract, "runs at 80 Hz and at no other rate, so not at 10"),
    ],
)
def test_what_contradicts_the_policy_is_refused(
    said: dict[str, Any], policy: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "find_checkpoint", Path)
    monkeypatch.setattr(runner, "open_policy", lambda path, cuts=(): FakePolicy(contract=policy()))
    with pytest.raises(UserError) as error:
        evaluate(suite(tmp_path, **said), "it", out=tmp_path / "out")
    assert message in str(error.value) and str(error.value).startswith("policy it does not fit world ")
    assert not (tmp_path / "out").exists()


def test_unknown_sizes_and_rates_are_the_defaults(tmp_path: Path) -> None:
    spec = runner.load_suite(suite(tmp_path))
    unknown = with_cameras(Camera(name="wrist", flip=None), Camera(name="top", optional=True)).model_copy(update={"rate": None})
    offers = ("agentview", "wrist", "sideview")
    found = runner._facts(spec, TASK, offers, unknown, "it")
    assert (found.rate, [(c.name, c.height, c.width) for c in found.contract.cameras]) == (20.0, [("wrist", 96, 96)])
    assert [c.name for c in runner._facts(spec, TASK, offers, None, "expert").contract.cameras] == ["agentview", "wrist"]


def test_a_size_in_a_suite_must_be_one(tmp_path: Path) -> None:
    assert [runner.load_suite(suite(tmp_path, size=size)).size for size in (96, "96x64", [96, 64])] == [96, (96, 64), (96, 64)]
    assert runner.load_suite(suite(tmp_path, size={"wrist": "96x64", "agentview": 32})).size == {"wrist": (96, 64), "agentview": 32}
    for wrong in (8, [96, 96, 96], "96x", "96x-3", True, {"wrist": [96, 3]}, 96.5):
        with pytest.raises(UserError, match=r"suite.yaml: 'size': .* is no size of 16 pixels or more; write 96, or"):
            runner.load_suite(suite(tmp_path, size=wrong))


@pytest.mark.parametrize("foresight", [False, True])
def test_films_keep_the_shape_of_a_camera_s_images(foresight: bool, tmp_path: Path) -> None:
    frames = [{name: np.full((*size, 3), 10 * i, np.uint8) for name, size in SIZES.items()} for i in range(8)]
    expected = {name: np.zeros((32, 32, 3), np.uint8) for name in SIZES}
    reel = Reel("lift", 10.0, None, frames, [Imagined(0, 5, lambda: expected)] if foresight else [])
    shots = pictures(reel)
    heights = (160, 224, 224)  # the longer side of each camera's pictures is 224
    tall = 34 + sum(height + 24 for height in (heights if foresight else (224,))) + 6
    assert shots[0].shape == (tall + tall % 2, 6 + 3 * 230, 3)
    last = shots[-1]
    assert (last[34 + 18 + 2 : 34 + 18 + 158, 8:228] == 70).all()  # the first camera's picture, and white below it
    assert (last[34 + 18 + 160 : 34 + 18 + 163, 8:228] == 255).all()
    assert encode(shots, 10.0)[4:8] == b"ftyp"
    job = runner.Job(TASK, TASK, 1, 10.0, ("x",))
    Cinema(tmp_path).save(job, replace(reel, first_success=3))
    assert (tmp_path / "foresight" / f"{job.slug}-wrist.png").exists() == foresight

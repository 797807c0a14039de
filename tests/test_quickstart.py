"""The quickstart's stages: done once, resumed, never mixed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from triune import UserError
from triune.cli.quickstart import Stages, quickstart

RATES = {"episodes": 4, "successes": 3, "rate": 0.75, "ci95": [0.3, 0.95]}
RESULTS = {
    "title": "Quickstart",
    "policy": "p",
    "tasks": [{"name": "lift", "scored": True, **RATES}],
    "controls": [{"name": "blank", **RATES}],
    "overall": RATES,
}
Calls = list[tuple[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The library's three jobs replaced by ones that note their arguments and leave the files that the next one looks at."""
    made: Calls = []

    def record(worlds: dict[str, int], out: Path, **_: Any) -> None:
        made.append(("record", worlds))
        out.mkdir(parents=True, exist_ok=True)

    def train(recipe: str, overrides: list[str], out: Path, resume: bool) -> None:
        made.append(("train", (recipe, overrides, resume)))
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text("")
        if "die" in overrides:
            raise KeyboardInterrupt

    def judge(suite: str, policy: str, out: Path, **_: Any) -> None:
        made.append(("evaluate", (suite, policy)))
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(RESULTS))

    monkeypatch.setattr("triune.envs.record.record_all", record)
    monkeypatch.setattr("triune.policies.train.recipe.run", train)
    monkeypatch.setattr("triune.cli.quickstart.judge", judge)
    return made


def test_every_stage_runs_once(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart(None, tmp_path)
    data = json.dumps(str(tmp_path / "data"))
    assert [name for name, _ in calls] == ["record", "train", "evaluate"]
    assert calls[1] == ("train", ("quickstart", [f"data={data}"], False))
    assert calls[2] == ("evaluate", ("quickstart", str(tmp_path / "train" / "checkpoints" / "last")))
    printed = capsys.readouterr().out
    assert "75" in printed
    assert printed.rstrip().endswith("report.html")
    quickstart(None, tmp_path)
    assert len(calls) == 3


def test_an_interrupted_training_is_resumed(calls: Calls, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quickstart(["train.overrides=[die]"], tmp_path)
    quickstart(None, tmp_path)
    assert [name for name, _ in calls] == ["record", "train", "train", "evaluate"]
    assert calls[2][1][2] is True


def test_a_folder_of_other_settings_is_refused(calls: Calls, tmp_path: Path) -> None:
    quickstart(None, tmp_path)
    with pytest.raises(UserError, match="give another --out"):
        quickstart(["evaluate.episodes=7"], tmp_path)


def test_a_stage_whose_result_was_deleted_runs_again(calls: Calls, tmp_path: Path) -> None:
    quickstart(None, tmp_path)
    shutil.rmtree(tmp_path / "eval")
    quickstart(None, tmp_path)
    assert [name for name, _ in calls] == ["record", "train", "evaluate", "evaluate"]


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    with pytest.raises(ZeroDivisionError):
        stages.run("a", tmp_path, {}, lambda: 1 / 0)
    assert Stages(tmp_path).done == {}
    stages.run("a", tmp_path, {"x": 1}, lambda: None)
    assert Stages(tmp_path).done["a"]["inputs"] == {"x": 1}

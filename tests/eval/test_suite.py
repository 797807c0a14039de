"""Suites and whole evaluations: strict YAML, seed ranges, controls, the shape of results, resumption, clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from triune.config import CONFIGS
from triune.errors import UserError
from triune.eval import evaluate, load_suite, runner
from triune.eval.episodes import read_rows
from triune.eval.suite import check_seeds

from .fakes import CONTRACT, FakePolicy, FakePool, FakeWorld, write_checkpoint

SUITE: dict[str, Any] = {
    "title": "Two squares",
    "episodes": 10,
    "gate": 0.7,
    "tasks": {
        "fake/reach-red": {},
        "fake/reach-green": {},
        "fake/reach-red-twice": {"world": "fake/again-red", "scored": False, "episodes": 5},
    },
    "controls": {
        "instruction swapped": {"instruction": "swap", "episodes": 6, "below": 0.1},
        "images blanked": {"images": "blank", "tasks": ["fake/reach-red"], "episodes": 4},
        "proprioception blanked": {"state": "blank", "episodes": 3},
        "action does not read the observation": {"cut": ["action", "obs"], "episodes": 2},
    },
    "videos": {"first": 0, "failures": 0},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a suite and a checkpoint, and an evaluation that plays fakes."""
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    write_checkpoint(tmp_path / "run")
    monkeypatch.setattr(runner, "build_world", FakeWorld)
    monkeypatch.setattr(runner, "camera_names", lambda name: CONTRACT.camera_names)
    monkeypatch.setattr(runner, "WorldPool", FakePool)
    monkeypatch.setattr(runner, "find_checkpoint", lambda path: Path(path))
    monkeypatch.setattr(runner, "open_policy", lambda path, cuts=(): FakePolicy(blind=("action", "obs") in cuts))
    return tmp_path


def run(place: Path, out: str = "out", **more: Any) -> dict[str, Any]:
    policy = more.pop("policy", str(place / "run" / "checkpoints" / "step-000400"))
    return evaluate(str(place / "suite.yaml"), policy, out=place / out, **more)


def test_results_have_the_documented_shape(place: Path) -> None:
    seen: list[tuple[int, int]] = []
    results = run(place, on_episode=lambda row, done, total: seen.append((done, total)))
    assert results == json.loads((place / "out" / "results.json").read_text())
    assert {"tasks", "controls", "overall", "policy", "suite", "seeds", "hardware", "versions", "minutes"} <= results.keys()
    for row in [*results["tasks"], *results["controls"], results["overall"]]:
        assert {"name", "scored", "episodes", "successes", "rate", "ci95"} <= row.keys()
        assert row["rate"] == row["successes"] / row["episodes"]
        assert row["ci95"][0] <= row["rate"] <= row["ci95"][1]
    assert [(t["name"], t["scored"], t["episodes"]) for t in results["tasks"]] == [
        ("fake/reach-red", True, 10),
        ("fake/reach-green", True, 10),
        ("fake/reach-red-twice", False, 5),
    ]
    overall = results["overall"]
    assert (overall["episodes"], overall["successes"]) == (20, sum(t["successes"] for t in results["tasks"][:2]))
    assert overall["gate"] == ">= 0.7" and overall["passed"]
    total = 25 + 12 + 4 + 6 + 4
    assert seen == [(i + 1, total) for i in range(total)]
    rows = read_rows(place / "out" / "episodes.jsonl")
    assert [r.seed for r in rows[:10]] == list(range(1_000_000, 1_000_010))
    assert len(rows) == total and rows[-1].control == "action does not read the observation"
    assert results["seeds"] == {"first": 1_000_000, "last": 1_000_009}


def test_controls_take_away_what_they_say(place: Path) -> None:
    controls = {row["name"]: row for row in run(place)["controls"]}
    assert controls["instruction swapped"]["rate"] == 0 and controls["instruction swapped"]["passed"]
    assert controls["images blanked"]["successes"] == 0 and controls["images blanked"]["episodes"] == 4
    assert controls["proprioception blanked"]["successes"] > 0
    assert controls["action does not read the observation"]["successes"] == 0
    assert [t["name"] for t in controls["images blanked"]["tasks"]] == ["fake/reach-red"]


def test_the_outcome_does_not_depend_on_the_workers_or_on_an_interruption(place: Path) -> None:
    def outcomes(out: str) -> list[tuple[object, ...]]:
        return [(r.key, r.success_any, r.success_end, r.steps, r.smoothness) for r in read_rows(place / out / "episodes.jsonl")]

    def stop(row: object, done: int, total: int) -> None:
        if done == 17:
            raise KeyboardInterrupt

    run(place, "one", workers=1)
    run(place, "four", workers=4)
    with pytest.raises(KeyboardInterrupt):
        run(place, "cut", on_episode=stop)
    assert len(read_rows(place / "cut" / "episodes.jsonl")) == 17
    resumed: list[int] = []
    run(place, "cut", on_episode=lambda row, done, total: resumed.append(done))
    assert resumed[0] == 18
    assert outcomes("one") == outcomes("four") == outcomes("cut")


def test_more_episodes_extend_an_evaluation_and_another_policy_is_refused(place: Path) -> None:
    run(place, episodes=2)
    fresh: list[object] = []
    assert run(place, episodes=4, on_episode=lambda row, *_: fresh.append(row))["tasks"][0]["episodes"] == 4
    assert all(row.seed >= 1_000_002 for row in fresh)  # type: ignore[attr-defined]
    (place / "run" / "checkpoints" / "step-000400" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds an evaluation with another policy"):
        run(place, episodes=4)


def test_the_scripted_expert_has_no_controls(place: Path) -> None:
    results = run(place, policy="expert", episodes=3)
    assert results["overall"]["rate"] == 1 and results["controls"] == [] and results["checkpoint"] is None


def test_a_policy_that_does_not_fit_is_refused_before_anything_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = CONTRACT.model_copy(update={"rate": 20.0})
    monkeypatch.setattr(runner, "open_policy", lambda path, cuts=(): FakePolicy(contract=other))
    with pytest.raises(UserError, match=r"does not fit world fake/reach-red: contract: rate is 20.0 here and 10.0 there"):
        run(place)
    assert not (place / "out").exists()


def test_a_run_in_which_nothing_could_be_played_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WorldPool", lambda workers: FakePool(workers, broken=tuple(range(1_000_000, 1_000_050))))
    with pytest.raises(UserError, match="none of the 51 episodes could be played; the first says: the simulator diverged"):
        run(place)


@pytest.mark.parametrize("path", sorted((CONFIGS / "suite").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_suite_loads_and_names_known_worlds(path: Path) -> None:
    from triune.envs import world_names

    suite = load_suite(path.stem)
    assert {suite.world(task) for task in suite.tasks} <= set(world_names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episode": 3}, "unknown key 'episode'; did you mean 'episodes'"),
        ({"tasks": {"a": {"scord": True}}}, "did you mean 'scored'"),
        ({"controls": {"c": {"images": "blank", "tasks": ["fake/reach-rad"]}}}, "did you mean 'fake/reach-red'"),
        ({"controls": {"c": {"images": "blank", "state": "blank"}}}, "exactly one of instruction, images, state, cut"),
        ({"controls": {"c": {"instruction": "swap", "tasks": ["fake/reach-red"]}}}, "needs two tasks"),
        ({"tasks": {}}, "tasks"),
    ],
)
def test_a_wrong_suite_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE | change))
    with pytest.raises(UserError) as error:
        load_suite(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_suite("quikstart")


def test_training_seeds_are_refused() -> None:
    check_seeds(1_000_000, 50)
    check_seeds(500_000, 50)
    with pytest.raises(UserError, match="training seeds"):
        check_seeds(0, 5)
    with pytest.raises(UserError, match="development"):
        check_seeds(999_999, 5)

"""Rollouts: the same outcome for any number of workers, success latched, failures contained, films kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triune.data import ActionChunk
from triune.envs.view import DEFAULT, View
from triune.errors import UserError
from triune.eval.controls import blank_images, give_instruction
from triune.eval.episodes import Job, Ledger, Row, read_rows, slug
from triune.eval.film import Cinema, encode
from triune.eval.rollout import rollout
from triune.policies.base import Plan, Request

from .fakes import CONTRACT, RATE, FakePolicy, FakePool

NAMES = CONTRACT.action.names


def jobs(count: int = 12, task: str = "fake/reach-red", first: int = 1_000_000, **more: object) -> list[Job]:
    return [Job(task, task, first + i, RATE, NAMES, i, **more) for i in range(count)]  # type: ignore[arg-type]


def play(tmp_path: Path, todo: list[Job], policy: FakePolicy | None, workers: int = 1, films: int = 0, **more: int) -> list[Row]:
    pool = FakePool(workers, broken=more.pop("broken", ()))  # type: ignore[arg-type]
    rows = list(rollout(todo, policy, pool, Cinema(tmp_path, films, films), **more))  # type: ignore[arg-type]
    return sorted(rows, key=lambda row: row.key[1:])


def timeless(rows: list[Row]) -> list[Row]:
    return [replace(row, policy_ms=None, deadline_misses=0) for row in rows]


def test_outcomes_and_batches_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    todo = jobs() + jobs(task="fake/reach-green")
    reference = FakePolicy()
    expected = timeless(play(tmp_path, todo, reference))
    assert sum(row.success_any for row in expected) == 2 * 9  # all but the seeds that this policy loses
    for workers in (2, 5):
        policy = FakePolicy()
        assert timeless(play(tmp_path, todo, policy, workers)) == expected
        assert policy.batches == reference.batches
    assert timeless(play(tmp_path, todo, FakePolicy(), 3, slots=3)) == expected


def test_a_batch_holds_half_of_the_slots(tmp_path: Path) -> None:
    policy = FakePolicy()
    play(tmp_path, jobs(16), policy, slots=8)
    assert max(len(batch) for batch in policy.batches) == 4
    assert [len(batch) for batch in policy.batches[:4]] == [4, 4, 4, 4]


def test_success_is_latched_and_checked_again_after_settling(tmp_path: Path) -> None:
    rows = play(tmp_path, jobs(), FakePolicy(), settle=6)
    for row in rows:
        if row.success_any:
            assert row.first_success_step is not None
            assert row.steps == min(row.first_success_step + 6, 24)
        else:
            assert row.first_success_step is None and not row.success_end and row.steps == 24
    assert all(row.smoothness and row.smoothness > 0 for row in rows)
    assert timeless(play(tmp_path, jobs(3), FakePolicy(), settle=0))[1].success_end


def test_the_expert_acts_without_a_policy(tmp_path: Path) -> None:
    rows = play(tmp_path, jobs(), None, films=1)
    assert all(row.success_any and row.success_end and row.policy_ms is None for row in rows)
    assert [row.video is not None for row in rows] == [True] + [False] * 11


def test_a_policy_that_does_not_know_its_rate_acts_at_the_world_s(tmp_path: Path) -> None:
    class Rateless(FakePolicy):
        def plan(self, requests: list[Request]) -> list[Plan]:
            return [replace(plan, chunk=ActionChunk(plan.chunk.actions, 0.0)) for plan in super().plan(requests)]

    assert timeless(play(tmp_path, jobs(3), Rateless())) == timeless(play(tmp_path, jobs(3), FakePolicy()))


def test_one_broken_world_is_a_failure_and_stops_nothing(tmp_path: Path) -> None:
    rows = play(tmp_path, jobs(), FakePolicy(), broken=(1_000_003,))  # type: ignore[arg-type]
    assert [row.error for row in rows if row.error] == ["the simulator diverged"]
    assert not rows[3].success_any
    assert timeless(rows[:3] + rows[4:]) == timeless([r for r in play(tmp_path, jobs(), FakePolicy()) if r.seed != 1_000_003])


def test_a_policy_that_fails_on_one_episode_fails_on_that_one_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = play(tmp_path, jobs(), FakePolicy(fails_on="1000004"))
    assert [row.error for row in rows if row.error] == ["FloatingPointError: the flow diverged"]
    assert sum(row.success_any for row in rows) == 8
    assert "asking one by one" in caplog.text


def test_sessions_end_with_their_episodes(tmp_path: Path) -> None:
    """Also where a world or the policy fails; never more are open than episodes are played at once."""

    class Counting(FakePolicy):
        most = 0

        def plan(self, requests: list[Request]) -> list[Plan]:
            self.most = max(self.most, len(self.sessions))
            return super().plan(requests)

    policy = Counting(fails_on="1000004")
    play(tmp_path, jobs(16), policy, slots=4, broken=(1_000_003,))  # type: ignore[arg-type]
    assert policy.sessions == {} and 1 < policy.most <= 4


def test_changes_reach_the_policy(tmp_path: Path) -> None:
    swapped = play(tmp_path, jobs(change=give_instruction("reach the green square")), FakePolicy())
    blank = play(tmp_path, jobs(change=blank_images), FakePolicy())
    assert not any(row.success_any for row in swapped + blank)


def test_films_show_foresight_beside_what_came(tmp_path: Path) -> None:
    rows = play(tmp_path, jobs(12), FakePolicy(), films=2)
    filmed = [row for row in rows if row.video]
    assert [row.seed % 100 for row in filmed] == [0, 1, 5, 10]  # the first two, then failures
    for row in filmed:
        assert (tmp_path / str(row.video)).read_bytes()[4:8] == b"ftyp"
    facts = json.loads((tmp_path / "foresight" / f"{slug(rows[1].key)}.json").read_text())
    assert facts["cameras"] == ["top", "side"]
    assert len(facts["times"]) == len(facts["error"]) == len(facts["still"]) <= 6
    assert facts["ahead"] == 0.4
    sheet = np.asarray(Image.open(tmp_path / "foresight" / f"{slug(rows[1].key)}-top.png"))
    assert sheet.shape == (3 * 32, 32 * len(facts["times"]), 3)


def test_of_a_control_one_episode_is_filmed(tmp_path: Path) -> None:
    rows = play(tmp_path, [*jobs(3, control="blank"), *jobs(3, control="cut")], FakePolicy(), films=2)
    assert [(row.control, row.seed % 100) for row in rows if row.video] == [("blank", 0), ("cut", 0)]


def test_a_replay_that_differs_is_said(tmp_path: Path) -> None:
    class Drifting(FakePool):
        def reset(self, slot: int, world: str, seed: int, view: View = DEFAULT) -> None:
            again = self.seeds.get(slot) == seed
            super().reset(slot, world, seed, view)
            self.worlds[slot].goals["red"] += 9 * again

    rows = list(rollout(jobs(2), FakePolicy(), Drifting(), Cinema(tmp_path, 2, 0)))
    row = next(row for row in rows if row.seed % 5)
    assert row.success_any and row.video is None
    assert row.error is not None and row.error.startswith("while filming: the same seed and actions")


def test_encoded_video_decodes_to_what_went_in() -> None:
    import io

    import av

    frames = [np.full((64, 64, 3), shade, np.uint8) for shade in (20, 120, 220)]
    with av.open(io.BytesIO(encode(frames, 20.0))) as container:
        back = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [int(f.mean()) for f in back] == pytest.approx([20, 120, 220], abs=6)


def test_ledger_survives_a_kill_and_sorts(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    ledger = Ledger(path)
    rows = play(tmp_path, jobs(4), FakePolicy())
    for row in reversed(rows):
        ledger.append(row)
    with path.open("a") as file:
        file.write('{"control": null, "task": "fake/re')
    again = Ledger(path)
    assert again.rows.keys() == {row.key for row in rows}
    again.sort([row.key for row in rows])
    assert read_rows(path) == rows
    path.write_text('{"task": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        read_rows(path)


@pytest.mark.slow
def test_real_worlds_give_the_same_rows_and_films_with_one_worker_and_with_two(tmp_path: Path) -> None:
    from triune.envs.vector import WorldPool

    def rows(workers: int) -> list[Row]:
        todo = [Job("lift", "cubes/lift-red", 1_000_000 + i, 20.0, ("dx",), i) for i in range(3)]
        with WorldPool(workers) as pool:
            return sorted(rollout(todo, None, pool, Cinema(tmp_path / str(workers), 1, 0), slots=2), key=lambda row: row.seed)

    one = rows(1)
    assert one == rows(2)
    assert [row.error for row in one] == [None] * 3 and one[0].video is not None

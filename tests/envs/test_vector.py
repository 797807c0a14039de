"""The pool: equal to one world at a time, and no failure of a world or a process makes it hang."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from triune.envs import make_expert, make_world
from triune.envs.vector import Answer, WorldPool
from triune.envs.view import choose
from triune.errors import UserError

REACH, DRAWER = "metaworld/reach-v3", "metaworld/drawer-close-v3"
SMALL = choose(size=32)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorldPool]:
    with WorldPool(2) as pool:
        yield pool


def collect(pool: WorldPool, count: int) -> dict[int, Answer]:
    answers: list[Answer] = []
    while len(answers) < count:
        answers += pool.wait()
    return {answer.slot: answer for answer in answers}


def test_slots_equal_single_worlds(pool: WorldPool) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 4))
    jobs = {0: (REACH, 7), 1: (DRAWER, 8), 2: (REACH, 9)}
    for slot, (name, seed) in jobs.items():
        pool.reset(slot, name, seed, SMALL)
    first = collect(pool, 3)
    for slot in jobs:
        pool.step_chunk(slot, actions, video=slot == 2)
    second = collect(pool, 3)
    for slot, (name, seed) in jobs.items():
        world = make_world(name, size=32)
        obs, _ = world.reset(seed=seed)
        assert first[slot].error is None
        assert first[slot].observation.instruction == world.task_description
        assert np.array_equal(first[slot].observation.images["wrist"], obs["pixels"]["wrist"])
        obs, info, frames = world.step_chunk(np.float32(actions), video=True)
        assert second[slot].info == info
        assert second[slot].observation.timestamp == pytest.approx(6 / 80)
        assert np.array_equal(second[slot].observation.images["agentview"], obs["pixels"]["agentview"])
        assert np.array_equal(second[slot].observation.state, obs["agent_pos"])
        assert len(second[slot].frames) == (6 if slot == 2 else 0)
        world.close()


def test_experts_act_inside_the_worker(pool: WorldPool) -> None:
    pool.reset(0, DRAWER, 3, SMALL)
    collect(pool, 1)
    pool.expert_chunk(0, 300)
    answer = collect(pool, 1)[0]
    world = make_world(DRAWER, size=32)
    world.reset(seed=3)
    _, info, _ = world.expert_chunk(make_expert(DRAWER), 300)
    world.close()
    assert answer.info == info
    assert info["is_success"]


def test_a_mistake_is_an_answer(pool: WorldPool) -> None:
    pool.reset(0, "metaworld/reach-v4", 0)
    pool.reset(1, REACH, 0, SMALL)
    answers = collect(pool, 2)
    assert "did you mean 'metaworld/reach-v3'" in str(answers[0].error)
    assert answers[1].error is None
    pool.step_chunk(0, np.zeros((1, 4)))
    assert "reset it first" in str(collect(pool, 1)[0].error)
    pool.step_chunk(1, np.zeros((1, 9)))
    assert "takes finite actions" in str(collect(pool, 1)[1].error)
    pool.reset(1, REACH, 0, SMALL)
    assert collect(pool, 1)[1].error is None


def test_a_dead_process_is_an_answer_and_comes_back(pool: WorldPool) -> None:
    pool.reset(0, REACH, 0, SMALL)
    pool.reset(1, REACH, 1, SMALL)
    collect(pool, 2)
    process = pool._workers[0]._process
    assert process is not None and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    pool.step_chunk(0, np.zeros((1, 4)))
    pool.step_chunk(2, np.zeros((1, 4)))
    pool.step_chunk(1, np.zeros((1, 4)))
    answers = collect(pool, 3)
    assert "ended (exit code -9)" in str(answers[0].error)
    assert answers[2].error is not None
    assert answers[1].error is None
    pool.reset(0, REACH, 0, SMALL)
    assert collect(pool, 1)[0].error is None


def test_waiting_for_nothing_is_a_defect(pool: WorldPool) -> None:
    with pytest.raises(RuntimeError, match="no command is under way"):
        pool.wait()


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(UserError, match="at least one worker"):
        WorldPool(0)

"""Scripted experts: they succeed, from any state, without memory."""

import numpy as np
import pytest

from triune.envs import make_expert, make_world
from triune.envs.experts import success_rate
from triune.envs.metaworld import TASKS

EASY = ("metaworld/reach-v3", "metaworld/button-press-topdown-v3", "metaworld/drawer-open-v3", "metaworld/pick-place-v3")


@pytest.mark.parametrize("name", ["robosuite/lift", "cubes/lift-red", "cubes/stack", *EASY])
def test_experts_succeed(name: str) -> None:
    rate = success_rate(name, range(500_000, 500_004))
    assert rate.episodes == 4
    assert rate.successes == 4, rate.failures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["robosuite/lift", "cubes/lift-red", "cubes/lift-green", "heldout/lift-purple", "heldout/lift-green"])
def test_lifting_succeeds_in_95_of_100(name: str) -> None:
    assert success_rate(name, range(500_000, 500_050)).successes >= 48


@pytest.mark.slow
@pytest.mark.parametrize("name", ["robosuite/stack", "cubes/stack"])
def test_stacking_succeeds_in_90_of_100(name: str) -> None:
    assert success_rate(name, range(500_000, 500_050)).successes >= 45


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_of_meta_world_can_be_done(name: str) -> None:
    assert success_rate(name, range(500_000, 500_005)).successes >= 2


@pytest.mark.parametrize("name", ["cubes/stack", "metaworld/pick-place-v3"])
def test_an_expert_keeps_no_memory(name: str) -> None:
    """A fresh expert asked only at the end says what the one that acted all along says."""
    world, acting = make_world(name, size=32), make_expert(name)
    try:
        world.reset(seed=0)
        for steps in (1, 9, 20):
            world.expert_chunk(acting, steps)
            state = world.privileged()
            assert np.array_equal(make_expert(name)(state), acting(state))
    finally:
        world.close()


def test_an_expert_takes_over_from_noise() -> None:
    world, expert = make_world("cubes/lift-green", size=32), make_expert("cubes/lift-green")
    generator = np.random.default_rng(0)
    try:
        for seed in range(3):
            world.reset(seed=500_000 + seed)
            noise = generator.uniform(-1, 1, (15, 7))
            world.step_chunk(noise)
            _, info, _ = world.expert_chunk(expert, 80)
            assert info["is_success"], seed
    finally:
        world.close()

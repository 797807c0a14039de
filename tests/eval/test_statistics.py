"""Intervals and tests against published values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triune.errors import UserError
from triune.eval.statistics import compare, episodes_needed, mcnemar, paired_interval, smoothness, wilson


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, episodes: int, low: float, high: float) -> None:
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(pair: tuple[int, int]) -> None:
    successes, episodes = pair
    low, high = wilson(successes, episodes)
    assert 0 <= low <= successes / episodes <= high <= 1
    mirrored = wilson(episodes - successes, episodes)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes in 2"):
        wilson(3, 2)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(5, 1) == mcnemar(1, 5) == 0.21875  # 2 * (1 + 6) / 2**6
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(10, 0) == 2 / 2**10


def test_paired_interval_gives_the_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II, method 10
    assert paired_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=6e-5)
    low, high = paired_interval(36, 2, 12, 0)
    assert (low, high) == pytest.approx((-0.3404, -0.0569), abs=6e-5)
    assert paired_interval(0, 0, 0, 0) == (-1.0, 1.0)


def test_episodes_needed() -> None:
    # Connor 1987: 30 % discordant, 10 points of difference, power 80 %: 233.1 pairs
    assert episodes_needed(20, 10, 100) == 234 - 100
    assert episodes_needed(40, 10, 100) == 0
    assert episodes_needed(7, 7, 100) is None


def test_compare_pairs_by_task_and_seed() -> None:
    a = {("lift", seed): True for seed in range(10)} | {("stack", 0): True}
    b = {("lift", seed): seed >= 6 for seed in range(10)}
    found = compare(a, b)
    assert (found.episodes, found.rate_a, found.rate_b, found.difference) == (10, 1.0, 0.4, 0.6)
    assert found.p == mcnemar(6, 0)
    assert found.ci95[0] > 0
    with pytest.raises(UserError, match="share no"):
        compare(a, {("lift", 99): True})


def test_smoothness_is_the_mean_squared_third_difference() -> None:
    steps = np.arange(12.0)
    parabola = np.stack([3 * steps**2 - steps, steps % 2], axis=1)
    assert smoothness(parabola, ("dx", "gripper")) == 0.0
    assert smoothness(parabola, ("dx", "dy")) == pytest.approx(8.0)  # third difference of 0, 1, 0, 1 is +-4; half of 16
    assert smoothness(np.stack([steps**3], axis=1), ("dx",)) == pytest.approx(36.0)
    assert smoothness(parabola[:3], ("dx", "dy")) is None

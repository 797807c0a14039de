"""What a number of successes says: intervals, paired tests, and how many episodes a claim needs.

Nothing here needs more than the standard library and numpy. Sources: Wilson 1927 (interval of one rate), Newcombe 1998,
Statistics in Medicine 17:2635, method 10 (interval of a paired difference), McNemar 1947 in its exact form, Connor 1987
(sample size of a paired comparison), Tango 1998, Statistics in Medicine 17:891 (score test of a paired difference), Chan and Zhang 1999,
Biometrics 55:1202 (exact intervals from a score test).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..errors import UserError

Interval = tuple[float, float]


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a success rate; ``(0, 1)`` for no episodes.

    Raises:
        ValueError: ``successes`` is not in ``0..episodes``.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes in {episodes} episodes")
    if episodes == 0:
        return 0.0, 1.0
    z = _z(confidence)
    rate = successes / episodes
    scale = 1 + z * z / episodes
    middle = (rate + z * z / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == episodes else middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: the p-value of ``only_a`` against ``only_b`` episodes that one policy alone solved."""
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, tail / 2 ** (discordant - 1)) if discordant else 1.0


def paired_interval(both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95) -> Interval:
    """Interval of ``rate(a) - rate(b)`` over the same episodes (Newcombe's method 10, continuity-corrected correlation)."""
    n = both + only_a + only_b + neither
    if n == 0:
        return -1.0, 1.0
    a, b = both + only_a, both + only_b
    rate_a, rate_b = a / n, b / n
    (low_a, high_a), (low_b, high_b) = wilson(a, n, confidence), wilson(b, n, confidence)
    margins = a * (n - a) * b * (n - b)
    cross = float(both * neither - only_a * only_b)
    cross = max(cross - n / 2, 0.0) if cross > 0 else cross
    phi = cross / math.sqrt(margins) if margins else 0.0
    down = math.sqrt((rate_a - low_a) ** 2 - 2 * phi * (rate_a - low_a) * (high_b - rate_b) + (high_b - rate_b) ** 2)
    up = math.sqrt((high_a - rate_a) ** 2 - 2 * phi * (high_a - rate_a) * (rate_b - low_b) + (rate_b - low_b) ** 2)
    return max(-1.0, rate_a - rate_b - down), min(1.0, rate_a - rate_b + up)


def exact_difference(only_a: int, only_b: int, pairs: int, confidence: float = 0.95) -> Interval:
    """An interval of ``rate(a) - rate(b)`` that covers it with at least ``confidence`` for any number of pairs, however few.

    Every difference is kept that a one-sided test does not reject at half of ``1 - confidence``: Tango's score orders the outcomes, and
    their chance is summed, not approximated, at the worst share of discordant pairs.

    Args:
        only_a, only_b: pairs in which one of the two alone succeeded.

    Raises:
        ValueError: there are more of those than ``pairs``.
    """
    if not (only_a >= 0 and only_b >= 0 and only_a + only_b <= pairs):
        raise ValueError(f"{only_a} and {only_b} discordant pairs of {pairs}")
    if pairs == 0:
        return -1.0, 1.0
    level = (1 - confidence) / 2
    return _least(only_a, only_b, pairs, level), -_least(only_b, only_a, pairs, level)


def _least(b: int, c: int, n: int, level: float) -> float:
    """The smallest difference at which as many as ``b`` against ``c`` of ``n`` are not yet too unlikely."""
    low, high = -1.0, (b - c) / n
    if _tail(b, c, n, -1.0 + 1e-9) > level:
        return -1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _tail(b, c, n, middle) > level else (middle, high)
    return low


def _tail(b: int, c: int, n: int, difference: float) -> float:
    """The largest chance, over the shares of discordant pairs, of an outcome that says as much for ``a`` as ``b`` against ``c`` does."""
    all_b, all_c = (values.ravel() for values in np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij"))
    possible = all_b + all_c <= n
    all_b, all_c = all_b[possible], all_c[possible]
    extreme = _score(all_b, all_c, n, difference) >= _score(np.array([b]), np.array([c]), n, difference)[0] - 1e-9
    kept_b, kept_c = all_b[extreme], all_c[extreme]
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    ways = logs[n] - logs[kept_b] - logs[kept_c] - logs[n - kept_b - kept_c]
    least = max(0.0, -difference)
    worst = 0.0
    for share in np.linspace(least, (1 - difference) / 2, 64):
        parts = np.maximum([share + difference, share, 1 - 2 * share - difference], 1e-300)
        chance = np.exp(ways + kept_b * np.log(parts[0]) + kept_c * np.log(parts[1]) + (n - kept_b - kept_c) * np.log(parts[2]))
        worst = max(worst, float(chance.sum()))
    return worst


def _score(b: np.ndarray, c: np.ndarray, n: int, difference: float) -> np.ndarray:
    """Tango's statistic of a paired difference; larger speaks for a larger one."""
    square, line = 2.0 * n, -b - c + (2 * n - b + c) * difference
    rest = -c * difference * (1 - difference)
    share = (np.sqrt(np.maximum(line**2 - 4 * square * rest, 0.0)) - line) / (2 * square)
    spread = np.sqrt(np.maximum(n * (2 * share + difference * (1 - difference)), 1e-12))
    return np.asarray((b - c - n * difference) / spread)


def episodes_needed(only_a: int, only_b: int, episodes: int, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """How many *more* paired episodes would separate two policies, if what was seen so far is the truth (Connor 1987).

    Returns:
        0 if there are enough already; None if no difference was seen, so that no number is enough.
    """
    if only_a == only_b:
        return None
    discordant = (only_a + only_b) / episodes
    difference = abs(only_a - only_b) / episodes
    z_test, z_power = _z(confidence), NormalDist().inv_cdf(power)
    n = (z_test * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)) ** 2 / difference**2
    return max(0, math.ceil(n) - episodes)


@dataclass(frozen=True)
class Comparison:
    """Two policies over the same episodes.

    Attributes:
        episodes: pairs, that is, episodes that both policies ran from the same start.
        rate_a, rate_b: success rates over those pairs.
        difference, ci95: ``rate_a - rate_b`` and its interval.
        p: exact McNemar p-value of no difference.
        more: further pairs needed to separate the two; see ``episodes_needed``.
    """

    episodes: int
    rate_a: float
    rate_b: float
    difference: float
    ci95: Interval
    p: float
    more: int | None


def compare(a: Mapping[tuple[str, int], bool], b: Mapping[tuple[str, int], bool]) -> Comparison:
    """Pair two evaluations by (task, seed).

    Args:
        a, b: success by (task, seed).

    Raises:
        UserError: the two share no episode, so that nothing can be paired.
    """
    keys = sorted(a.keys() & b.keys())
    if not keys:
        raise UserError("the two evaluations share no (task, seed); evaluate both with the same suite and the same --seed")
    both = sum(a[k] and b[k] for k in keys)
    only_a = sum(a[k] and not b[k] for k in keys)
    only_b = sum(b[k] and not a[k] for k in keys)
    n = len(keys)
    interval = paired_interval(both, only_a, only_b, n - both - only_a - only_b)
    more = episodes_needed(only_a, only_b, n)
    return Comparison(n, (both + only_a) / n, (both + only_b) / n, (only_a - only_b) / n, interval, mcnemar(only_a, only_b), more)


def smoothness(actions: np.ndarray, names: Sequence[str]) -> float | None:
    """Mean squared third difference of the executed actions; smaller is smoother.

    ``mean over steps t and dimensions d of (a[t+3] - 3 a[t+2] + 3 a[t+1] - a[t])[d] ** 2``, in squared action units per
    control step; for position commands this is the squared jerk up to the factor ``rate ** 6``. Dimensions named
    ``gripper`` are left out: an opening hand is meant to jump.

    Args:
        actions: (T, A) as executed.
        names: the A action dimensions.

    Returns:
        None for fewer than four steps, where there is no third difference.
    """
    kept = [i for i, name in enumerate(names) if "gripper" not in name]
    if len(actions) < 4 or not kept:
        return None
    return float(np.mean(np.diff(np.asarray(actions, np.float64)[:, kept], n=3, axis=0) ** 2))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)

"""Streaming statistics: what they promise about quantiles, and that parts merge in any order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triune.data import statistics
from triune.data.sketch import CELLS, Lattice
from triune.data.statistics import EXACT, Sketch, statistics_of
from triune.errors import UserError

ERROR = 1 / (CELLS / 2 - 2)
"""The stated error of a quantile, in ranges."""
KINDS = ("normal", "skewed", "two humps", "grid", "outlier", "far away")


def draw(kind: str, count: int, seed: int) -> np.ndarray:
    g = np.random.default_rng(seed)
    values = {
        "normal": lambda: g.normal(3, 2, count),
        "skewed": lambda: g.lognormal(0, 1.5, count),
        "two humps": lambda: np.where(g.random(count) < 0.97, g.normal(-5, 0.1, count), g.normal(5, 0.1, count)),
        "grid": lambda: g.integers(-3, 4, count).astype(float),
        "outlier": lambda: np.r_[g.normal(size=count - 1), 500.0],
        "far away": lambda: 1e6 + g.normal(size=count),
    }
    return values[kind]().astype(np.float32)


def feed(values: np.ndarray, cuts: list[int]) -> Sketch:
    sketch = Sketch(values.shape[1])
    for a, b in pairwise([0, *sorted(cuts), len(values)]):
        sketch.add(values[a:b])
    return sketch


def check_against_numpy(sketch: Sketch, values: np.ndarray) -> None:
    """Ends exact, moments to rounding, quantiles within the stated error."""
    found, rows = sketch.statistics(), values.astype(np.float64)
    assert found.count == len(rows)
    np.testing.assert_array_equal((found.min, found.max), (rows.min(0), rows.max(0)))
    scale = np.maximum(1e-300, np.abs(rows).max(0))
    np.testing.assert_allclose(np.array(found.mean) / scale, rows.mean(0) / scale, atol=1e-12)
    np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-6, atol=1e-300)
    spread = rows.max(0) - rows.min(0)
    for share, row in ((0.01, found.q01), (0.99, found.q99)):
        assert (np.abs(np.array(row) - np.quantile(rows, share, axis=0)) <= ERROR * spread).all()


def test_a_million_rows() -> None:
    values = np.stack([draw(kind, 10**6, i) for i, kind in enumerate(KINDS)], 1)
    sketch = feed(values, list(range(0, 10**6, 77_777)))
    assert ERROR < 0.005
    check_against_numpy(sketch, values)
    thresholds = np.quantile(values.astype(np.float64), 0.3, axis=0)
    assert np.abs(sketch.below(thresholds.tolist()) - (values < thresholds).mean(0))[[0, 1, 5]].max() < 1e-3


def test_few_rows_are_numpys_numbers_however_they_come() -> None:
    values = draw("skewed", 5000, 0).reshape(-1, 2)
    rows = values.astype(np.float64)
    q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
    wanted = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0), "q01": q01, "q99": q99}
    for sketch in (feed(values, []), feed(values, [1, 700, 701, 2000])):
        found = sketch.statistics()
        for name, value in wanted.items():
            assert getattr(found, name) == tuple(value.tolist()), name


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches that begin to count in cells after 50 rows."""
    monkeypatch.setattr(statistics, "EXACT", 50)
    monkeypatch.setattr(statistics, "BLOCK", 40)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_adding_in_any_order(kind: str, seed: int) -> None:
    values = draw(kind, 600, seed)[:, None]
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.integers(0, 600, 3))
    parts = [feed(part, []) for part in np.split(values, cuts)]
    whole = feed(values, [100, 101])
    check_against_numpy(whole, values)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], generator.permutation(4).tolist()):
        merged = Sketch(1)
        for i in order:
            merged.merge(parts[i])
        found, wanted = merged.statistics(), whole.statistics()
        # the cells are the same, whatever came first, so the quantiles are, to the last bit
        assert (found.q01, found.q99, found.min, found.max, found.count) == (wanted.q01, wanted.q99, wanted.min, wanted.max, wanted.count)
        np.testing.assert_allclose((found.mean, found.std), (wanted.mean, wanted.std), rtol=1e-9)


FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(FLOATS, min_size=1, max_size=60), st.lists(FLOATS, min_size=1, max_size=60), st.floats(0, 1))
def test_cells_of_any_numbers(one: list[float], other: list[float], share: float) -> None:
    """The lattice of a union is the union of the lattices; a quantile is at most a cell off."""
    both = np.array(one + other)
    whole = Lattice(both.min(), both.max())
    whole.add(both)
    parts = []
    for values in (np.array(one), np.array(other)):
        part = Lattice(values.min(), values.max())
        part.add(values)
        parts.append(part)
    parts[0].merge(parts[1])
    assert (parts[0].exponent, parts[0].first) == (whole.exponent, whole.first)
    np.testing.assert_array_equal(parts[0].counts, whole.counts)
    assert len(whole.counts) <= CELLS and whole.counts.sum() == len(both)
    error = abs(whole.quantiles(np.array([share]))[0] - np.quantile(both, share))
    # 2^-60 of the magnitude is all that float64 itself tells apart
    assert error <= ERROR * (both.max() - both.min()) + 1e-15 * np.abs(both).max()


def test_memory_does_not_grow_with_the_rows() -> None:
    sketch = Sketch(2)
    values = draw("normal", 2 * EXACT, 0).reshape(-1, 2)
    sizes = []
    for _ in range(6):
        sketch.add(values)
        sizes.append(sum(x.counts.nbytes for x in sketch._lattices) + sum(rows.nbytes for rows in sketch._rows))
    assert sizes[-1] <= max(sizes[:3]) < 16 * 2**20
    assert sketch.count == 6 * EXACT


def test_refusals() -> None:
    with pytest.raises(UserError, match="3 dimensions cannot join those of 2"):
        Sketch(2).merge(Sketch(3))
    with pytest.raises(UserError, match="at least one frame"):
        Sketch(2).statistics()
    assert statistics_of(np.full((EXACT + 1, 1), 0.1)).q01 == (0.1,)

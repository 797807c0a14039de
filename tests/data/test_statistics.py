"""Statistics are those of all values; normalisation has an exact inverse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from triune.data import Normaliser, compute_statistics, open_dataset
from triune.data.statistics import load_statistics, save_statistics, statistics_of
from triune.data.transforms import KINDS, Kind
from triune.errors import UserError

MakeDataset = Callable[..., Path]


def test_quantiles_of_shifted_episodes() -> None:
    """Episodes with different means: the mean of per-episode quantiles would be 2.2 and 6.7."""
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(mean, 1, (200, 1)) for mean in range(10)])
    found = statistics_of(values)
    assert (found.q01[0], found.q99[0]) == pytest.approx(tuple(np.quantile(values, (0.01, 0.99))))
    assert found.q01[0] < 0
    assert (found.mean[0], found.std[0], found.count) == (pytest.approx(values.mean()), pytest.approx(values.std()), 2000)


def test_of_a_dataset_and_of_a_split(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(make_dataset(4))
    found = compute_statistics(dataset)
    assert found.keys() == dataset.vectors.keys()
    np.testing.assert_allclose(found["action"].max, dataset.vectors["action"].max(0))
    part = compute_statistics(dataset, ["action"], episodes=[1, 3])
    rows = np.concatenate([dataset.vectors["action"][dataset.episodes[i].frames] for i in (1, 3)])
    np.testing.assert_allclose(part["action"].mean, rows.mean(0, dtype=np.float64), rtol=1e-6)
    assert list(part) == ["action"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    before = {"action": statistics_of(np.random.default_rng(0).normal(size=(50, 3)))}
    save_statistics(before, tmp_path / "statistics.json")
    assert load_statistics(tmp_path / "statistics.json") == before
    (tmp_path / "statistics.json").write_text('{"action": {"mean": [1]}}')
    with pytest.raises(UserError, match="'std' is required"):
        load_statistics(tmp_path / "statistics.json")
    with pytest.raises(UserError, match="there is no statistics file"):
        load_statistics(tmp_path / "other.json")


def test_values_that_are_not_finite() -> None:
    with pytest.raises(UserError, match=r"dimensions \[1\] hold values that are not finite"):
        statistics_of(np.array([[0, np.nan], [0, 1]]))
    with pytest.raises(UserError, match="at least one frame"):
        statistics_of(np.zeros((0, 2)))


@pytest.fixture
def values() -> np.ndarray:
    """Dimensions: wide, tiny but varying, constant, and a gripper that closes in 0.5 % of the frames."""
    generator = np.random.default_rng(0)
    gripper = np.where(np.arange(2000) % 200 == 0, 1.0, -1.0)
    return np.stack([generator.normal(3, 10, 2000), generator.normal(0, 2e-3, 2000), np.full(2000, 0.7), gripper], 1).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_inverse(kind: Kind, values: np.ndarray) -> None:
    normaliser = Normaliser(statistics_of(values), kind)
    there = normaliser.normalise(values)
    assert there.dtype == np.float32
    np.testing.assert_allclose(normaliser.unnormalise(there), values, rtol=1e-6, atol=2e-6)
    assert np.isfinite(there).all()
    assert np.abs(there).max() <= (20 if kind != "none" else 100)
    in_torch = normaliser.normalise(torch.from_numpy(values))
    np.testing.assert_array_equal(in_torch.numpy(), there)
    np.testing.assert_array_equal(normaliser.unnormalise(in_torch).numpy(), normaliser.unnormalise(there))


def test_kinds(values: np.ndarray) -> None:
    statistics = statistics_of(values)
    standard = Normaliser(statistics, "mean_std").normalise(values)
    np.testing.assert_allclose(standard[:, :2].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(standard[:, :2].std(0), 1, atol=1e-4)
    np.testing.assert_allclose(Normaliser(statistics, "min_max").normalise(values)[:, :2].max(0), 1, atol=1e-5)
    quantile = Normaliser(statistics, "quantile").normalise(values)
    assert np.quantile(quantile[:, 0], (0.01, 0.99)) == pytest.approx((-1, 1), abs=1e-4)
    assert (np.abs(quantile[:, 0]) > 1).mean() == pytest.approx(0.02, abs=0.002)  # beyond the quantiles, and not clipped
    assert set(np.unique(quantile[:, 3])) == {-1, 1}  # the quantiles alone would call it constant
    np.testing.assert_array_equal(Normaliser(statistics, "none").normalise(values), values)
    assert (quantile[:, 2] == 0).all()


def test_refusals(values: np.ndarray) -> None:
    normaliser = Normaliser(statistics_of(values))
    with pytest.raises(UserError, match="values of 3 dimensions meet statistics of 4"):
        normaliser.normalise(values[:, :3])
    with pytest.raises(UserError, match="'zscore' is unknown; choose one of mean_std"):
        Normaliser(statistics_of(values), "zscore")  # type: ignore[arg-type]

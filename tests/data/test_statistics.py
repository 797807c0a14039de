"""Statistics are those of all values; normalisation has an exact inverse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triune.data import ChunkSampler, Dataset, Normaliser, Statistics, compute_statistics, open_dataset
from triune.data.compare import Comparison, compare_statistics
from triune.data.statistics import Sketch, load_statistics, save_statistics, sketch_actions, statistics_of
from triune.data.transforms import KINDS, Affine, Kind, Relative
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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 2**31))
def test_relative_actions_have_an_inverse(state_of: list[int | None], chunk: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    action, state = generator.normal(size=(3, chunk, len(state_of))), generator.normal(size=(3, 5))
    relative = Relative(state_of=tuple(state_of))
    there = relative.apply(action, state)
    np.testing.assert_allclose(relative.undo(there, state), action, atol=1e-14)
    for i, of in enumerate(state_of):  # every step of a chunk less the state at its first
        np.testing.assert_array_equal(there[..., i], action[..., i] - (0 if of is None else state[:, None, of]))
    in_torch = relative.apply(torch.from_numpy(action), torch.from_numpy(state))
    np.testing.assert_array_equal(in_torch.numpy(), there)
    one = relative.apply(action[0].astype(np.float32), state[0].astype(np.float32))
    assert one.shape == (chunk, len(state_of)) and one.dtype == np.float32


def test_relative_refusals() -> None:
    relative = Relative(state_of=(0, None, 4))
    for actions, states in ((2, 5), (3, 4)):
        with pytest.raises(UserError, match=f"actions of {actions} and states of {states} dimensions meet 3 entries up to state 4"):
            relative.apply(np.zeros((1, actions)), np.zeros(states))
    with pytest.raises(UserError, match="a state dimension from 0 on, or none"):
        Relative(state_of=(-1,)).apply(np.zeros((1, 1)), np.zeros(3))


def test_statistics_of_relative_chunks(make_dataset: MakeDataset) -> None:
    """Over all pairs of a frame and a step of its chunk; what lies beyond an episode does not count."""
    dataset: Dataset = open_dataset(make_dataset(5))
    sampler = ChunkSampler(dataset, 4, 1, seed=0, foresight=0, episodes=[0, 2, 3])
    found = sketch_actions(sampler, Relative(state_of=(1, None, 2)).apply).statistics()
    pairs = []
    for i in (0, 2, 3):
        frames = dataset.episodes[i].frames
        for frame in range(frames.start, frames.stop):
            base = dataset.vectors["observation.state"][frame] * [0, 0, 1]
            base[0] = dataset.vectors["observation.state"][frame][1]
            pairs += [dataset.vectors["action"][step] - base for step in range(frame, min(frame + 4, frames.stop))]
    wanted = statistics_of(np.array(pairs, np.float32))
    assert found.count == wanted.count == len(pairs)
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    plain = sketch_actions(ChunkSampler(dataset, 1, 1, seed=0, foresight=0)).statistics()
    assert plain == compute_statistics(dataset, ["action"])["action"]


def test_what_is_guarded(values: np.ndarray) -> None:
    assert Normaliser(statistics_of(values)).guarded == ("", "", "constant", "range")
    assert Normaliser(statistics_of(values), "min_max").guarded == ("", "", "constant", "")


def compare(checkpoint: Statistics | Affine, data: np.ndarray, names: tuple[str, ...] = ()) -> Comparison:
    sketch = Sketch(data.shape[1])
    sketch.add(data)
    return compare_statistics(checkpoint, sketch, names)


def test_checkpoint_or_data() -> None:
    generator = np.random.default_rng(0)
    old = generator.normal(size=(4000, 3)).astype(np.float32)
    known = statistics_of(old)
    same = compare(known, generator.normal(size=(3000, 3)).astype(np.float32))
    assert same.use == "checkpoint" and "keep their meaning" in same.reason
    for row in same.dimensions:
        assert (row.shift, row.width, row.outside) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.1), pytest.approx(0.02, abs=0.01))
    other = old * [1, 57.3, 1] + [0, 0, 9]
    changed = compare(known, other, ("x", "elbow", "z"))
    assert changed.use == "data"
    assert changed.dimensions[0].doubt == ""
    assert "degrees where the checkpoint has radians" in changed.reason
    assert "z is shifted by +2 ranges" in changed.reason
    assert changed.dimensions[2].outside == pytest.approx(1.0, abs=0.01)
    held = old.copy()
    held[:, 1] = 0.1  # a dimension that stands still inside of the range says nothing
    assert compare(known, held).use == "checkpoint"
    narrow = old * [1, 0.03, 1]
    assert "1 uses 3% of the range" in compare(known, narrow).reason
    with pytest.raises(UserError, match="statistics of 3 dimensions and the data of 2"):
        compare(known, old[:, :2])


def test_against_a_converted_policy() -> None:
    """Affine maps of ranges and of deviations say where a checkpoint expects the values."""
    data = np.random.default_rng(0).normal(5, 2, (20000, 1))
    s = statistics_of(data)
    for affine in (
        Affine(shift=s.q01, scale=((s.q99[0] - s.q01[0]) / 2,), bias=-1.0),
        Affine(shift=s.mean, scale=s.std),
    ):
        found = compare(affine, data)
        assert found.use == "checkpoint"
        assert found.dimensions[0].outside == pytest.approx(0.02, abs=0.005)
        assert found.dimensions[0].width == pytest.approx(1, abs=0.05)

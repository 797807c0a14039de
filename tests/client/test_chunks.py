"""Chunks one after the other, averaged and faded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triune_client.chunks import ChunkBroker, TemporalEnsemble, blend


def test_the_broker_executes_the_first_steps() -> None:
    broker, chunk = ChunkBroker(2), np.arange(6.0).reshape(3, 2)
    assert broker.due
    broker.put(chunk)
    assert [broker.next().tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    assert broker.due
    with pytest.raises(IndexError, match="put the next chunk first"):
        broker.next()
    whole = ChunkBroker()
    whole.put(chunk)
    whole.next()
    np.testing.assert_array_equal(whole.left, chunk[1:])
    whole.reset()
    assert whole.due


@pytest.mark.parametrize("decay", [0.01, 0.0, -0.3])
def test_the_ensemble_is_the_running_mean_of_lerobot(decay: float) -> None:
    """lerobot keeps no chunks: prediction number n of a step enters its mean with weight exp(-decay n) (``ACTTemporalEnsembler``)."""
    rng, ours, length = np.random.default_rng(0), TemporalEnsemble(decay), 8
    mean, count = np.zeros((40, 3)), np.zeros(40, int)
    totals = np.cumsum(np.exp(-decay * np.arange(length)))
    for step in range(30):
        chunk = rng.normal(size=(length, 3))
        ours.add(chunk, step)
        for k in range(length):
            n = count[step + k]
            share = np.exp(-decay * n) / totals[n]
            mean[step + k] += share * (chunk[k] - mean[step + k])
            count[step + k] += 1
        np.testing.assert_allclose(ours.at(step), mean[step])


@given(
    starts=st.lists(st.integers(0, 20), min_size=1, max_size=6).map(sorted),
    sizes=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    decay=st.floats(-1, 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_ensemble_is_the_weighted_mean(starts: list[int], sizes: list[int], decay: float) -> None:
    rng, ours = np.random.default_rng(1), TemporalEnsemble(decay)
    chunks = [(start, rng.normal(size=(size, 2))) for start, size in zip(starts, sizes, strict=False)]
    for start, chunk in chunks:
        ours.add(chunk, start)
    for step in range(35):
        said = [chunk[step - start] for start, chunk in chunks if start <= step < start + len(chunk)]
        got = ours.at(step)
        if not said:
            assert got is None
            continue
        assert got is not None
        np.testing.assert_allclose(got, np.average(said, axis=0, weights=np.exp(-decay * np.arange(len(said)))))
        assert (np.min(said, axis=0) - 1e-12 <= got).all() and (got <= np.max(said, axis=0) + 1e-12).all()


@given(old=st.integers(0, 10), new=st.integers(1, 10), steps=st.integers(0, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blending_lies_between(old: int, new: int, steps: int) -> None:
    a, b = np.zeros((old, 2)), np.ones((new, 2))
    out = blend(a, b, steps)
    n = min(old, new, steps)
    assert out.shape == b.shape
    assert (out[n:] == 1).all() and (out[:n] > 0).all() and (out[:n] < 1).all()
    assert (np.diff(out[:, 0]) >= 0).all()
    np.testing.assert_array_equal(blend(b[:new], b, steps), b)


def test_what_is_no_chunk() -> None:
    with pytest.raises(ValueError, match=r"shape \(steps, dimensions\), not float64 \(3,\)"):
        ChunkBroker().put(np.zeros(3))
    with pytest.raises(ValueError, match=r"not finite in dimensions \[1\]"):
        ChunkBroker().put(np.array([[0.0, np.inf]]))
    with pytest.raises(ValueError, match="not object"):
        ChunkBroker().put(np.array([["a", "b"]], dtype=object))
    ensemble = TemporalEnsemble()
    ensemble.add(np.zeros((2, 3)), 0)
    with pytest.raises(ValueError, match="has 2 dimensions, and those before it had 3"):
        ensemble.add(np.zeros((2, 2)), 1)
    with pytest.raises(ValueError, match="at least one step"):
        ChunkBroker(0)

"""Orders, parts of ranks and mixtures: one sequence, however many processes draw from it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triune.data import ChunkSampler, Dataset
from triune.data.mixture import BLOCK, Mixture, Source, split_sources
from triune.data.order import Windowed
from triune.data.readers import EpisodeInfo
from triune.errors import UserError


def in_memory(lengths: list[int], seed: int = 0, dims: int = 2) -> Dataset:
    """A dataset without images; a state holds episode and step, an action the frame's index."""
    starts = np.cumsum([0, *lengths])
    episodes = [EpisodeInfo(i, int(starts[i]), n, f"task {i % 2}") for i, n in enumerate(lengths)]
    total = int(starts[-1])
    steps = np.concatenate([np.arange(n) for n in lengths])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    action = np.stack([np.arange(total) + 1000.0 * seed] * dims, 1)
    vectors = {"observation.state": np.stack([owner, steps], 1).astype(np.float32), "action": action.astype(np.float32)}
    tasks = ("task 0", "task 1")
    return Dataset(Path(f"memory-{seed}"), None, 10.0, {}, episodes, vectors, tasks, owner % 2)  # type: ignore[arg-type]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
ORDERS = st.one_of(st.none(), st.builds(Windowed, segment=st.integers(1, 12), window=st.integers(1, 60)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(1, 7), st.sampled_from([4, 8, 16]), ORDERS)
def test_padding_at_every_episode_end(lengths: list[int], chunk: int, batch: int, order: Windowed | None) -> None:
    """Chunks never leave their episode: beyond its end the last action stands, masked."""
    sampler = ChunkSampler(in_memory(lengths), chunk, batch, seed=1, order=order)
    drawn = sampler.batch(2)
    steps = drawn["state"][:, 1].astype(int)
    left = np.array(lengths)[drawn["state"][:, 0].astype(int)] - steps
    np.testing.assert_array_equal(drawn["mask"].sum(1), np.minimum(chunk, left))
    wanted = drawn["index"][:, None] + np.minimum(np.arange(chunk), left[:, None] - 1)
    np.testing.assert_array_equal(drawn["action"][..., 0], wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.sampled_from([4, 8, 16]), ORDERS, st.integers(0, 30))
def test_ranks_share_one_order(lengths: list[int], batch: int, order: Windowed | None, step: int) -> None:
    """1, 2 or 4 processes; one dataset or a mixture; a fresh sampler that begins at any step, as resume does."""
    one = in_memory(lengths)
    other = in_memory([5, 9], seed=1)
    for make in (
        lambda: ChunkSampler(one, 3, batch, seed=5, order=order),
        lambda: Mixture([Source(one, 2.0), Source(other)], 3, batch, seed=5, order=order),
    ):
        whole = make()
        for earlier in range(step):
            whole.draw(earlier)
        wanted = whole.batch(step)
        for ranks in (1, 2, 4):
            fresh = make()
            parts = [fresh.batch(step, rank, ranks) for rank in range(ranks)]
            for key, value in wanted.items():
                np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


@pytest.mark.parametrize("order", [None, Windowed(segment=7, window=48)])
def test_an_epoch_has_every_frame_once(order: Windowed | None) -> None:
    lengths = [31, 8, 50, 17, 22]
    sampler = ChunkSampler(in_memory(lengths), 2, 16, seed=3, order=order)
    count = sum(lengths)
    for epoch in (0, 1):
        drawn = [
            sampler.at(np.arange(epoch * share, (epoch + 1) * share), lane, sampler.lanes)
            for lane in range(sampler.lanes)
            if (share := count // sampler.lanes + (lane < count % sampler.lanes))
        ]
        np.testing.assert_array_equal(np.sort(np.concatenate(drawn)), np.arange(count))
    many = np.concatenate([sampler.indices(step) for step in range(10 * count // 16)])
    assert np.ptp(np.bincount(many, minlength=count)) <= 2


def test_windows_read_videos_forward() -> None:
    """The frames of a window lie in few segments, and each half of the batch has segments of its own."""
    order = Windowed(segment=16, window=128)
    sampler = ChunkSampler(in_memory([400] * 10), 2, 32, seed=0, order=order)
    assert sampler.lanes == 16
    halves = []
    for rank in (0, 1):
        frames = np.sort(np.concatenate([sampler.indices(step, rank, 2) for step in range(4)]))
        assert len(frames) == 64
        halves.append(set((frames // 16).tolist()))
        assert (np.diff(frames) > 1).sum() <= 20  # 8 lanes, each with two or three pieces of segments; 63 when shuffled freely
    assert len(halves[0] & halves[1]) <= 6
    assert not np.array_equal(sampler.at(np.arange(200)), np.sort(sampler.at(np.arange(200))))


def test_a_mixture_of_one_is_its_sampler() -> None:
    dataset = in_memory([20, 30])
    for order in (None, Windowed(segment=4, window=16)):
        mixture = Mixture([Source(dataset, 0.3)], 3, 8, seed=9, order=order)
        sampler = ChunkSampler(dataset, 3, 8, seed=9, order=order)
        for step in (0, 1, 17, BLOCK):
            batch = mixture.batch(step)
            assert (batch.pop("dataset") == 0).all()
            for key, value in sampler.batch(step).items():
                np.testing.assert_array_equal(batch[key], value)


def test_weights_and_epochs_of_a_mixture() -> None:
    datasets = [in_memory([60], 0), in_memory([25, 5], 1), in_memory([8], 2)]
    mixture = Mixture([Source(d, w) for d, w in zip(datasets, (5, 2, 1), strict=True)], 2, 64, seed=0)
    assert mixture.shares == pytest.approx((0.625, 0.25, 0.125), abs=1e-4)
    batches = [mixture.batch(step) for step in range(BLOCK // 64)]
    source = np.concatenate([b["dataset"] for b in batches])
    index = np.concatenate([b["index"] for b in batches])
    action = np.concatenate([b["action"] for b in batches])
    np.testing.assert_array_equal(np.bincount(source) / BLOCK, mixture.shares)
    np.testing.assert_array_equal(action[:, 0, 0], 1000 * source + index)  # rows come from the dataset they name
    for i, dataset in enumerate(datasets):
        counts = np.bincount(index[source == i], minlength=len(dataset))
        assert np.ptp(counts) <= 1  # without replacement, epoch by epoch
    early = np.bincount(source[:640], minlength=3) / 640
    assert np.abs(early - mixture.shares).max() < 0.08


def test_held_out_episodes_of_a_mixture() -> None:
    sources = [Source(in_memory([4] * 10, 0), 3.0), Source(in_memory([6] * 8, 1), 1.0, episodes=[0, 1, 2, 3])]
    train, validation = split_sources(sources, 0.2, seed=4)
    assert [source.weight for source in train] == [3.0, 1.0]
    for before, kept, out in zip(sources, train, validation, strict=True):
        among = range(len(before.dataset.episodes)) if before.episodes is None else before.episodes
        assert kept.episodes is not None and out.episodes is not None
        assert sorted([*kept.episodes, *out.episodes]) == list(among)
        assert {before.dataset.episodes[i].task for i in out.episodes} == set(before.dataset.tasks)
    batch = Mixture(train, 2, 64, seed=0).batch(0)
    for i, source in enumerate(train):
        assert set(batch["state"][batch["dataset"] == i][:, 0].astype(int)) <= set(source.episodes or ())


def test_refusals() -> None:
    one, wide = in_memory([5]), in_memory([5], 1, dims=3)
    with pytest.raises(UserError, match="each needs a weight above 0"):
        Mixture([Source(one, 0.0)], 2, 4, seed=0)
    with pytest.raises(UserError, match="'action' has 2 in memory-0, 3 in memory-1 dimensions"):
        Mixture([Source(one), Source(wide)], 2, 4, seed=0)
    with pytest.raises(UserError, match="batch of 6 cannot be divided among 4 processes"):
        ChunkSampler(one, 2, 6, seed=0).batch(0, 1, 4)

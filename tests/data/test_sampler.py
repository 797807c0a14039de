"""Batches are a pure function of (seed, step)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from triune.data import ChunkSampler, Contract, Dataset, Episode, open_dataset
from triune.data.sampler import split_episodes
from triune.data.writer import DatasetWriter
from triune.errors import UserError

MakeDataset = Callable[..., Path]


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> Dataset:
    return open_dataset(make_dataset(6))


def test_pure_function_of_seed_and_step(dataset: Dataset) -> None:
    one, other = (ChunkSampler(dataset, 4, 8, seed=3, foresight=2) for _ in range(2))
    steps = list(range(12))
    forwards = {step: one.batch(step) for step in steps}
    for step in reversed(steps):
        again = other.batch(step)
        assert forwards[step].keys() == again.keys() == {"index", "state", "action", "mask", "future"}
        for key, value in again.items():
            np.testing.assert_array_equal(forwards[step][key], value)
    assert not np.array_equal(ChunkSampler(dataset, 4, 8, seed=4).indices(0), one.indices(0))


def test_the_order_is_numpys_permutation(dataset: Dataset) -> None:
    """Of (seed, epoch): runs of before can be repeated."""
    sampler = ChunkSampler(dataset, 4, len(dataset), seed=3)
    for epoch in (0, 1, 7):
        np.testing.assert_array_equal(sampler.indices(epoch), np.random.default_rng((3, epoch)).permutation(len(dataset)))


def test_each_epoch_draws_every_frame_once(dataset: Dataset) -> None:
    sampler = ChunkSampler(dataset, 4, 7, seed=0)
    count = len(sampler)
    assert count == len(dataset)
    drawn = np.concatenate([sampler.indices(step) for step in range(3 * count // 7 + 1)])
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(drawn[epoch * count : (epoch + 1) * count]), np.arange(count))
    assert not np.array_equal(drawn[:count], drawn[count : 2 * count])


def test_batch_larger_than_the_data(dataset: Dataset) -> None:
    sampler = ChunkSampler(dataset, 2, 5 * len(dataset), seed=0)
    assert (np.bincount(sampler.indices(1)) == 5).all()


@pytest.mark.parametrize("key", ["action", "action.expert"])
def test_chunks_end_with_the_episode(dataset: Dataset, key: str) -> None:
    sampler = ChunkSampler(dataset, 4, 1, seed=0, action_key=key, foresight=3)
    batch = sampler.gather(np.arange(len(dataset)))
    for info in dataset.episodes:
        for frame in range(info.start, info.start + info.length):
            last = info.start + info.length - 1
            wanted = np.minimum(np.arange(frame, frame + 4), last)
            np.testing.assert_array_equal(batch["action"][frame], dataset.vectors[key][wanted])
            np.testing.assert_array_equal(batch["mask"][frame], np.arange(frame, frame + 4) <= last)
            np.testing.assert_array_equal(batch["state"][frame], dataset.vectors["observation.state"][frame])
            assert batch["future"][frame] == min(frame + 3, last)


def test_nothing_is_learned_across_a_disturbance(tmp_path: Path, make_episode: Callable[..., Episode], contract: Contract) -> None:
    pushed = (5, 6)
    with DatasetWriter(tmp_path / "pushed", contract, 20) as writer:
        for index in range(2):
            episode = make_episode(index, 12)
            episode.extra["disturbed"] = np.isin(np.arange(12), pushed if index else ()).astype(np.float32)[:, None]
            writer.add(episode)
    sampler = ChunkSampler(open_dataset(tmp_path / "pushed"), 4, 1, seed=0, foresight=2)
    assert sampler.frames.tolist() == [*range(12), *range(12, 16), *range(19, 24)]
    mask = sampler.gather(np.array([8, 13, 15, 19]))["mask"]
    assert mask.sum(1).tolist() == [4, 4, 2, 4]


def test_held_out_episodes(dataset: Dataset) -> None:
    train, validation = split_episodes(dataset, 0.3, seed=1)
    assert sorted(train + validation) == list(range(6))
    assert {dataset.episodes[i].task for i in validation} == set(dataset.tasks)
    sampler = ChunkSampler(dataset, 4, 100, seed=0, episodes=train)
    inside = np.concatenate([np.arange(len(dataset))[dataset.episodes[i].frames] for i in train])
    assert set(sampler.indices(0)) <= set(inside)
    assert split_episodes(dataset, 0.0) == (list(range(6)), [])
    with pytest.raises(UserError, match="no episode is left for training"):
        split_episodes(dataset, 0.95)


def test_refusals(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"has no 'action\.noise'; it has observation\.state, action, action\.expert"):
        ChunkSampler(dataset, 4, 8, seed=0, action_key="action.noise")
    with pytest.raises(UserError, match="no frames to sample from"):
        ChunkSampler(dataset, 4, 8, seed=0, episodes=[])

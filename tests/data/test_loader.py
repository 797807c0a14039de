"""Batches with images: the same frames as reading them one by one, for any step, any rank and little memory."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import av
import numpy as np
import pytest

from triune.data import ChunkSampler, Dataset, open_dataset
from triune.data.loader import Loader, best_order, runs
from triune.data.mixture import Mixture, Source
from triune.data.order import Shuffled, Windowed
from triune.data.readers import EpisodeInfo
from triune.data.readers.images import Clip, ImageSource, VideoColumn
from triune.errors import UserError

MakeDataset = Callable[..., Path]
SIDE = 64
FRAME = SIDE * SIDE * 3


class Numbered(ImageSource):
    """Frames that show their own number; counts what is decoded."""

    kind = "numbers"

    def __init__(self, total: int, shift: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> None:
        self.total, self.shift, self.shape = total, shift, size
        self.decoded: list[int] = []
        self.broken: set[int] = set()

    def size(self, index: int) -> tuple[int, int]:
        return self.shape

    def fill(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        if self.broken & set(indices.tolist()):
            raise UserError("a frame is broken")
        self.decoded += indices.tolist()
        out[rows] = ((indices + self.shift) % 251)[:, None, None, None]


def numbered(lengths: list[int], cameras: Mapping[str, ImageSource], name: str = "memory") -> Dataset:
    starts = np.cumsum([0, *lengths])
    episodes = [EpisodeInfo(i, int(starts[i]), n, "lift") for i, n in enumerate(lengths)]
    total = int(starts[-1])
    vectors = {"observation.state": np.zeros((total, 2), np.float32), "action": np.arange(total, dtype=np.float32)[:, None]}
    return Dataset(Path(name), None, 10.0, dict(cameras), episodes, vectors, ("lift",), np.zeros(total, np.int64))  # type: ignore[arg-type]


@pytest.fixture
def episodes() -> list[int]:
    return [90, 41, 120, 77, 60, 112]


@pytest.fixture
def dataset(episodes: list[int]) -> Dataset:
    return numbered(episodes, {"top": Numbered(500), "wrist": Numbered(500, shift=100)})


@pytest.mark.parametrize("order", [None, Windowed(segment=16, window=64)])
def test_the_right_frames_at_any_step(dataset: Dataset, order: Windowed | None) -> None:
    """In a row, backwards and at random; the past is that of the same episode; memory holds a fifth of the frames."""
    sampler = ChunkSampler(dataset, 4, 8, seed=0, foresight=7, order=order)
    first = np.repeat([e.start for e in dataset.episodes], [e.length for e in dataset.episodes])
    steps = [*range(150), 60, 59, 58, 4000, 4001, 0]
    with Loader(sampler, ["wrist", "top"], past=3, every=5, future=["top"], workers=2, cache_bytes=2 * 100 * FRAME * 2) as loader:
        for step in steps:
            loaded = loader.batch(step)
            index = loaded.values["index"]
            np.testing.assert_array_equal(index, sampler.indices(step))
            past = np.maximum(index[:, None] - [10, 5, 0], first[index][:, None])
            for camera, shift in (("top", 0), ("wrist", 100)):
                assert loaded.images[camera].shape == (8, 3, SIDE, SIDE, 3)
                np.testing.assert_array_equal(loaded.images[camera][..., 3, 4, 1], (past + shift) % 251)
                assert loaded.seen[camera].all()
            np.testing.assert_array_equal(loaded.future["top"][..., 0, 0, 0], loaded.values["future"] % 251)
            np.testing.assert_array_equal(loaded.values["action"], sampler.batch(step)["action"])


def test_each_frame_is_decoded_about_once_an_epoch(dataset: Dataset) -> None:
    """Windows that fit a third of the memory: spans that begin amid a window take its other frames along."""
    source = dataset.source("top")
    assert isinstance(source, Numbered)
    sampler = ChunkSampler(dataset, 4, 8, seed=0, order=Windowed(segment=16, window=64))
    with Loader(sampler, ["top"], workers=1, cache_bytes=3 * 80 * FRAME) as loader:
        for step in range(126):
            loader.batch(step)
    assert len(source.decoded) < 1.25 * (126 * 8 + 200)  # two epochs, and what is decoded ahead
    whole = ChunkSampler(dataset, 4, 8, seed=0)
    source.decoded.clear()
    with Loader(whole, ["top"], workers=2, cache_bytes=1600 * FRAME) as loader:
        for step in range(130):
            loader.batch(step)
    assert sorted(source.decoded) == list(range(500))  # all frames fit: once, and never again


@pytest.mark.parametrize("order", [None, Windowed(segment=8, window=64)])
def test_ranks_load_one_batch(dataset: Dataset, order: Windowed | None) -> None:
    sampler = ChunkSampler(dataset, 2, 16, seed=2, order=order)
    wanted = sampler.batch(9)["index"]
    for ranks in (1, 2, 4):
        parts = []
        for rank in range(ranks):
            with Loader(sampler, ["top"], rank=rank, ranks=ranks, workers=1) as loader:
                parts.append(loader.batch(9))
        np.testing.assert_array_equal(np.concatenate([part.values["index"] for part in parts]), wanted)
        np.testing.assert_array_equal(np.concatenate([part.images["top"][:, 0, 0, 0, 0] for part in parts]), wanted % 251)


def test_ranks_do_not_decode_for_each_other(episodes: list[int]) -> None:
    decoded = []
    for rank in range(4):
        source = Numbered(500)
        sampler = ChunkSampler(numbered(episodes, {"top": source}), 2, 16, seed=2, order=Windowed(segment=16, window=128))
        with Loader(sampler, ["top"], rank=rank, ranks=4, workers=1, cache_bytes=120 * FRAME) as loader:
            for step in range(31):
                loader.batch(step)
        decoded.append(len(source.decoded))
    assert sum(decoded) < 1.5 * 500 + 4 * 80


def test_absent_cameras_of_a_mixture() -> None:
    one = numbered([30], {"top": Numbered(30), "left": Numbered(30, shift=50, size=(32, 48))}, "one")
    other = numbered([40, 9], {"top": Numbered(49, shift=7)}, "other")
    mixture = Mixture([Source(one), Source(other, 2.0)], 2, 12, seed=0)
    with Loader(mixture, ["top", "left"], past=2, workers=1) as loader:
        for step in range(5):
            loaded = loader.batch(step)
            source, index = loaded.values["dataset"], loaded.values["index"]
            np.testing.assert_array_equal(loaded.seen["left"], source == 0)
            np.testing.assert_array_equal(loaded.images["top"][:, -1, 0, 0, 0], index + 7 * source)
            left = loaded.images["left"]
            assert left.shape == (12, 2, 32, 48, 3)
            np.testing.assert_array_equal(left[:, -1].max((1, 2, 3)), np.where(source == 0, index + 50, 0))


def test_threads_end_and_memory_is_bounded(dataset: Dataset) -> None:
    before = set(threading.enumerate())
    with Loader(ChunkSampler(dataset, 2, 8, seed=0), ["top"], workers=3, cache_bytes=200 * FRAME) as loader:
        for step in range(30):
            loader.batch(step)
        assert sum(store.frames.nbytes for store in loader._stores.values()) <= 200 * FRAME
        assert len(loader._jobs) < 200
        loader.batch(9000)  # what was planned is given up
    assert set(threading.enumerate()) == before


def test_a_broken_frame_is_said_when_it_is_needed(dataset: Dataset) -> None:
    source = dataset.source("top")
    assert isinstance(source, Numbered)
    sampler = ChunkSampler(dataset, 2, 4, seed=0)
    source.broken = {int(sampler.indices(20)[0])}
    with Loader(sampler, ["top"], workers=1) as loader:
        loader.batch(0)
        for _ in range(2):
            with pytest.raises(UserError, match="a frame is broken"):
                loader.batch(20)
        for step in (30, 31):
            np.testing.assert_array_equal(loader.batch(step).images["top"][:, 0, 0, 0, 0], sampler.indices(step) % 251)


def test_refusals(dataset: Dataset) -> None:
    sampler = ChunkSampler(dataset, 2, 8, seed=0)
    with pytest.raises(UserError, match="no dataset has a camera 'front'; there are top, wrist"):
        Loader(sampler, ["front"])
    with (
        Loader(sampler, ["top"], cache_bytes=10 * FRAME) as loader,
        pytest.raises(UserError, match=f"cache_bytes of at least {24 * FRAME}"),
    ):
        loader.batch(0)
    small = numbered([30], {"top": Numbered(30, size=(32, 32))}, "small")
    with pytest.raises(UserError, match="different sizes, 64x64 in memory, 32x32 in small"):
        Loader(Mixture([Source(dataset), Source(small)], 2, 8, seed=0), ["top"])


def test_runs() -> None:
    keys, later = np.array([3, 5, 40, 200, 201]), np.array([1, 4, 12, 60, 90, 205])
    found = [run.tolist() for run in runs(keys, later)]
    assert found == [[1, 3, 4, 5, 12], [40], [200, 201, 205]]
    long = runs(np.arange(0, 300, 2), np.zeros(0, np.int64))
    assert max(map(len, long)) == 64 and np.concatenate(long).tolist() == list(range(0, 300, 2))


def encode(path: Path, levels: list[int], codec: str, key_every: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": str(key_every), "crf": "20"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for level in levels:
            image = np.full((SIDE, SIDE, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("codec", ["libsvtav1", "h264"])
@pytest.mark.parametrize("key_every", [2, 60])
def test_videos_through_the_loader(tmp_path: Path, codec: str, key_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several episodes in one file; shuffled, the pixels are those of reading it from end to end."""
    monkeypatch.setenv("SVT_LOG", "1")
    levels = [(40 + 3 * i) % 200 for i in range(60)]
    encode(tmp_path / "v.mp4", levels, codec, key_every)
    lengths = [25, 35]
    column = VideoColumn([Clip(tmp_path / "v.mp4", 0.0), Clip(tmp_path / "v.mp4", 2.5)], np.array([0, 25]), 10.0)
    straight = np.stack([f.to_ndarray(format="rgb24") for f in av.open(str(tmp_path / "v.mp4")).decode(video=0)])
    np.testing.assert_allclose(straight.mean((1, 2, 3)), levels, atol=4)
    dataset = numbered(lengths, {"top": column, "side": Numbered(60)})
    assert (best_order([dataset], ["side"]), best_order([dataset], ["side", "top"])) == (Shuffled(), Windowed())
    for order in (None, Windowed(segment=8, window=32)):
        sampler = ChunkSampler(dataset, 2, 4, seed=1, order=order)
        with Loader(sampler, ["top"], past=2, every=3, workers=2, cache_bytes=60 * FRAME) as loader:
            for step in range(20):
                loaded = loader.batch(step)
                np.testing.assert_array_equal(loaded.images["top"][:, -1], straight[loaded.values["index"]])


def test_png_folders_and_resume(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(make_dataset(6))
    sampler = ChunkSampler(dataset, 4, 8, seed=3)
    with Loader(sampler, dataset.cameras, workers=2) as whole:
        batches = [whole.batch(step) for step in range(9)]
    with Loader(ChunkSampler(dataset, 4, 8, seed=3), dataset.cameras, workers=1) as resumed:
        for step in range(5, 9):
            again = resumed.batch(step)
            for camera in dataset.cameras:
                np.testing.assert_array_equal(again.images[camera], batches[step].images[camera])
                np.testing.assert_array_equal(again.images[camera][:, 0], dataset.frames(camera, again.values["index"]))

"""Batches with images: what the next batches need is decoded ahead by threads into one fixed block of memory per camera.

Decoding leaves Python's lock, so threads of the process do what worker processes do elsewhere, and nothing is copied between
processes. Steps are planned in spans. While one span is consumed the next is decoded, its frames sorted by episode so that
each video is read forward; frames of the span after that which lie on the way are kept, too. What no span needs stays until its
place is wanted, so a dataset that fits is decoded once.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np

from ..errors import UserError
from .order import Order, Shuffled, Windowed
from .readers import Dataset
from .sampler import Batch, Sampler

CACHE_BYTES = 2**30
SPANS = 3
"""Spans that memory is divided among: consumed, decoded next, and met on the way."""
GAP, RUN = 16, 64
"""Frames closer than ``GAP`` are decoded by one job, at most ``RUN`` of them."""
GROWTH, LONGEST = 4, 256
"""How many times more steps each span has than the one before, from one step on, so that the first batch need not wait for the last;
and the most steps that are planned at once, even where all frames fit."""
DATASET = 40
"""A frame's key is ``dataset << 40 | frame``."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A batch with images, the part of one rank.

    Attributes:
        values: what the sampler gives: state, action, mask, index, ...
        images: camera -> uint8 (B, F, H, W, 3), the past of each sample, the oldest first; zeros where its dataset has no such camera.
        seen: camera -> bool (B,), whether its dataset has the camera.
        future: camera -> uint8 (B, H, W, 3), what is seen ``foresight`` frames on.
    """

    values: Batch
    images: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    future: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Drawn:
    """The samples of a step (B,), and keys of the frames that they show: past (B, F) and future (B,)."""

    dataset: np.ndarray
    index: np.ndarray
    past: np.ndarray
    future: np.ndarray


@dataclass(eq=False)
class Span:
    """Consecutive steps from ``start`` on, and the frames that they need: camera -> sorted keys."""

    start: int
    drawn: list[Drawn]
    needs: dict[str, np.ndarray]
    placed: bool = False

    @property
    def stop(self) -> int:
        return self.start + len(self.drawn)


@dataclass(eq=False)
class Store:
    """Decoded frames of one camera.

    Attributes:
        frames: uint8 (places, H, W, 3).
        keys: int64 (places,), what lies there; -1 for nothing.
        jobs: int64 (places,), the number of the job that writes it.
        place: key -> place.
        fresh: when each place was last needed.
    """

    frames: np.ndarray
    keys: np.ndarray
    jobs: np.ndarray
    fresh: np.ndarray
    place: dict[int, int] = field(default_factory=dict)


class Loader:
    """Loads the batches of a sampler with their images. Close it, or use it in a ``with`` block, to end its threads.

    Args:
        sampler: a ``ChunkSampler`` or a ``Mixture``. For videos its order should be ``Windowed``, with windows that fit in a third of the
            memory (times the number of ranks).
        cameras: names, at least one; each must be in one dataset at least.
        past, every: frames of the past that a sample sees, and control steps between them; ``past=1`` is the present alone.
        future: cameras whose frame at ``future`` is loaded, too.
        workers: threads that decode; default: one per usable processor, at most 8.
        cache_bytes: of decoded frames, all cameras together; batches come on top.
        rank, ranks: the part of each global batch to load.

    Raises:
        UserError: a camera is in no dataset, its images differ in size between datasets, or one batch does not fit ``cache_bytes``.
    """

    def __init__(
        self,
        sampler: Sampler,
        cameras: Sequence[str],
        *,
        past: int = 1,
        every: int = 1,
        future: Sequence[str] = (),
        workers: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.sampler, self.cameras, self.future = sampler, tuple(cameras), tuple(future)
        self.rank, self.ranks = rank, ranks
        self._back = np.arange(past - 1, -1, -1) * every
        self._starts = [np.array([e.start for e in d.episodes]) for d in sampler.datasets]
        self._ends = [np.array([e.frames.stop - 1 for e in d.episodes]) for d in sampler.datasets]
        names = tuple(dict.fromkeys((*cameras, *future)))
        self._has = {camera: np.array([camera in d.cameras for d in sampler.datasets]) for camera in names}
        shapes = {camera: self._shape(camera) for camera in names}
        places = max(1, cache_bytes // sum(int(np.prod(shape)) for shape in shapes.values()))
        self._room = places // SPANS
        self._stores = {
            camera: Store(np.empty((places, *shape), np.uint8), np.full(places, -1), np.full(places, -1), np.full(places, -1))
            for camera, shape in shapes.items()
        }
        self._clock = 0
        self._next_job = 0
        self._jobs: dict[int, tuple[Future[None], str, np.ndarray]] = {}
        self._spans: list[Span] = []
        self.workers = workers or min(8, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="triune-loader")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; frames that are being decoded are waited for, others left."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int) -> Loaded:
        """This rank's part of the batch of ``step``. Any step may be asked for; one after the other is fast.

        Raises:
            UserError: a frame cannot be decoded.
        """
        drawn = self._advance(step)
        images = {camera: self._gather(camera, drawn.dataset, drawn.past) for camera in self.cameras}
        future = {camera: self._gather(camera, drawn.dataset, drawn.future) for camera in self.future}
        seen = {camera: self._has[camera][drawn.dataset] for camera in self.cameras}
        return Loaded(self.sampler.collect(drawn.dataset, drawn.index), images, seen, future)

    # what is needed -------------------------------------------------------------------------------------------------

    def _shape(self, camera: str) -> tuple[int, ...]:
        shapes = {str(d.path): (*d.source(camera).size(0), 3) for d in self.sampler.datasets if camera in d.cameras}
        if not shapes:
            known = ", ".join(sorted({c for d in self.sampler.datasets for c in d.cameras})) or "none"
            raise UserError(f"no dataset has a camera '{camera}'; there are {known}")
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{h}x{w} in {path}" for path, (h, w, _) in shapes.items())
            raise UserError(f"camera '{camera}' has frames of different sizes, {said}; convert the datasets to one size")
        return next(iter(shapes.values()))

    def _draw(self, step: int) -> Drawn:
        """What the batch of ``step`` shows; frames stay inside of their episodes."""
        dataset, index = self.sampler.draw(step, self.rank, self.ranks)
        first, last = np.empty_like(index), np.empty_like(index)
        for i in np.unique(dataset).tolist():
            here = dataset == i
            episode = np.searchsorted(self._starts[i], index[here], side="right") - 1
            first[here], last[here] = self._starts[i][episode], self._ends[i][episode]
        past = np.maximum(index[:, None] - self._back, first[:, None])
        tag = dataset << DATASET
        return Drawn(dataset, index, tag[:, None] | past, tag | np.minimum(index + self.sampler.foresight, last))

    def _needs(self, drawn: Drawn) -> dict[str, np.ndarray]:
        """Camera -> keys, sorted."""
        needs = {}
        for camera, has in self._has.items():
            here = has[drawn.dataset]
            asked = [drawn.past[here].ravel()] if camera in self.cameras else []
            needs[camera] = np.unique(np.concatenate([*asked, drawn.future[here]] if camera in self.future else asked))
        return needs

    def _plan(self, start: int, steps: int) -> Span:
        """At most ``steps`` steps from ``start`` on, as many as fit."""
        span = Span(start, [self._draw(start)], {})
        span.needs = self._needs(span.drawn[0])
        if any(len(keys) > self._room for keys in span.needs.values()):
            size = sum(store.frames[0].nbytes for store in self._stores.values())
            least = SPANS * max(map(len, span.needs.values())) * size
            raise UserError(f"the images of one batch do not fit the loader's memory; give cache_bytes of at least {least}")
        while len(span.drawn) < steps:
            drawn = self._draw(span.stop)
            more = {camera: np.union1d(span.needs[camera], keys) for camera, keys in self._needs(drawn).items()}
            if any(len(keys) > self._room for keys in more.values()):
                break
            span.needs = more
            span.drawn.append(drawn)
        return span

    # what is decoded ------------------------------------------------------------------------------------------------

    def _advance(self, step: int) -> Drawn:
        """Have the frames of ``step`` decoded, and those that come after."""
        spans = [span for span in self._spans if span.stop > step]
        if not spans or spans[0].start > step:
            self._forget()
            spans = [self._plan(step, 1)]
        while len(spans) < SPANS:
            spans.append(self._plan(spans[-1].stop, min(LONGEST, GROWTH * len(spans[-1].drawn))))
        self._spans = spans
        for span, after in pairwise(spans):
            if not span.placed:
                self._jobs = {number: job for number, job in self._jobs.items() if not job[0].done() or job[0].exception()}
                for camera in self._stores:
                    self._place(camera, span.needs[camera], after.needs[camera])
                span.placed = True
        return spans[0].drawn[step - spans[0].start]

    def _place(self, camera: str, keys: np.ndarray, after: np.ndarray) -> None:
        """Give the frames ``keys`` places and jobs, and those of ``after`` that lie on the way."""
        store = self._stores[camera]
        self._clock += 1
        missing = self._missing(store, keys)
        later = self._missing(store, after)
        for run in runs(missing, later):
            places = self._free(store, len(run))
            number, self._next_job = self._next_job, self._next_job + 1
            store.keys[places], store.jobs[places], store.fresh[places] = run, number, self._clock
            store.place.update(zip(run.tolist(), places.tolist(), strict=True))
            self._jobs[number] = (self._threads.submit(self._decode, camera, run, places), camera, places)

    def _missing(self, store: Store, keys: np.ndarray) -> np.ndarray:
        """The keys that have no place; the places of the others are kept."""
        places = np.array([store.place.get(key, -1) for key in keys.tolist()], np.int64)
        store.fresh[places[places >= 0]] = self._clock
        return keys[places < 0]

    def _free(self, store: Store, count: int) -> np.ndarray:
        """Places for ``count`` frames: empty ones, then those that were needed longest ago."""
        places = np.argpartition(store.fresh, count - 1)[:count]
        for key in store.keys[places].tolist():
            store.place.pop(key, None)
        return places

    def _decode(self, camera: str, run: np.ndarray, places: np.ndarray) -> None:
        dataset = self.sampler.datasets[int(run[0] >> DATASET)]
        dataset.fill(camera, run & (1 << DATASET) - 1, self._stores[camera].frames, places)

    def _forget(self) -> None:
        """Give up what was planned: jobs that have not begun leave their places."""
        for job, camera, places in self._jobs.values():
            if job.cancel():
                store = self._stores[camera]
                for key in store.keys[places].tolist():
                    del store.place[key]
                store.keys[places], store.fresh[places] = -1, -1
        for job, _, _ in self._jobs.values():
            if not job.cancelled():
                job.exception()  # waits: its places may be given away from here on
        self._jobs = {number: job for number, job in self._jobs.items() if not job[0].cancelled() and job[0].exception()}

    def _gather(self, camera: str, dataset: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Frames of ``keys`` (B, ...) as uint8 (B, ..., H, W, 3); waits for those that are being decoded."""
        store, here = self._stores[camera], self._has[camera][dataset]
        wanted = keys[here].ravel().tolist()
        places = np.array([store.place[key] for key in wanted], np.int64)
        for number in np.unique(store.jobs[places]).tolist():
            if number in self._jobs:
                self._jobs[number][0].result()
        out = np.zeros((*keys.shape, *store.frames.shape[1:]), np.uint8) if not here.all() else None
        if out is None:
            return store.frames[places].reshape(*keys.shape, *store.frames.shape[1:])
        out[here] = store.frames[places].reshape(-1, *out.shape[1:])
        return out


def runs(keys: np.ndarray, later: np.ndarray) -> list[np.ndarray]:
    """Sorted ``keys`` in groups that are decoded together, with those of ``later`` (sorted, or among ``keys``) that lie close by."""
    both = np.union1d(keys, later)
    cuts = np.flatnonzero(np.diff(both) > GAP) + 1
    found = []
    for group in np.split(both, cuts):
        found += [part for start in range(0, len(group), RUN) if np.isin(part := group[start : start + RUN], keys).any()]
    return found


def best_order(datasets: Sequence[Dataset], cameras: Sequence[str]) -> Order:
    """``Windowed`` where one of the cameras is kept as video, else ``Shuffled``."""
    forward = any(d.source(camera).forward for d in datasets for camera in cameras if camera in d.cameras)
    return Windowed() if forward else Shuffled()

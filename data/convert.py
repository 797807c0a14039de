"""Datasets of one format written as another, read back and compared."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .readers import Dataset, EpisodeInfo, open_dataset
from .types import Episode
from .writer import DatasetWriter
from .writer_v21 import WriterV21

WRITERS: dict[str, Callable[..., Any]] = {"v3.0": DatasetWriter, "v2.1": WriterV21}
Progress = Callable[[int, int], None]


def convert(
    source: Dataset,
    out: str | Path,
    to: str = "v3.0",
    *,
    video: bool = False,
    robot: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``source`` as a LeRobotDataset at ``out``, episode by episode; a killed conversion goes on where it ended.

    Args:
        source: an opened dataset, or a robot's view of one.
        out: the new folder, or one that an earlier call began.
        to: ``v3.0`` or ``v2.1``.
        video: keep images as video (AV1 in v3.0, h264 in v2.1) instead of PNG.
        robot: robot type that the new dataset names.
        progress: called with (steps done, all steps); an episode is a step when written and one when read back.

    Returns:
        ``path``, ``version``, ``episodes``, ``frames``, ``skipped`` (indices of episodes of one frame, which lerobot does not hold) and
        ``images``: camera -> ``equal``, or the peak signal-to-noise ratio in dB: the worst frame's and the mean.

    Raises:
        UserError: the source lacks a state, an action, or a rate; ``out`` holds something else; what was written does not read back.
    """
    if to not in WRITERS:
        raise UserError(f"a dataset cannot be converted to '{to}'; choose {' or '.join(WRITERS)}")
    needed = [key for key in ("observation.state", "action") if key not in source.vectors]
    if needed:
        held = ", ".join(source.vectors)
        mend = f"write a mapping with `vla data inspect {source.path} --write FILE` and give it as --robot"
        raise UserError(f"{source.path} has no {' and no '.join(needed)} under that name (it has {held}); {mend}")
    if not np.isfinite(source.fps):
        raise UserError(f"nothing says the control rate of {source.path}; give a mapping that has `rate:` as --robot")
    kept = [episode for episode in source.episodes if episode.length > 1]
    if not kept:
        raise UserError(f"{source.path} has no episode of two frames or more; there is nothing to convert")
    path = Path(out)
    if path.resolve() == source.path.resolve():
        raise UserError(f"{out} is the source itself; write into another folder")
    with closing(WRITERS[to](path, source.contract, source.fps, video=video, robot=robot)) as writer:
        if len(writer):
            _same_beginning(source, kept, path, len(writer))
        for step, episode in enumerate(kept[len(writer) :], len(writer)):
            writer.add(load_episode(source, episode))
            if progress is not None:
                progress(step + 1, 2 * len(kept))
    images = verify(source, kept, path, lossless=not video, progress=progress)
    skipped = [episode.index for episode in source.episodes if episode.length < 2]
    frames = sum(episode.length for episode in kept)
    return {"path": str(out), "version": to, "episodes": len(kept), "frames": frames, "skipped": skipped, "images": images}


def load_episode(dataset: Dataset, info: EpisodeInfo) -> Episode:
    """One episode of a dataset in memory."""
    frames = np.arange(info.start, info.frames.stop)
    extra = {key: values[info.frames] for key, values in dataset.vectors.items() if key not in ("observation.state", "action")}
    images = {camera: dataset.frames(camera, frames) for camera in dataset.cameras}
    state, action = dataset.vectors["observation.state"][info.frames], dataset.vectors["action"][info.frames]
    return Episode(images, state, action, info.task, info.meta, extra)


def verify(source: Dataset, kept: list[EpisodeInfo], path: Path, *, lossless: bool, progress: Progress | None = None) -> dict[str, Any]:
    """Compare ``path`` with the episodes ``kept`` of ``source`` from which it was written; see ``convert``.

    Raises:
        UserError: lengths, tasks or numbers differ, or images that are kept without loss.
    """
    written = open_dataset(path)
    if len(written.episodes) != len(kept):
        raise UserError(f"{path} holds {len(written.episodes)} episodes and not {len(kept)}; remove it and convert again")
    noise: dict[str, list[float]] = {camera: [] for camera in source.cameras}
    for step, (mine, theirs) in enumerate(zip(kept, written.episodes, strict=True)):
        different = _differences(source, mine, written, theirs)
        frames, copies = (np.arange(e.start, e.frames.stop) for e in (mine, theirs))
        for camera in source.cameras if not different else ():
            a, b = source.frames(camera, frames), written.frames(camera, copies)
            if a.shape != b.shape or (lossless and not np.array_equal(a, b)):
                different.append(f"camera {camera}")
            elif not lossless:
                error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((1, 2, 3))
                noise[camera] += (10 * np.log10(255**2 / np.maximum(error, 1e-3))).tolist()
        if different:
            raise UserError(f"episode {step} of {path} does not read back as written ({', '.join(different)}); remove it and convert again")
        if progress is not None:
            progress(len(kept) + step + 1, 2 * len(kept))
    return {c: "equal" if lossless else {"worst_db": min(noise[c]), "mean_db": float(np.mean(noise[c]))} for c in source.cameras}


def _differences(source: Dataset, mine: EpisodeInfo, written: Dataset, theirs: EpisodeInfo) -> list[str]:
    """What of the vectors, the length and the instruction of an episode is not the same."""
    if mine.length != theirs.length or mine.task != theirs.task:
        return ["its length or task"]
    return [
        key
        for key, values in source.vectors.items()
        if key not in written.vectors or not np.array_equal(values[mine.frames], written.vectors[key][theirs.frames], equal_nan=True)
    ]


def _same_beginning(source: Dataset, kept: list[EpisodeInfo], path: Path, count: int) -> None:
    """
    Raises:
        UserError: the episodes that are there already were not made from these.
    """
    written = open_dataset(path)
    ends = {0, count - 1} if count <= len(kept) else set()
    if not ends or any(_differences(source, kept[i], written, written.episodes[i]) for i in ends):
        raise UserError(f"{path} holds {count} episodes that are not those of {source.path}; choose another folder, or remove it")

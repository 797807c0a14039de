"""Films of episodes: each camera as it was, what the foresight expert expected, and what came."""

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.files import write_file
from .episodes import Job

CELL = 224  # the longer side of one camera picture in a video, pixels
HEAD, GAP = 34, 6  # height of the title line; space between pictures
FPS = 20.0  # faster worlds are thinned to about this
SHOWN = 6  # moments in a foresight panel
INK, PAPER, FAINT, GOOD = (24, 26, 31), (255, 255, 255), (236, 238, 241), (0, 114, 178)
FULL_SCALE = 96.0  # mean absolute difference (of 255) drawn in the darkest colour


@dataclass(frozen=True, eq=False)
class Imagined:
    """A prediction made at step ``made`` for the frame after step ``due``; see ``Plan.foresight``."""

    made: int
    due: int
    draw: Callable[[], dict[str, np.ndarray]]

    @cached_property
    def images(self) -> dict[str, np.ndarray]:
        """Camera -> uint8 (H, W, 3)."""
        return self.draw()


@dataclass(frozen=True, eq=False)
class Reel:
    """One episode to film.

    Attributes:
        instruction: the words that the policy was given.
        rate: control rate in Hz.
        first_success: steps executed when success came first.
        frames: camera -> uint8 (H, W, 3), at the start and after each step.
        foresight: predictions, in order of time.
    """

    instruction: str
    rate: float
    first_success: int | None
    frames: list[dict[str, np.ndarray]]
    foresight: list[Imagined]


class Cinema:
    """Decides which episodes are filmed; writes ``videos/<episode>.{mp4,jpg}`` (the jpg is the end) and ``foresight/<episode>.{json,png}``.

    Args:
        out: folder of the evaluation.
        first: the first so many episodes of each task are filmed, whatever their outcome, and one first episode of each control.
        failures: and so many failures more of each task; failures of a control are expected, so none of those.
    """

    def __init__(self, out: Path, first: int = 2, failures: int = 4) -> None:
        self.out, self.first, self.failures = out, first, failures
        self.failed: Counter[str] = Counter()
        self.controls: set[str] = set()

    @property
    def open(self) -> bool:
        """Whether any episode may be filmed."""
        return bool(self.first or self.failures)

    def wants(self, job: Job, success: bool) -> bool:
        if job.control is not None:
            if job.index or not self.first or job.control in self.controls:
                return False
            self.controls.add(job.control)
            return True
        if job.index < self.first:
            return True
        if success or self.failed[job.task] >= self.failures:
            return False
        self.failed[job.task] += 1
        return True

    def save(self, job: Job, reel: Reel) -> str:
        """Write the film of an episode; returns the video's path relative to ``out``."""
        path, shots = self.out / "videos" / f"{job.slug}.mp4", pictures(reel)
        write_file(path, encode(shots, reel.rate / _stride(reel.rate)))
        still = io.BytesIO()
        Image.fromarray(shots[-1]).save(still, "JPEG", quality=82)
        write_file(path.with_suffix(".jpg"), still.getvalue())
        panel(self.out / "foresight" / job.slug, job, reel)
        return f"videos/{path.name}"


def pictures(reel: Reel) -> list[np.ndarray]:
    """The video's pictures, uint8 (H, W, 3): one row per camera; with foresight, three columns: now, expected, came."""
    cameras = list(reel.frames[0])
    columns = 3 if reel.foresight else 1
    sizes = [_scaled(reel.frames[0][camera]) for camera in cameras]
    across, tall = columns, [height for _, height in sizes]
    if not reel.foresight:
        across, tall = len(cameras), [max(tall)]
    tops = [HEAD + sum(tall[:row]) + row * (GAP + 18) for row in range(len(tall) + 1)]
    width, height = GAP + across * (CELL + GAP), tops[-1] + GAP
    shown = list(range(0, len(reel.frames), _stride(reel.rate)))
    if shown[-1] != len(reel.frames) - 1:
        shown.append(len(reel.frames) - 1)
    out = []
    for index in shown:
        page = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
        draw = ImageDraw.Draw(page)
        _title(draw, width, reel, index)
        due = next((p for p in reel.foresight if p.due >= max(index, 1)), None)
        for number, camera in enumerate(cameras):
            top, column = (tops[number], 0) if reel.foresight else (tops[0], number)
            _cell(page, draw, top, column, sizes[number], reel.frames[index][camera], camera)
            if reel.foresight:
                when = f"{due.due / reel.rate:.2f} s" if due else ""
                expected = due.images.get(camera) if due else None
                came = reel.frames[due.due][camera] if due and due.due < len(reel.frames) else None
                _cell(page, draw, top, 1, sizes[number], expected, f"expected at {when}" if due else "expected")
                _cell(page, draw, top, 2, sizes[number], came, f"actual at {when}" if came is not None else "the episode ended before")
        out.append(np.asarray(page))
    return out + [out[-1]] * 10  # the end stays for half a second


def encode(frames: list[np.ndarray], fps: float) -> bytes:
    """H.264 in mp4 of uint8 pictures (H, W, 3) with even sides; plays in every browser."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "24", "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def panel(stem: Path, job: Job, reel: Reel) -> None:
    """Keep a few predictions for the report: one PNG per camera (rows expected, came, difference) and a JSON of facts.

    The JSON holds ``error`` and ``still`` per moment: mean absolute difference (of 255) of the prediction, and of
    assuming that nothing moves from when the prediction was made. Nothing is written without a prediction that came due.
    """
    came = [p for p in reel.foresight if p.due < len(reel.frames)]
    if not came:
        return
    picked = [came[i] for i in sorted({round(i * (len(came) - 1) / (SHOWN - 1)) for i in range(SHOWN)})]
    cameras = [name for name in reel.frames[0] if all(name in p.images for p in picked)]
    error, still = [], []
    for p in picked:
        truth, before = reel.frames[p.due], reel.frames[p.made]
        error.append(float(np.mean([_difference(_fit(p.images[c], truth[c]), truth[c]).mean() for c in cameras])))
        still.append(float(np.mean([_difference(before[c], truth[c]).mean() for c in cameras])))
    for camera in cameras:
        strip = []
        for p in picked:
            actual = reel.frames[p.due][camera]
            guess = _fit(p.images[camera], actual)
            strip.append(np.concatenate([guess, actual, _heat(_difference(guess, actual))], axis=0))
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate(strip, axis=1)).save(buffer, "PNG", optimize=True)
        write_file(stem.with_name(f"{stem.name}-{camera}.png"), buffer.getvalue())
    facts = {
        "control": job.control,
        "task": job.task,
        "seed": job.seed,
        "instruction": reel.instruction,
        "success": reel.first_success is not None,
        "times": [round(p.due / reel.rate, 3) for p in picked],
        "ahead": round((picked[0].due - picked[0].made) / reel.rate, 3),
        "error": [round(e, 2) for e in error],
        "still": [round(e, 2) for e in still],
        "cameras": cameras,
    }
    write_file(stem.with_name(f"{stem.name}.json"), json.dumps(facts))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _stride(rate: float) -> int:
    return max(1, round(rate / FPS))


def _title(draw: ImageDraw.ImageDraw, width: int, reel: Reel, index: int) -> None:
    small = _font(13)
    time = f"{index / reel.rate:5.2f} s"
    won = reel.first_success is not None and index >= reel.first_success
    right = f"success   {time}" if won else time
    length = draw.textlength(right, small)
    room = width - length - 4 * GAP
    words = reel.instruction
    while draw.textlength(words, _font(15)) > room and len(words) > 4:
        words = words[:-2].rstrip("…") + "…"
    draw.text((GAP, 8), words, INK, _font(15))
    draw.text((width - GAP - length, 9), right, GOOD if won else INK, small)
    done = index / max(1, len(reel.frames) - 1)
    draw.rectangle((GAP, HEAD - 5, width - GAP, HEAD - 4), FAINT)
    draw.rectangle((GAP, HEAD - 5, GAP + done * (width - 2 * GAP), HEAD - 4), GOOD)


def _scaled(image: np.ndarray) -> tuple[int, int]:
    """Width and height of a camera's pictures in a video: as its images are shaped, the longer side ``CELL``."""
    height, width = image.shape[:2]
    return max(1, round(CELL * width / max(height, width))), max(1, round(CELL * height / max(height, width)))


def _cell(
    page: Image.Image, draw: ImageDraw.ImageDraw, top: int, column: int, size: tuple[int, int], image: np.ndarray | None, label: str
) -> None:
    x, y = GAP + column * (CELL + GAP), top + 18
    draw.text((x, top), label, INK, _font(12))
    if image is None:
        draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), FAINT)
    else:
        page.paste(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), (x, y))


def _fit(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    if image.shape == like.shape:
        return image
    return np.asarray(Image.fromarray(image).resize((like.shape[1], like.shape[0]), Image.Resampling.BICUBIC))


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference over colours: (H, W), 0 to 255."""
    distance: np.ndarray = np.abs(a.astype(np.float32) - b.astype(np.float32))
    return distance.mean(axis=2)


def _heat(difference: np.ndarray) -> np.ndarray:
    """(H, W) as uint8 (H, W, 3), from white (no difference) to dark blue (``FULL_SCALE`` and more)."""
    share = np.clip(difference / FULL_SCALE, 0, 1)[..., None] ** 0.7
    return np.asarray(255 + share * (np.array([8, 48, 107]) - 255), np.float32).round().astype(np.uint8)

"""What can be measured on the numbers of a dataset: still frames, clipping, grippers, absolute or relative actions, clocks, wraps.

Pure functions over arrays. ``inside`` marks the frames t (N - 1,) whose next frame belongs to the same episode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .readers import EpisodeInfo

STILL = 1e-3
"""A step below this share of a dimension's range is no movement."""
MOST_SAMPLES = 20_000
"""Transitions on which movements are compared with actions."""
GRIPPER_WORDS = ("grip", "finger", "jaw")
GRIPPER_STEPS = 4
"""Frames that a gripper is given to answer."""


def inside_episodes(episodes: Sequence[EpisodeInfo]) -> np.ndarray:
    """bool (N - 1,): False where an episode ends."""
    inside = np.ones(episodes[-1].frames.stop - 1, bool)
    inside[[episode.start - 1 for episode in episodes[1:]]] = False
    return inside


def spread(values: np.ndarray) -> np.ndarray:
    """Range of each dimension (N, D) -> (D,) between its 1 % and 99 % quantiles, or between its extremes where these coincide."""
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    return np.where(high > low, high - low, values.max(0) - values.min(0))


@dataclass(frozen=True)
class Idle:
    """Shares of all frames: without movement, of these at the starts and at the ends of episodes; the longest still start and end."""

    share: float
    starts: float
    ends: float
    longest_start: int
    longest_end: int


def idle(values: np.ndarray, episodes: Sequence[EpisodeInfo]) -> Idle | None:
    """Frames after which nothing moves in ``values`` (N, D); ``None`` where nothing ever moves."""
    scale = spread(values)
    moving = scale > 0
    if not moving.any() or len(values) < 2:
        return None
    still = (np.abs(np.diff(values[:, moving], axis=0)) <= STILL * scale[moving]).all(axis=1) & inside_episodes(episodes)
    starts, ends = [], []
    for episode in episodes:
        steps = still[episode.start : episode.frames.stop - 1]
        first = int(np.argmin(steps)) if len(steps) and not steps.all() else len(steps)
        last = int(np.argmin(steps[::-1])) if len(steps) and not steps.all() else 0
        starts.append(first)
        ends.append(last)
    count = len(values)
    return Idle(float(still.sum() / count), sum(starts) / count, sum(ends) / count, max(starts), max(ends))


def bimodal(values: np.ndarray) -> tuple[float, float] | None:
    """The two values (low, high) between which ``values`` (N,) switches, or ``None``: nine of ten lie near one, and each is used."""
    low, high = float(np.min(values)), float(np.max(values))
    if not high > low:
        return None
    near = 0.15 * (high - low)
    at_low, at_high = float(np.mean(values <= low + near)), float(np.mean(values >= high - near))
    return (low, high) if at_low + at_high >= 0.9 and min(at_low, at_high) >= 0.02 else None


def clipped(values: np.ndarray) -> np.ndarray:
    """Share of each dimension's values (N, D) that repeat its smallest or largest one; 0 for constant and two-valued dimensions."""
    share = (((values == values.max(0)) | (values == values.min(0))).sum(0) - 2) / len(values)
    plain = np.array([values[:, i].max() > values[:, i].min() and bimodal(values[:, i]) is None for i in range(values.shape[1])])
    return np.where(plain, share, 0.0)


@dataclass(frozen=True)
class Follow:
    """How one action dimension goes with the state.

    Attributes:
        mode: ``absolute`` (the action is where a state dimension goes), ``relative`` (it is how far it moves), or ``None``.
        state: the state dimension.
        error: mean distance of the action from that state soon after, as a share of the state's range.
        correlation: of the action with the movement from its frame to the next.
        before: of the action with the movement that ended at its frame.
    """

    mode: str | None
    state: int
    error: float
    correlation: float
    before: float

    @property
    def late(self) -> bool:
        """The movement before explains the action clearly better: less than 0.7 of the variance stays unexplained."""
        return self.before > 0.5 and 1 - self.before**2 < 0.7 * (1 - self.correlation**2)


def follows(action: np.ndarray, state: np.ndarray, episodes: Sequence[EpisodeInfo]) -> list[Follow | None]:
    """For each action dimension (N, A) the state dimension (N, S) it drives; ``None`` where it never changes."""
    inside = inside_episodes(episodes)
    frames = np.flatnonzero(inside[1:] & inside[:-1]) + 1
    if not len(frames):
        return [None] * action.shape[1]
    frames = frames[np.linspace(0, len(frames) - 1, min(len(frames), MOST_SAMPLES)).astype(int)]
    scale_a, scale_s = spread(action), spread(state)
    found: list[Follow | None] = []
    moved = [_correlations(action[frames], state[frames + step] - state[frames + step - 1]) for step in (1, 0)]
    last = np.concatenate([np.full(e.length, e.frames.stop - 1) for e in episodes])
    for i in range(action.shape[1]):
        if not scale_a[i] > 0:
            found.append(None)
            continue
        errors = np.full(state.shape[1], np.inf)
        for j in np.flatnonzero((scale_s > 0) & (scale_a[i] < 2 * scale_s) & (scale_s < 2 * scale_a[i])):
            soon = [np.abs(action[frames, i] - state[np.minimum(frames + h, last[frames]), j]).mean() for h in (0, 1, 2, 4)]
            errors[j] = min(soon) / scale_s[j]
        nearest, driven = int(np.argmin(errors)), int(np.argmax(moved[0][i]))
        if errors[nearest] < 0.1:
            found.append(Follow("absolute", nearest, float(errors[nearest]), float(moved[0][i, nearest]), float(moved[1][i, nearest])))
        else:
            best = float(max(moved[0][i, driven], moved[1][i].max()))
            driven = driven if moved[0][i, driven] >= moved[1][i].max() else int(np.argmax(moved[1][i]))
            mode = "relative" if best > max(0.5, _noise(len(frames))) else None
            found.append(Follow(mode, driven, float(errors[driven]), float(moved[0][i, driven]), float(moved[1][i, driven])))
    return found


@dataclass(frozen=True)
class Gripper:
    """An action dimension that opens and closes a gripper.

    Attributes:
        action: the dimension.
        values: the two values that it switches between, or ``None`` where it is continuous.
        state: the state dimension that answers, or ``None``.
        closes: the end of the action at which the size of that state falls, ``low`` or ``high``; ``None`` where it cannot be told.
        correlation: of the action with the change of that size; 0 where it may be chance.
    """

    action: int
    values: tuple[float, float] | None
    state: int | None
    closes: str | None
    correlation: float


def grippers(
    action: np.ndarray, state: np.ndarray, names: tuple[Sequence[str], Sequence[str]], episodes: Sequence[EpisodeInfo]
) -> list[Gripper]:
    """Grippers among the action dimensions (N, A): those named so; where none is, those that switch between two values.

    Args:
        action: float (N, A).
        state: float (N, S); a gripper's opening is taken to be the size of what is named so, or of what answers most.
        names: of the action and the state dimensions.
        episodes: of both.
    """
    values = [bimodal(action[:, i]) for i in range(action.shape[1])]
    named = [i for i, name in enumerate(names[0]) if any(word in name.lower() for word in GRIPPER_WORDS)]
    chosen = named or [i for i, pair in enumerate(values) if pair is not None]
    openings = [i for i, name in enumerate(names[1]) if any(word in name.lower() for word in (*GRIPPER_WORDS, "width"))]
    frames = np.concatenate([np.arange(e.start, max(e.start, e.frames.stop - GRIPPER_STEPS)) for e in episodes])
    found = []
    for i in chosen:
        among = openings or list(range(state.shape[1]))
        rows = [(_answer(action[:, i], np.abs(state[:, j]), frames), j) for j in among]
        correlation, answer = max(rows, key=lambda row: abs(row[0]), default=(0.0, -1))
        closes = ("high" if correlation < 0 else "low") if correlation else None
        found.append(Gripper(i, values[i], answer if closes else None, closes, correlation))
    return found


def _answer(command: np.ndarray, size: np.ndarray, frames: np.ndarray) -> float:
    """Correlation of the mean command (N,) of the next steps from ``frames`` on with the change of ``size`` (N,) in them; 0 where it may
    be chance."""
    if not len(frames):
        return 0.0
    steps = frames[:, None] + np.arange(GRIPPER_STEPS)
    change = size[frames + GRIPPER_STEPS] - size[frames]
    correlation = float(_correlations(command[steps].mean(1, keepdims=True), change[:, None])[0, 0])
    return correlation if abs(correlation) > max(0.2, _noise(len(frames))) else 0.0


@dataclass(frozen=True)
class Clock:
    """Recorded time stamps: the largest distance of a step from 1/fps in seconds, steps that are off by more than a tenth of a
    frame, and steps over one or more missing frames."""

    worst: float
    jittered: int
    gaps: int


def clock(timestamps: np.ndarray, fps: float, episodes: Sequence[EpisodeInfo]) -> Clock | None:
    """Check time stamps (N,) in seconds; ``None`` where no episode has two frames."""
    inside = inside_episodes(episodes)
    steps = np.diff(timestamps.astype(np.float64))[inside]
    if not len(steps):
        return None
    off = np.abs(np.nan_to_num(steps, nan=np.inf) - 1 / fps)
    return Clock(float(off.max()), int((off > 0.1 / fps).sum()), int((steps > 1.5 / fps).sum()))


def wraps(values: np.ndarray, episodes: Sequence[EpisodeInfo]) -> dict[int, int]:
    """Dimensions of ``values`` (N, D) that jump by nearly a whole turn (2 pi or 360), and how often: angles that wrap around."""
    found: dict[int, int] = {}
    jumps = np.abs(np.diff(values, axis=0))[inside_episodes(episodes)]
    for turn in (2 * np.pi, 360.0):
        ends = values.max(0) - values.min(0)
        for i in np.flatnonzero((ends > 0.9 * turn) & (ends < 1.01 * turn)):
            count = int((jumps[:, i] > 0.8 * turn).sum())
            if count:
                found[int(i)] = count
    return found


def _noise(count: int) -> float:
    """A correlation of ``count`` pairs below this may be chance: four standard deviations."""
    return 4 / max(count, 1) ** 0.5


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each column of (N, A) with each of (N, B): (A, B), 0 where one does not vary."""
    a, b = (x.astype(np.float64) - x.mean(0, dtype=np.float64) for x in (a, b))
    product = np.outer(np.sqrt((a**2).sum(0)), np.sqrt((b**2).sum(0)))
    return np.where(product > 0, a.T @ b / np.where(product > 0, product, 1), 0)

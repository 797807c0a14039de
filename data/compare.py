"""The statistics of a checkpoint or those of the data? A table, and a recommendation with its reason."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .statistics import Sketch, Statistics
from .transforms import SMALLEST_SCALE, Affine

SHIFT, WIDER, NARROWER, OUTSIDE = 0.5, 1.5, 0.05, 0.10
"""What still fits: a centre within half of the checkpoint's range of its own, a width of 0.05 to 1.5 times, and at most 10 % of the
values outside q01 to q99, where 2 % lie by definition."""
UNITS = {57.2958: "degrees where the checkpoint has radians", 1000.0: "millimetres where the checkpoint has metres"}
UNITS |= {1 / 57.2958: "radians where the checkpoint has degrees", 1e-3: "metres where the checkpoint has millimetres"}
"""Ratios of widths that different units explain."""
NORMAL_Q99 = 2.3263
"""Standard deviations."""


@dataclass(frozen=True)
class Shift:
    """One dimension, in units of the checkpoint's range (q99 - q01).

    Attributes:
        shift: of the centre of the data's range.
        width: of the data's range.
        outside: share of the data below q01 or above q99 of the checkpoint.
        doubt: what does not fit, in words; empty where it fits.
    """

    name: str
    shift: float
    width: float
    outside: float
    doubt: str


@dataclass(frozen=True)
class Comparison:
    """``use``: ``checkpoint`` or ``data``."""

    dimensions: tuple[Shift, ...]
    use: str
    reason: str

    def tree(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def band(known: Statistics | Affine) -> tuple[np.ndarray, np.ndarray]:
    """Where a checkpoint expects the middle 98 % of the values, two arrays (D,): q01 and q99, or what its affine map says: the ends of
    [-1, 1] where it maps a range, and those of a normal distribution where it maps mean and deviation (``bias`` 0)."""
    if isinstance(known, Statistics):
        return np.array(known.q01), np.array(known.q99)
    shift, scale = np.array(known.shift), np.array(known.scale)
    ends = (-1 - known.bias, 1 - known.bias) if known.bias else (-NORMAL_Q99, NORMAL_Q99)
    return shift + ends[0] * scale, shift + ends[1] * scale


def compare_statistics(checkpoint: Statistics | Affine, data: Sketch, names: tuple[str, ...] = ()) -> Comparison:
    """Whether a network that was trained under ``checkpoint`` should go on under its statistics, or under those of ``data``.

    Where the data lies inside what the checkpoint knows, its own statistics keep the meaning of what it has learnt; where not,
    values would come far outside of [-1, 1], and the data's are better although the network must get used to them.

    Raises:
        UserError: they have different dimensions.
    """
    found = data.statistics()
    low, high = band(checkpoint)
    if len(low) != data.dims:
        raise UserError(f"the checkpoint has statistics of {len(low)} dimensions and the data of {data.dims}; map them first")
    outside = data.below(low.tolist()) + 1 - data.below(np.nextafter(high, np.inf).tolist())
    unit = np.maximum(high - low, 2 * SMALLEST_SCALE)
    begin, end = np.array(found.q01), np.array(found.q99)
    shift, width = (begin + end - low - high) / 2 / unit, (end - begin) / unit
    still = np.array(found.max) - found.min < 2 * SMALLEST_SCALE
    named = names if len(names) == data.dims else [str(i) for i in range(data.dims)]
    rows = []
    for name, s, w, o, quiet in zip(named, shift.tolist(), width.tolist(), outside.tolist(), still.tolist(), strict=True):
        rows.append(Shift(name, s, w, o, _doubt(s, w, o, quiet)))
    doubtful = [row for row in rows if row.doubt]
    if not doubtful:
        worst = max(row.outside for row in rows)
        reason = (
            f"every dimension lies in the checkpoint's range (at most {worst:.1%} outside q01 to q99), so its actions keep their meaning"
        )
        return Comparison(tuple(rows), "checkpoint", reason)
    said = "; ".join(f"{row.name} {row.doubt}" for row in doubtful[:4]) + ("; ..." if len(doubtful) > 4 else "")
    return Comparison(tuple(rows), "data", f"{len(doubtful)} of {len(rows)} dimensions do not fit the checkpoint's range: {said}")


def _doubt(shift: float, width: float, outside: float, still: bool) -> str:
    """What does not fit. A dimension that stands still inside the range fits: its width says nothing."""
    for ratio, units in UNITS.items():
        if abs(width / ratio - 1) < 0.1:
            return f"is {width:.3g} times as wide: {units}?"
    if abs(shift) > SHIFT:
        return f"is shifted by {shift:+.2g} ranges"
    if width > WIDER:
        return f"is {width:.2g} times as wide"
    if outside > OUTSIDE:
        return f"has {outside:.0%} outside q01 to q99"
    if width < NARROWER and not still:
        return f"uses {width:.0%} of the range"
    return ""

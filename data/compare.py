"""The statistics of a checkpoint or those of the data? A table, and a recommendation with its reason."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .statistics import Sketch, Statistics
from .transforms import SMALLEST_SCALE

SHIFT, WIDER, NARROWER, OUTSIDE = 0.5, 1.5, 0.05, 0.10
"""What still fits: a centre within half of the checkpoint's range of its own, a width of 0.05 to 1.5 times, and at most 10 % of the
values outside q01 to q99, where 2 % lie by definition."""
UNITS = {57.2958: "degrees where the checkpoint has radians", 1000.0: "millimetres where the checkpoint has metres"}
UNITS |= {1 / 57.2958: "radians where the checkpoint has degrees", 1e-3: "metres where the checkpoint has millimetres"}
"""Ratios of widths that different units explain."""


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


def compare_statistics(checkpoint: Statistics, data: Sketch, names: tuple[str, ...] = ()) -> Comparison:
    """Whether a network that was trained under ``checkpoint`` should go on under its statistics, or under those of ``data``.

    Where the data lies inside what the checkpoint knows, its own statistics keep the meaning of what it has learnt; where not,
    values would come far outside of [-1, 1], and the data's are better although the network must get used to them.

    Raises:
        UserError: they have different dimensions.
    """
    found = data.statistics()
    if len(checkpoint.mean) != data.dims:
        raise UserError(f"the checkpoint has statistics of {len(checkpoint.mean)} dimensions and the data of {data.dims}; map them first")
    outside = data.below(checkpoint.q01) + 1 - data.below(np.nextafter(checkpoint.q99, np.inf).tolist())
    rows = []
    for i in range(data.dims):
        span = checkpoint.q99[i] - checkpoint.q01[i]
        unit = span if span > 2 * SMALLEST_SCALE else max(checkpoint.max[i] - checkpoint.min[i], 2 * SMALLEST_SCALE)
        width = (found.q99[i] - found.q01[i]) / unit
        shift = (found.q01[i] + found.q99[i] - checkpoint.q01[i] - checkpoint.q99[i]) / 2 / unit
        still = found.max[i] - found.min[i] < 2 * SMALLEST_SCALE
        name = names[i] if len(names) == data.dims else str(i)
        rows.append(Shift(name, shift, width, float(outside[i]), _doubt(shift, width, float(outside[i]), still)))
    doubtful = [row for row in rows if row.doubt]
    if not doubtful:
        worst = max(row.outside for row in rows)
        reason = f"every dimension lies in the checkpoint's range (at most {worst:.1%} outside q01 to q99), so its actions keep their meaning"
        return Comparison(tuple(rows), "checkpoint", reason)
    said = "; ".join(f"{row.name} {row.doubt}" for row in doubtful[:4]) + ("; ..." if len(doubtful) > 4 else "")
    return Comparison(tuple(rows), "data", f"{len(doubtful)} of {len(rows)} dimensions do not fit the checkpoint's range: {said}")


def _doubt(shift: float, width: float, outside: float, still: bool) -> str:
    """What does not fit. A dimension that stands still inside the range fits: its width says nothing."""
    for ratio, units in UNITS.items():
        if abs(width / ratio - 1) < 0.15:
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

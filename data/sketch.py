"""Where the values of one dimension lie, in bounded memory: a histogram on a lattice whose width follows the range.

Cells are ``[k w, (k + 1) w)`` with ``w = 2^e``, and ``e`` the smallest exponent for which the cells from the least to the
largest value are at most ``CELLS``. A wider range doubles ``w``: two cells become one, and no count ever has to be divided.
So the histogram of some values is the same whatever the order or the parts they came in, and a quantile read from it is less
than ``w``, at most range / 32,766, from the true one. Values further out than the rest cost resolution in proportion.
"""

import math

import numpy as np

CELLS = 2**16
DIGITS = 60
"""Cell numbers of the largest magnitude stay below 2^60, so that they are exact in int64."""


class Lattice:
    """The histogram of one dimension.

    Args:
        low, high: least and largest value to come, finite; ``widen`` changes them later.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.exponent = _exponent(low, high)
        self.first = _cell(low, self.exponent)
        self.counts = np.zeros(_cell(high, self.exponent) - self.first + 1, np.int64)

    def widen(self, low: float, high: float) -> None:
        """Make room for values from ``low`` to ``high``."""
        if low >= self.low and high <= self.high:
            return
        wider = Lattice(min(low, self.low), max(high, self.high))
        wider._take(self)
        self.__dict__ = wider.__dict__

    def add(self, values: np.ndarray) -> None:
        """Count ``values`` (n,), all of which lie in [low, high]."""
        cells = np.floor(np.ldexp(np.asarray(values, np.float64), -self.exponent)).astype(np.int64) - self.first
        self.counts += np.bincount(cells, minlength=len(self.counts))

    def merge(self, other: "Lattice") -> None:
        """Count what ``other`` counted, too."""
        self.widen(other.low, other.high)
        self._take(other)

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Values below which the ``shares`` (q,) lie, interpolated between neighbours as numpy does."""
        ranks = shares * (self.counts.sum() - 1)
        below, above = self._value(np.floor(ranks)), self._value(np.ceil(ranks))
        return np.clip(below + (above - below) * (ranks - np.floor(ranks)), self.low, self.high)

    def below(self, value: float) -> float:
        """Share of the values that are smaller than ``value``; right but for those in its cell, which are taken as evenly spread."""
        if value <= self.low or value > self.high:
            return float(value > self.low)
        place = math.ldexp(value, -self.exponent) - self.first
        whole = math.floor(place)
        return float((self.counts[:whole].sum() + (place - whole) * self.counts[whole]) / self.counts.sum())

    def _take(self, other: "Lattice") -> None:
        """Add the counts of ``other``, whose cells are at most as wide."""
        cells = (np.arange(len(other.counts)) + other.first >> self.exponent - other.exponent) - self.first
        np.add.at(self.counts, cells, other.counts)

    def _value(self, ranks: np.ndarray) -> np.ndarray:
        """The values of these ranks (from 0), those of one cell evenly spread in it."""
        ends = np.cumsum(self.counts)
        cells = np.searchsorted(ends, ranks, side="right")
        inside = (ranks - (ends[cells] - self.counts[cells]) + 0.5) / self.counts[cells]
        return np.ldexp(cells + self.first + inside, self.exponent)


def _exponent(low: float, high: float) -> int:
    """A function of the ends alone, which never falls as they move apart."""
    largest = max(abs(low), abs(high))
    exponent = max(math.frexp(largest)[1] - DIGITS, -1000)
    if high > low:
        exponent = max(exponent, math.frexp(high - low)[1] - 18)
    while _cell(high, exponent) - _cell(low, exponent) >= CELLS:
        exponent += 1
    return exponent


def _cell(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))

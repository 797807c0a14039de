"""Line charts as inline SVG: no script, no network, text that scales with the page."""

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 210, 46, 26, 10, 8
POINTS = 300  # a longer curve is thinned by means of neighbours
SMOOTH = 0.08  # share of a curve over which the strong line averages


def curve(steps: Sequence[float], values: Sequence[float]) -> Markup:
    """One training curve: the raw values faint, their running mean strong; logarithmic where that tells more."""
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(points) / POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    xs = [sum(x for x, _ in group) / len(group) for group in groups]
    ys = [sum(y for _, y in group) / len(group) for group in groups]
    low, high = min(ys), max(ys)
    logarithmic = low > 0 and high / low > 8
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])

    def x_of(x: float) -> float:
        return LEFT + (x - xs[0]) / ((xs[-1] - xs[0]) or 1) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        share = math.log(y / bottom) / (math.log(top / bottom) or 1) if logarithmic else (y - bottom) / ((top - bottom) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def line(values: list[float], kind: str) -> str:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, values, strict=True))
        return f'<polyline class="{kind}" points="{path}"/>'

    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(t):.1f}" y2="{y_of(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y_of(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
    )
    marks = [t for t in _ticks(0, xs[-1]) if xs[0] <= t <= xs[-1]]
    grid += "".join(f'<text x="{x_of(t):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{t:,.0f}</text>' for t in marks)
    lines = line(ys, "raw") + line(_running_mean(ys), "mean")
    return Markup(f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{grid}{lines}</svg>')


def _running_mean(values: list[float]) -> list[float]:
    half = max(1, round(len(values) * SMOOTH / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    below, above = [t for t in ticks if t <= low][-1:], [t for t in ticks if t >= high][:1]
    kept = below + [t for t in ticks if low < t < high] + above
    return kept if len(kept) <= 7 else [t for t in kept if f"{t:e}"[0] == "1"] or kept[::3]

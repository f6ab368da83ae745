"""Curves of a training as SVG, which needs no library where it is looked at."""

import html
import json
import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 190, 46, 8, 8, 20
MOST_POINTS = 500  # of a curve: more than a screen shows
SMOOTHED = 0.05  # of a curve's length: the scale on which it is smoothed


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving averages, without the pull of a first value (Kingma & Ba 2015, section 3); what is
    not finite counts nothing.
    """
    keep = 1 - 1 / max(1.0, SMOOTHED * len(values))
    found, total, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        total, weight = total * keep, weight * keep
        if math.isfinite(value):
            total, weight = total + value * (1 - keep), weight + 1 - keep
        found[place] = total / weight if weight else math.nan
    return found if keep else values


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within bounds, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def said(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def chart(
    title: str, updates: Sequence[int], values: Sequence[float], is_noisy: bool = False,
    marks: Sequence[int] = (),
) -> str:  # fmt: skip
    """A curve over updates, as HTML.

    Args:
        is_noisy: show a smoothed curve over the values.
        marks: updates at which something happened.
    """
    x, raw = np.asarray(updates, float), np.array([math.nan if v is None else v for v in values], float)
    line = smoothed(raw) if is_noisy else raw
    kept = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
    low, high = _bounds(raw, line, is_noisy)
    first, last = x[0], max(x[-1], x[0] + 1)

    def across(update) -> float:
        return round(LEFT + (update - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def down(value) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def path(curve, kind) -> str:
        points, pen = [], "M"
        for place in kept:
            if not math.isfinite(curve[place]):
                pen = "M"
                continue
            points.append(f"{pen}{across(x[place])} {down(curve[place])}")
            pen = "L"
        return f'<path class="{kind}" d="{"".join(points)}"/>'

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(tick)}" y2="{down(tick)}"/>'
        f'<text x="{LEFT - 6}" y="{down(tick) + 4}" text-anchor="end">{tick:.3g}</text>'
        for tick in ticks(low, high)
    ]
    parts += [
        f'<text x="{across(tick)}" y="{HEIGHT - 4}" text-anchor="middle">{tick:.0f}</text>'
        for tick in ticks(first, last, 5)
        if tick == int(tick)
    ]
    parts += [
        f'<line class="mark" x1="{across(at)}" x2="{across(at)}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM - 8}"/>'
        for at in marks
    ]
    parts += [path(raw, "raw")] * is_noisy + [path(line, "smooth")]
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" style="display:none"/>')
    texts = [f"{said(raw[n])} (smoothed {said(line[n])})" if is_noisy else said(raw[n]) for n in kept]
    data = {"x": [across(x[n]) for n in kept], "update": [int(x[n]) for n in kept], "said": texts}
    return (
        f'<div class="chart" data-points="{html.escape(json.dumps(data))}"><h3>{html.escape(title)}'
        f'<output>now {said(line[-1])}</output></h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg></div>'
    )


def _bounds(raw: np.ndarray, line: np.ndarray, is_noisy: bool) -> tuple[float, float]:
    """Of what is shown: all of it, but for the rarest of what is noisy."""
    finite = raw[np.isfinite(raw)]
    if not len(finite):
        return 0.0, 1.0
    low, high = np.quantile(finite, [0.01, 0.99]) if is_noisy else (finite.min(), finite.max())
    curve = line[np.isfinite(line)]
    low, high = min(low, curve.min()), max(high, curve.max())
    if low >= 0 and low < high / 2:
        low = 0.0
    # what hardly changes is to look so
    room = max((high - low) * 0.05, abs(high) * 0.05) or 1.0
    return float(low - room * (low != 0)), float(high + room)

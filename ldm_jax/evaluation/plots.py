"""Line plots as SVG without a plotting library: nice ticks, linear and logarithmic axes, long series thinned without losing a spike.

Colours and type are the page's: its style sheet gives the classes used here (`s0` to `s5` for series, `dashed`, `tick`, `label`, ...).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from itertools import groupby
from typing import Any

Point = tuple[float, float | None]  # None breaks the line

_WIDTH, _HEIGHT = 420, 250
_TOP, _RIGHT, _BOTTOM = 34, 16, 46
_COLOURS = 6
_MARKED = 40  # series of at most so many points show each of them
_KEPT = 400


def finite(value: Any) -> float | None:
    """The number a JSON value stands for; None for null, text ("nan" and "inf" too), booleans and what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def significant(value: float, digits: int = 4) -> str:
    """A finite number in `digits` significant digits, but never fewer than stand before its point: 3.940, 0.01230, 51,234, 1.200e−7."""
    rounded = f"{value:.{digits - 1}e}"
    mantissa, _, exponent = rounded.partition("e")
    power = int(exponent)
    if float(rounded) == 0:
        return "0"
    if not -5 < power < 7:
        return f"{mantissa}e{power}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - power)}f}".replace("-", "−")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high]: the finest such, of at least 2 and at most `most`.

    A range too narrow for its digits (of one point, say) is widened first.

    Raises:
      ValueError: for most < 3 (a range about 0 may need 3), or low > high.
    """
    if most < 3 or low > high:
        raise ValueError(f"at least 3 ticks over low <= high, not {most} over {low} to {high}")
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = max(abs(low), abs(high)) / 10 or 1.0
        low, high = low - pad, high + pad
    power = math.floor(math.log10(high - low)) - len(str(most)) - 1
    while True:
        for multiple in (1, 2, 5):
            step = multiple * Fraction(10) ** power
            first, last = math.floor(_decimal(low) / step), math.ceil(_decimal(high) / step)
            if last - first < most:
                return [float(i * step) for i in range(first, last + 1)]
        power += 1


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks of a logarithmic axis that cover [low, high], 0 < low: 1, 2 and 5 of each decade where they fit, else every decade, or every
    second, third, ...; those of `ticks` within a factor of 2."""
    if high <= 2 * low:
        return ticks(low, high, most)
    first, last = _decade(low), _decade(high)
    last += Fraction(10) ** last < _decimal(high)
    fine = [float(m * Fraction(10) ** k) for k in range(first, last + 1) for m in (1, 2, 5)]
    start = max(i for i, tick in enumerate(fine) if tick <= low)
    end = min(i for i, tick in enumerate(fine) if tick >= high)
    if end - start < most:
        return fine[start : end + 1]
    every = -(-(last - first) // (most - 1))
    stop = first + -(-(last - first) // every) * every
    return [float(Fraction(10) ** k) for k in range(first, stop + 1, every)]


def _decimal(value: float) -> Fraction:
    """The number as it is written: 0.3 is 3/10, and so a tick."""
    return Fraction(repr(float(value)))


def _decade(value: float) -> int:
    """The largest k with 10^k <= value."""
    k = math.floor(math.log10(value))
    return k - (Fraction(10) ** k > _decimal(value))  # a logarithm may have been rounded up to a whole number


def tick_labels(values: Sequence[float]) -> list[str]:
    """Their texts, with equally many decimals; thousands as k, millions as M, billions as G."""
    largest = max(map(abs, values))
    unit, suffix = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if u <= largest < 1e13), (1.0, ""))
    unit = 1e3 if suffix == "k" else unit
    texts = [f"{value / unit:.12g}" for value in values]
    if not any("e" in text for text in texts):
        places = max(len(text.partition(".")[2]) for text in texts)
        texts = [f"{value / unit:.{places}f}" for value in values]
    return [(text + suffix if value else "0").replace("-", "−") for text, value in zip(texts, values, strict=True)]


def thin(points: Sequence[Point], most: int = _KEPT) -> list[Point]:
    """At most `most` (>= 4) of the points, in order: the first, the last, and the lowest and highest of each of equal runs."""
    if len(points) <= most:
        return list(points)
    runs = (most - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(runs):
        run = range(i * len(points) // runs, (i + 1) * len(points) // runs)
        known = [(y, k) for k in run if (y := points[k][1]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {run[0]}
    return [points[k] for k in sorted(kept)]


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Iterable[Sequence[Any]]],
    *,
    log: bool = False,
    best: tuple[float, float] | None = None,
    names: Sequence[str] | None = None,
) -> str:
    """An SVG of one line for each series, in the colours of `legend` in the same order.

    Args:
      title: what it shows, for those who hear the page.
      series: {name: pairs (x, y)} of JSON values; a y that is not finite (or not positive, if log) breaks its line.
      log: y is logarithmic, if any y is positive.
      best: a point to be marked and labelled with its y.
      names: labels of x = 0, 1, 2, ... for an axis that has no numbers.
    """
    lines = {name: [(x, finite(pair[1])) for pair in pairs if (x := finite(pair[0])) is not None] for name, pairs in series.items()}
    log = log and any(y is not None and y > 0 for line in lines.values() for _, y in line)
    if log:
        lines = {name: [(x, y if y is not None and y > 0 else None) for x, y in line] for name, line in lines.items()}
    points = [(x, y) for line in lines.values() for x, y in line if y is not None]
    ys = [y for _, y in points] or [0.0, 1.0]
    y_ticks = (log_ticks if log else ticks)(min(ys), max(ys))
    y_labels = tick_labels(y_ticks) if not log else [tick_labels([tick])[0] for tick in y_ticks]
    left = 14 + 7 * max(map(len, y_labels))
    y_scale = _Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP, log)
    x_scale, x_marks = _x_axis([x for line in lines.values() for x, _ in line], names, left)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>',
        f'<text class="label name" x="2" y="14">{escape(y_label)}</text>',
        *(_rule(y_scale(tick), left, label) for tick, label in zip(y_ticks, y_labels, strict=True)),
        *(_tick(x_scale(x), label) for x, label in x_marks),
        f'<line class="axis" x1="{left}" y1="{_HEIGHT - _BOTTOM}" x2="{_WIDTH - _RIGHT}" y2="{_HEIGHT - _BOTTOM}"/>',
        f'<text class="label" x="{(left + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        *(_line(i, name, line, x_scale, y_scale) for i, (name, line) in enumerate(lines.items())),
        _best(best, x_scale, y_scale) if best else "",
        "" if points else f'<text class="label" x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">no finite values</text>',
        "</svg>",
    ]
    return "".join(parts)


def legend(names: Sequence[str]) -> str:
    """HTML: each name after a piece of its line."""
    swatch = '<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><line class="{}" x1="2" y1="4" x2="22" y2="4"/></svg>'
    return '<ul class="legend">' + "".join(f"<li>{swatch.format(_style(i))}{escape(name)}</li>" for i, name in enumerate(names)) + "</ul>"


def _style(i: int) -> str:
    return f"line s{i % _COLOURS}" + (" dashed" if i // _COLOURS % 2 else "")


def _x_axis(xs: Sequence[float], names: Sequence[str] | None, left: float) -> tuple[_Scale, list[tuple[float, str]]]:
    """Its scale, which ends where the data end, and its ticks with their labels."""
    start, end = left + 6, _WIDTH - _RIGHT
    if names is not None:
        return _Scale(-0.5, len(names) - 0.5, start, end), list(enumerate(names))
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    marks = ticks(low, high, 7)
    if low == high:
        low, high = marks[0], marks[-1]
    labels = zip(marks, tick_labels(marks), strict=True)
    return _Scale(low, high, start, end), [(x, label) for x, label in labels if low <= x <= high]


def _rule(y: float, left: float, label: str) -> str:
    return (
        f'<line class="rule" x1="{left}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _tick(x: float, label: str) -> str:
    base = _HEIGHT - _BOTTOM
    return (
        f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>'
        f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{escape(label)}</text>'
    )


def _line(i: int, name: str, line: Sequence[Point], x_scale: _Scale, y_scale: _Scale) -> str:
    """The thinned series: an unbroken stroke for each run of known points, and a dot that tells its values for each of a few."""
    kept = thin(line)
    path = ""
    for known, run in groupby(kept, lambda point: point[1] is not None):
        if known:
            pixels = [f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in run if y is not None]
            path += "M" + "L".join(pixels) + ("z" if len(pixels) == 1 else "")  # closed, a single point is drawn as a dot
    drawn = f'<path class="{_style(i)}" d="{path}"/>' if path else ""
    if len(kept) <= _MARKED:
        for x, y in kept:
            if y is not None:
                says = f"{escape(name)}: {significant(y)} at {x:.6g}"
                at = f'cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}"'
                drawn += f'<circle class="dot s{i % _COLOURS}" {at} r="2.6"><title>{says}</title></circle>'
    return drawn


def _best(point: tuple[float, float], x_scale: _Scale, y_scale: _Scale) -> str:
    x, y = x_scale(point[0]), y_scale(point[1])
    share = (x - x_scale.start) / (x_scale.end - x_scale.start)
    anchor = "start" if share < 0.15 else "end" if share > 0.85 else "middle"
    # Where there is room: above in the lower half of the plot, below in the upper.
    text_y = y - 12 if y > (_TOP + _HEIGHT - _BOTTOM) / 2 else y + 20
    return (
        f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>'
        f'<text class="best" x="{x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}">{significant(point[1])}</text>'
    )

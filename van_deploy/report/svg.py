"""Small plots as SVG: lines, bars and points, with axes, units and a legend.

Colours are the page's CSS variables (``--series-1`` ... and ``--ink``,
``--muted``, ``--grid``, ``--surface``), so one drawing serves light, dark and
print. Every mark carries a ``<title>`` that names its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Axis",
    "Bar",
    "Point",
    "Series",
    "bar_chart",
    "interval_chart",
    "line_chart",
    "nice_ticks",
    "scatter",
]

SERIES_COLOURS = 8
CHARACTER = 6.4  # mean width of one at the labels' size, in user units


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it measures, with its unit.
        log: logarithmic, for values over several decades.
        zero: start at zero (linear axes).
        ticks: where the marks go; None for round numbers.
    """

    label: str
    log: bool = False
    zero: bool = True
    ticks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Series:
    """A named line of ``(x, y)`` points.

    Attributes:
        name: for the legend.
        points: in order of x.
        colour: 1 to 8, a palette entry; 0 by position.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Bar:
    """One horizontal bar.

    Attributes:
        name: at its left.
        value: its length.
        text: written behind its end.
        colour: 1 to 8.
        low: lower end of the whisker, or None.
        high: upper end.
    """

    name: str
    value: float
    text: str
    colour: int = 1
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One labelled mark."""

    name: str
    x: float
    y: float
    colour: int = 1
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _Scale:
    """From values to drawing units."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, 1e-12))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers that cover ``low`` to ``high``.

    >>> nice_ticks(0, 9.3)
    [0, 2, 4, 6, 8, 10]
    """
    if not high > low:
        high = low + 1
    rough = (high - low) / max(1, count)
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, width: int = 560, height: int = 320
) -> str:
    """Return lines with a mark at every point, and a legend below the plot."""
    names = [s.name for s in series]
    legend, legend_height = _legend(names, [s.colour or i + 1 for i, s in enumerate(series)], width)
    area = (64, 14, width - 16, height - 46)
    xs = [p[0] for s in series for p in s.points]
    ys = [p[1] for s in series for p in s.points]
    axes, to_x, to_y = _axes(x, y, xs, ys, area)
    marks: list[str] = []
    for index, line in enumerate(series):
        colour = _colour(line.colour or index + 1)
        places = [(to_x(a), to_y(b)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (a, b), (value_x, value_y) in zip(places, line.points, strict=True):
            told = f"{line.name}: {_number(value_y)} at {_number(value_x)}"
            marks.append(_dot(a, b, colour, told))
    legend = f'<g transform="translate(0,{height})">{legend}</g>'
    label = f"{y.label} against {x.label}"
    return _svg(width, height + legend_height, label, [axes, *marks, legend])


def bar_chart(bars: Sequence[Bar], x: Axis, width: int = 720, row: int = 26) -> str:
    """Return one horizontal bar a row, its name at the left and its text at its end."""
    left = 18 + CHARACTER * max((len(b.name) for b in bars), default=0)
    right = width - 16 - CHARACTER * max((len(b.text) for b in bars), default=0)
    height = 10 + row * len(bars) + 44
    area = (left, 10, right, height - 44)
    values = [v for b in bars for v in (b.value, b.low, b.high) if v is not None]
    ticks, scale = _ticks_and_scale(x, values, area[0], area[2])
    parts = [_x_axis(ticks, scale, x, area)]
    for index, bar in enumerate(bars):
        middle = area[1] + row * (index + 0.5)
        end = scale(bar.value)
        parts.append(_label(left - 8, middle + 4, bar.name, "end"))
        parts.append(
            f'<rect x="{left:.1f}" y="{middle - 8:.1f}" width="{max(1.0, end - left):.1f}" '
            f'height="16" rx="2" fill="{_colour(bar.colour)}">'
            f"<title>{escape(f'{bar.name}: {bar.text}')}</title></rect>"
        )
        reach = end
        if bar.low is not None and bar.high is not None:
            a, reach = scale(bar.low), scale(bar.high)
            parts.append(
                f'<path d="M{a:.1f} {middle:.1f}H{reach:.1f}M{a:.1f} {middle - 4:.1f}v8'
                f'M{reach:.1f} {middle - 4:.1f}v8" stroke="var(--ink)" fill="none" '
                'stroke-width="1.2" opacity="0.7"/>'
            )
        parts.append(_label(max(end, reach) + 6, middle + 4, bar.text, "start", strong=True))
    return _svg(width, height, x.label, parts)


def scatter(points: Sequence[Point], x: Axis, y: Axis, width: int = 560, height: int = 340) -> str:
    """Return labelled marks, with vertical whiskers where an interval is known."""
    area = (64, 14, width - 24, height - 46)
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    axes, to_x, to_y = _axes(x, y, [p.x for p in points], ys, area)
    parts = [axes]
    for point in sorted(points, key=lambda p: p.x):
        a, b = to_x(point.x), to_y(point.y)
        colour = _colour(point.colour)
        if point.low is not None and point.high is not None:
            parts.append(
                f'<path d="M{a:.1f} {to_y(point.low):.1f}V{to_y(point.high):.1f}" '
                f'stroke="{colour}" stroke-width="1.5"/>'
            )
        told = f"{point.name}: {_number(point.x)}, {_number(point.y)}"
        parts.append(_dot(a, b, colour, told, 5))
        fits = a + 10 + CHARACTER * len(point.name) < area[2]
        parts.append(
            _label(a + 9 if fits else a - 9, b - 7, point.name, "start" if fits else "end")
        )
    return _svg(width, height, f"{y.label} against {x.label}", parts)


def interval_chart(points: Sequence[Point], x: Axis, width: int = 720, row: int = 30) -> str:
    """Return one row a point: its ``x`` as a mark on its interval, and a line at zero."""
    left = 18 + CHARACTER * max((len(p.name) for p in points), default=0)
    height = 14 + row * len(points) + 44
    area = (left, 10, width - 40, height - 44)
    ends = [v for p in points for v in (p.x, p.low, p.high) if v is not None]
    reach = 1.1 * max(map(abs, ends), default=1.0) or 1.0
    ticks = nice_ticks(-reach, reach, 6)
    scale = _Scale(ticks[0], ticks[-1], area[0], area[2], log=False)
    zero = scale(0.0)
    parts = [
        _x_axis(ticks, scale, x, area),
        f'<path d="M{zero:.1f} {area[1]}V{area[3]}" stroke="var(--axis)" stroke-width="1.5"/>',
    ]
    for index, point in enumerate(points):
        middle, colour = area[1] + row * (index + 0.5) + 2, _colour(point.colour)
        parts.append(_label(left - 8, middle + 4, point.name, "end"))
        if point.low is not None and point.high is not None:
            parts.append(
                f'<path d="M{scale(point.low):.1f} {middle:.1f}H{scale(point.high):.1f}" '
                f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity="0.45"/>'
            )
        told = f"{point.name}: {_number(point.x)}"
        parts.append(_dot(scale(point.x), middle, colour, told, 5))
    return _svg(width, height, x.label, parts)


def _axes(
    x: Axis, y: Axis, xs: Iterable[float], ys: Iterable[float], area: tuple[float, ...]
) -> tuple[str, _Scale, _Scale]:
    """Return both axes with their grid, and the two scales."""
    left, top, right, bottom = area
    x_ticks, to_x = _ticks_and_scale(x, list(xs), left, right)
    y_ticks, to_y = _ticks_and_scale(y, list(ys), bottom, top)
    parts = [_x_axis(x_ticks, to_x, x, area, grid=False)]
    for tick in y_ticks:
        at = to_y(tick)
        parts.append(_rule(left, at, right, at))
        parts.append(_label(left - 8, at + 4, _number(tick), "end", muted=True))
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="14" y="{middle:.1f}" transform="rotate(-90 14 {middle:.1f})" '
        f'text-anchor="middle" fill="var(--muted)">{escape(y.label)}</text>'
    )
    return "".join(parts), to_x, to_y


def _x_axis(
    ticks: Sequence[float], scale: _Scale, axis: Axis, area: tuple[float, ...], grid: bool = True
) -> str:
    left, top, right, bottom = area
    parts = [f'<path d="M{left:.1f} {bottom:.1f}H{right:.1f}" stroke="var(--axis)"/>']
    for tick in ticks:
        at = scale(tick)
        if grid:
            parts.append(_rule(at, top, at, bottom))
        parts.append(_label(at, bottom + 16, _number(tick), "middle", muted=True))
    middle = (left + right) / 2
    parts.append(_label(middle, bottom + 36, axis.label, "middle", muted=True))
    return "".join(parts)


def _ticks_and_scale(
    axis: Axis, values: Sequence[float], start: float, end: float
) -> tuple[list[float], _Scale]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if axis.ticks is not None:
        ticks = list(axis.ticks)
        pad = 1.0 if axis.log else 0.0
        low, high = min(ticks), max(ticks)
        if axis.log:
            low, high = low / 1.15 * pad, high * 1.15 * pad
    elif axis.log:
        ticks = _log_ticks(low, high)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    else:
        spread = (high - low) or abs(high) or 1.0
        ticks = nice_ticks(0.0 if axis.zero else low - 0.1 * spread, high + 0.02 * spread)
        low, high = ticks[0], ticks[-1]
    return ticks, _Scale(low, high, start, end, axis.log)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 of each decade between, one beyond each end included."""
    low = max(low, 1e-9)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(max(high, low))) + 1)
    marks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    below = max((m for m in marks if m <= low), default=marks[0])
    above = min((m for m in marks if m >= high), default=marks[-1])
    inside = [m for m in marks if below <= m <= above]
    if len(inside) > 8:
        inside = [m for m in inside if math.log10(m) % 1 == 0 or m in (below, above)]
    return inside if len(inside) > 1 else [below, below * 10]


def _legend(names: Sequence[str], colours: Sequence[int], width: int) -> tuple[str, int]:
    """Return the legend, in as many lines as it needs, and its height."""
    x, y, parts = 64.0, 14.0, []
    for name, colour in zip(names, colours, strict=True):
        needed = 24 + CHARACTER * len(name) + 14
        if x + needed > width and x > 64:
            x, y = 64.0, y + 20
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="12" height="12" rx="3" '
            f'fill="{_colour(colour)}"/>'
        )
        parts.append(_label(x + 18, y + 1, name, "start"))
        x += needed
    return "".join(parts), int(y + 12)


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'width="{width:.0f}" height="{height:.0f}" font-size="12">{"".join(parts)}</svg>'
    )


def _dot(x: float, y: float, colour: str, told: str, radius: float = 4) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}" '
        f'stroke="var(--surface)" stroke-width="1.5"><title>{escape(told)}</title></circle>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="var(--grid)"/>'


def _label(
    x: float, y: float, text: str, anchor: str, *, muted: bool = False, strong: bool = False
) -> str:
    fill = "var(--muted)" if muted else "var(--ink)"
    weight = ' font-weight="600"' if strong else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{weight}>'
        f"{escape(text)}</text>"
    )


def _colour(index: int) -> str:
    return f"var(--series-{(index - 1) % SERIES_COLOURS + 1})"


def _number(value: float) -> str:
    """Return a short form of a number for a tick."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,.4g}"

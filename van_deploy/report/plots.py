"""Two small plots as SVG: rows with bars or intervals, and lines or points over two axes.

Colours are the page's CSS variables (``--series-1`` ... and ``--ink``, ``--muted``, ``--grid``,
``--axis``, ``--surface``), so one drawing serves light, dark and print. Names stand in columns of
their own or in the legend, so none covers another, and every mark names its value in a
``<title>``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

KNOWN = {"pytorch": 8, "fp32": 1, "int8": 2, "fp16": 3, "bf16": 4}
CHARACTER = 7.0  # width of one in drawing units at most fonts' 12 pixels, rounded up
ROW, EDGE, BELOW = 28, 12, 46
WIDTH, HALF, LEFT = 940, 480, 66.0


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it measures, with its unit.
        log: logarithmic, for values over several decades.
        zero: start at zero (linear axes).
        ticks: where the marks go; none for round numbers.
    """

    label: str
    log: bool = False
    zero: bool = True
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Mark:
    """One row of :func:`rows_chart`, or one point of :func:`xy_chart`.

    Attributes:
        name: of a row.
        x: its value.
        y: of a point.
        text: at the right of a row.
        colour: 1 to 8.
        low: lower end of its interval (along x in a row, along y at a point), or None.
        high: upper end.
        limit: a line drawn across a row, or None.
    """

    name: str
    x: float
    y: float = 0.0
    text: str = ""
    colour: int = 1
    low: float | None = None
    high: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Series:
    """A named line of points in order of x, in one colour."""

    name: str
    points: Sequence[Mark]
    colour: int


def colours(names: Iterable[str]) -> dict[str, int]:
    """Return the colour of each artifact, the same in every plot: by name, then in order.

    >>> colours(["pytorch", "fp32", "mine"])
    {'pytorch': 8, 'fp32': 1, 'mine': 5}
    """
    found = dict.fromkeys(names)
    others = [name for name in found if name not in KNOWN]
    return {name: KNOWN[name] if name in KNOWN else 5 + others.index(name) % 3 for name in found}


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that cover ``low`` to ``high``.

    >>> nice_ticks(0, 9.3)
    [0, 2, 4, 6, 8, 10]
    """
    high = high if high > low else low + 1
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def rows_chart(marks: Sequence[Mark], axis: Axis, *, dots: bool = False) -> str:
    """Return one row a mark: name, bar (or dot) with its interval and limit, text."""
    left = EDGE + CHARACTER * max((len(m.name) for m in marks), default=0) + 10
    right = WIDTH - EDGE - CHARACTER * max((len(m.text) for m in marks), default=0) - 10
    bottom = EDGE + ROW * len(marks)
    ends = [v for m in marks for v in (m.x, m.low, m.high, m.limit) if v is not None]
    scale = _Scale(axis, [*ends, *[0.0] * dots], left, right)
    parts = [_x_axis(scale, axis, EDGE, bottom)]
    for index, mark in enumerate(marks):
        middle = EDGE + ROW * (index + 0.5)
        parts.append(_label(left - 10, middle + 4, mark.name, "end"))
        parts.append(_label(WIDTH - EDGE, middle + 4, mark.text, "end"))
        parts.append(_row(mark, scale, middle, dots))
    return _svg(WIDTH, bottom + BELOW, axis.label, parts)


def xy_chart(series: Sequence[Series], x: Axis, y: Axis, *, wide: bool = True) -> str:
    """Return lines with a mark at every point, and a legend above them."""
    width = WIDTH if wide else HALF
    legend, top = _legend(series, width)
    right, bottom, middle = width - 20.0, top + 270.0, top + 135.0
    points = [point for one in series for point in one.points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    to_x = _Scale(x, [p.x for p in points], LEFT, right)
    to_y = _Scale(y, ys, bottom, top)
    parts = [legend, _x_axis(to_x, x, top, bottom, grid=False)]
    for tick in to_y.ticks:
        at = to_y(tick)
        parts.append(_path(f"M{LEFT:.1f} {at:.1f}H{right:.1f}", "var(--grid)"))
        parts.append(_label(LEFT - 8, at + 4, _number(tick), "end", muted=True))
    turned = _label(14, middle, y.label, "middle", muted=True)
    parts.append(f'<g transform="rotate(-90 14 {middle:.1f})">{turned}</g>')
    parts += [_line(one, to_x, to_y) for one in series]
    return _svg(width, bottom + BELOW, f"{y.label} against {x.label}", parts)


class _Scale:
    """From values to drawing units, with the ticks of the axis."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if axis.ticks:
            room = 1.15 if axis.log else 1.0
            ticks = list(axis.ticks)
            low, high = min(ticks) / room, max(ticks) * room
        elif axis.log:
            ticks = _log_ticks(low, high)
            low, high = min(low, ticks[0]), max(high, ticks[-1])
        else:
            room = 0.04 * ((high - low) or abs(high) or 1.0)
            ticks = nice_ticks(0.0 if axis.zero and low >= 0 else low - room, high + room)
            low, high = ticks[0], ticks[-1]
        self.ticks, self.low, self.high, self.log = ticks, low, high, axis.log
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = (math.log10(max(v, 1e-12)) for v in (low, high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of each decade between, or the decades where those are many."""
    low, high = max(low, 1e-9), max(high, low, 1e-9)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    first = max((i for i, m in enumerate(marks) if m <= low), default=0)
    last = min((i for i, m in enumerate(marks) if m >= high), default=len(marks) - 1)
    inside = marks[first : max(last, first + 1) + 1]
    return inside if len(inside) <= 8 else [10.0**d for d in decades]


def _row(mark: Mark, scale: _Scale, middle: float, dots: bool) -> str:
    colour, at = f"var(--series-{mark.colour})", scale(mark.x)
    told, parts = f"{mark.name}: {mark.text or _number(mark.x)}", []
    if not dots:
        start = scale(scale.low if scale.log else max(0.0, scale.low))
        parts.append(
            f'<rect x="{start:.1f}" y="{middle - 8:.1f}" width="{max(1.0, at - start):.1f}" '
            f'height="16" rx="2" fill="{colour}"><title>{escape(told)}</title></rect>'
        )
    if mark.low is not None and mark.high is not None:
        a, b = scale(mark.low), scale(mark.high)
        ends = "".join(f"M{end:.1f} {middle - 5:.1f}v10" for end in (a, b))
        ink, width = (colour, 2) if dots else ("var(--ink)", 1.2)
        parts.append(_path(f"M{a:.1f} {middle:.1f}H{b:.1f}{ends}", ink, width))
    if mark.limit is not None:
        path = f"M{scale(mark.limit):.1f} {middle - ROW / 2 + 2:.1f}v{ROW - 4}"
        parts.append(_path(path, "var(--bad)", 2, ' stroke-dasharray="5 4"'))
    return "".join([*parts, _dot(at, middle, colour, told) if dots else ""])


def _line(line: Series, to_x: _Scale, to_y: _Scale) -> str:
    colour, parts = f"var(--series-{line.colour})", []
    places = [(to_x(p.x), to_y(p.y)) for p in line.points]
    if len(places) > 1:
        parts.append(_path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places), colour, 2))
    for (a, b), point in zip(places, line.points, strict=True):
        if point.low is not None and point.high is not None:
            whisker = f"M{a:.1f} {to_y(point.low):.1f}V{to_y(point.high):.1f}"
            parts.append(_path(whisker, colour, 1.5))
        named = f" ({point.name})" if point.name else ""
        told = f"{line.name}{named}: {_number(point.y)} at {_number(point.x)}"
        parts.append(_dot(a, b, colour, told))
    return "".join(parts)


def _legend(series: Sequence[Series], width: float) -> tuple[str, float]:
    """Return the legend, in as many lines as it needs, and where the plot begins."""
    x, y, parts = LEFT, 14.0, []
    for one in series:
        needed, colour = 44 + CHARACTER * len(one.name), f"var(--series-{one.colour})"
        if x + needed > width and x > LEFT:
            x, y = LEFT, y + 20
        parts.append(_path(f"M{x:.1f} {y:.1f}h22", colour, 2))
        parts.append(_dot(x + 11, y, colour, one.name))
        parts.append(_label(x + 28, y + 4, one.name, "start"))
        x += needed
    return "".join(parts), y + 20


def _x_axis(scale: _Scale, axis: Axis, top: float, bottom: float, grid: bool = True) -> str:
    parts = [_path(f"M{scale.start:.1f} {bottom:.1f}H{scale.end:.1f}", "var(--axis)")]
    for tick in scale.ticks:
        at = scale(tick)
        if grid:
            strong = tick == 0 and scale.low < 0
            path = f"M{at:.1f} {top:.1f}V{bottom:.1f}"
            parts.append(_path(path, "var(--axis)" if strong else "var(--grid)"))
        parts.append(_label(at, bottom + 17, _number(tick), "middle", muted=True))
    middle = (scale.start + scale.end) / 2
    return "".join([*parts, _label(middle, bottom + 37, axis.label, "middle", muted=True)])


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'width="{width:.0f}" height="{height:.0f}" font-size="12">{"".join(parts)}</svg>'
    )


def _path(path: str, colour: str, width: float = 1, dash: str = "") -> str:
    return f'<path d="{path}" stroke="{colour}" stroke-width="{width:g}" fill="none"{dash}/>'


def _dot(x: float, y: float, colour: str, told: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" '
        f'stroke="var(--surface)" stroke-width="1.5"><title>{escape(told)}</title></circle>'
    )


def _label(x: float, y: float, text: str, anchor: str, *, muted: bool = False) -> str:
    fill = f' text-anchor="{anchor}" fill="var(--{"muted" if muted else "ink"})"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{fill}>{escape(text)}</text>'


def _number(value: float) -> str:
    """Return a short form of a number for a tick."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:,.4g}"

"""Two types of SVG plots: rows with intervals, and lines or points over two axes.

Colours are CSS variables of the page (``--series-1`` ... and ``--ink``, ``--muted``, ``--grid``,
``--axis``, ``--surface``), so the same plot works in light mode, dark mode and print. Names are in
a column or in the legend, so they do not overlap, and every mark has a tooltip (``<title>``).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

KNOWN = {"pytorch": 8, "fp32": 1, "int8": 2, "fp16": 3, "bf16": 4}
CHARACTER = 7.0  # width of a character in drawing units in most fonts at 12 pixels, rounded up
ROW, EDGE, BELOW = 28, 12, 46
WIDTH, LEFT, HEIGHT = 940, 66.0, 270.0


@dataclass(frozen=True)
class Mark:
    """One row of :func:`rows_chart`, or one point of :func:`xy_chart`.

    Attributes:
        name: name of a row.
        x: value of a row, or x of a point.
        y: y of a point.
        text: text at the right of a row.
        colour: 1 to 8.
        interval: both ends (along x in a row, along y at a point), or None.
        limit: position of a line across a row, or None.
    """

    name: str
    x: float
    y: float = 0.0
    text: str = ""
    colour: int = 1
    interval: Sequence[float] | None = None
    limit: float | None = None


def colours(names: Iterable[str]) -> dict[str, int]:
    """Return the colour of each artifact, which is the same in all plots for known names.

    >>> colours(["pytorch", "fp32", "mine"])
    {'pytorch': 8, 'fp32': 1, 'mine': 5}
    """
    unique = dict.fromkeys(names)
    others = [name for name in unique if name not in KNOWN]
    return {name: KNOWN[name] if name in KNOWN else 5 + others.index(name) % 3 for name in unique}


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


def rows_chart(marks: Sequence[Mark], label: str) -> str:
    """Return a chart with one row per mark: name, a dot with its interval and limit, and text.

    Args:
        marks: one mark per row.
        label: axis label with the unit.
    """
    left = EDGE + CHARACTER * max((len(m.name) for m in marks), default=0) + 10
    right = WIDTH - EDGE - CHARACTER * max((len(m.text) for m in marks), default=0) - 10
    bottom = EDGE + ROW * len(marks)
    values = (value for mark in marks for value in (mark.x, mark.limit, *(mark.interval or ())))
    scale = _Scale([0.0, *(value for value in values if value is not None)], left, right)
    parts = [scale.axis_svg(label, EDGE, bottom)]
    for index, mark in enumerate(marks):
        middle, colour = EDGE + ROW * (index + 0.5), f"var(--series-{mark.colour})"
        parts.append(_label(left - 10, middle + 4, mark.name, "end"))
        parts.append(_label(WIDTH - EDGE, middle + 4, mark.text, "end"))
        if mark.interval:
            low, high = map(scale, mark.interval)
            caps = "".join(f"M{end:.1f} {middle - 5:.1f}v10" for end in (low, high))
            parts.append(_path(f"M{low:.1f} {middle:.1f}H{high:.1f}{caps}", colour, 2))
        if mark.limit is not None:
            path = f"M{scale(mark.limit):.1f} {middle - ROW / 2 + 2:.1f}v{ROW - 4}"
            parts.append(_path(path, "var(--bad)", 2, stroke_dasharray="5 4"))
        tooltip = f"{mark.name}: {mark.text or _short(mark.x)}"
        parts.append(_dot(scale(mark.x), middle, colour, tooltip))
    return _svg(bottom + BELOW, label, parts)


def xy_chart(series: Mapping[str, Sequence[Mark]], x_label: str, y_label: str) -> str:
    """Return a chart of lines with a mark at every point, and a legend.

    Args:
        series: points in the order of x, by line name; the line has the colour of the first.
        x_label: label of the x axis with the unit.
        y_label: label of the y axis with the unit.
    """
    at, top, parts = LEFT, 14.0, list[str]()
    for name, points in series.items():
        needed, colour = 44 + CHARACTER * len(name), f"var(--series-{points[0].colour})"
        if at + needed > WIDTH and at > LEFT:
            at, top = LEFT, top + 20
        parts.append(_path(f"M{at:.1f} {top:.1f}h22", colour, 2))
        parts.append(_dot(at + 11, top, colour, name))
        parts.append(_label(at + 28, top + 4, name, "start"))
        at += needed
    top, right = top + 20, WIDTH - 20.0
    every = [point for points in series.values() for point in points]
    to_x = _Scale([point.x for point in every], LEFT, right)
    ends = [end for point in every for end in (point.y, *(point.interval or ()))]
    to_y = _Scale(ends, top + HEIGHT, top)
    parts.append(to_x.axis_svg(x_label, top, top + HEIGHT))
    for tick in to_y.ticks:
        parts.append(_path(f"M{LEFT:.1f} {to_y(tick):.1f}H{right:.1f}", "var(--grid)"))
        parts.append(_label(LEFT - 8, to_y(tick) + 4, _short(tick), "end", "muted"))
    middle = top + HEIGHT / 2
    turned = _label(14, middle, y_label, "middle", "muted")
    parts.append(_tag("g", turned, transform=f"rotate(-90 14 {middle:.1f})"))
    for name, points in series.items():
        colour = f"var(--series-{points[0].colour})"
        line = "L".join(f"{to_x(p.x):.1f} {to_y(p.y):.1f}" for p in points)
        parts.append(_path(f"M{line}", colour, 2))
        for point in points:
            if point.interval:
                low, high = map(to_y, point.interval)
                whisker = f"M{to_x(point.x):.1f} {low:.1f}V{high:.1f}"
                parts.append(_path(whisker, colour, 1.5))
            part = f" ({point.name})" if point.name else ""
            tooltip = f"{name}{part}: {_short(point.y)} at {_short(point.x)}"
            parts.append(_dot(to_x(point.x), to_y(point.y), colour, tooltip))
    return _svg(top + HEIGHT + BELOW, f"{y_label} against {x_label}", parts)


class _Scale:
    """Scale from values to drawing units, and the ticks of its axis, which starts at 0 if near."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.04 * ((high - low) or abs(high) or 1.0)
        self.ticks = nice_ticks(0.0 if 0 <= low <= high / 2 else low - room, high + room)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def axis_svg(self, label: str, top: float, bottom: float) -> str:
        """Return the axis below a plot, with a grid line at each tick."""
        parts = [_path(f"M{self.start:.1f} {bottom:.1f}H{self.end:.1f}", "var(--axis)")]
        for tick in self.ticks:
            line = f"M{self(tick):.1f} {top:.1f}V{bottom:.1f}"
            colour = "var(--axis)" if tick == 0 and self.ticks[0] < 0 else "var(--grid)"
            parts.append(_path(line, colour))
            parts.append(_label(self(tick), bottom + 17, _short(tick), "middle", "muted"))
        middle = (self.start + self.end) / 2
        return "".join([*parts, _label(middle, bottom + 37, label, "middle", "muted")])


def _svg(height: float, label: str, parts: Iterable[str]) -> str:
    more: dict[str, str | float] = {"role": "img", "aria-label": escape(label), "font-size": 12}
    box, size = f"0 0 {WIDTH} {height:.0f}", f"{height:.0f}"
    return _tag("svg", "".join(parts), viewBox=box, width=WIDTH, height=size, **more)


def _path(path: str, colour: str, width: float = 1, **more: str) -> str:
    return _tag("path", d=path, stroke=colour, stroke_width=width, fill="none", **more)


def _dot(x: float, y: float, colour: str, tooltip: str) -> str:
    ring: dict[str, str | float] = {"stroke": "var(--surface)", "stroke_width": 1.5}
    return _tag("circle", _tag("title", escape(tooltip)), cx=x, cy=y, r=4.5, fill=colour, **ring)


def _label(x: float, y: float, text: str, anchor: str, colour: str = "ink") -> str:
    return _tag("text", escape(text), x=x, y=y, text_anchor=anchor, fill=f"var(--{colour})")


def _tag(name: str, inside: str = "", **attributes: str | float) -> str:
    texts = [
        f' {key.replace("_", "-")}="{value if isinstance(value, str) else f"{value:.6g}"}"'
        for key, value in attributes.items()
    ]
    return f"<{name}{''.join(texts)}>{inside}</{name}>"


def _short(value: float) -> str:
    """Return a number in short form, for ticks and tooltips."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:,.4g}"

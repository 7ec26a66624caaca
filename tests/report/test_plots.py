"""Plots: well-formed, inside the frame, without overlaps, with tooltips."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import numpy as np
import pytest

from tests.each import each
from van_deploy.report.plots import CHARACTER, Mark, nice_ticks, rows_chart, xy_chart


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.get(name, "nan")) for name in names]


def dots(svg: str) -> dict[str, list[float]]:
    """Return the x and y of each mark by its tooltip."""
    return {
        circle.findtext("title", ""): numbers(circle, "cx", "cy")
        for circle in ET.fromstring(svg).iter("circle")
    }


def require_linear(values: Sequence[float], places: Sequence[float], direction: int) -> None:
    """Check that places grow, or fall, linearly with the values."""
    slope, start = np.polyfit(values, places, 1)
    assert slope * direction > 0
    assert list(start + slope * np.array(values)) == pytest.approx(places, abs=0.2)


def require_readable(svg: str) -> None:
    """Check that texts are inside the plot and do not overlap."""
    width, texts = float(ET.fromstring(svg).get("width", "0")), []
    for text in ET.fromstring(svg).iter("text"):
        (x, y), long = numbers(text, "x", "y"), CHARACTER * len(text.text or "")
        start = {"start": x, "middle": x - long / 2, "end": x - long}[text.get("text-anchor", "")]
        if x != 14:  # not a turned label
            texts.append((text.text, start, start + long, y))
    for i, (one, start, end, y) in enumerate(texts):
        assert -1 <= start < end <= width + 1 or not one, one
        for other, low, high, at in texts[i + 1 :]:
            assert abs(y - at) >= 10 or end <= low + 1 or high <= start + 1, (one, other)


def test_xy_chart_positions_and_tooltips() -> None:
    points = ((1, 10), (2, 20), (8, 80), (3, 5))
    marks = [Mark("", *point) for point in points[:3]]
    svg = xy_chart({"a<b": marks, "flat": [Mark("", 3, 5, interval=(4, 6))]}, "batch", "ms")
    found = dots(svg)
    x, y = zip(
        *(found[f"{'a<b' if v > 5 else 'flat'}: {v} at {at}"] for at, v in points), strict=True
    )
    require_linear([1, 2, 8, 3], x, 1)
    whisker = map(float, re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", svg)[-1])
    require_linear([10, 20, 80, 5, 4, 6], [*y, *whisker], -1)  # SVG counts downwards
    require_readable(svg)


def test_rows_chart_positions_and_tooltips() -> None:
    marks = [Mark("a", -0.5, interval=(-1, 0.1), limit=0.2), Mark("b", 0.5, interval=(0.3, 0.9))]
    svg = rows_chart(marks, "points")
    found = dots(svg)
    (limit,) = re.findall(r'd="M([\d.]+) [\d.]+v24" stroke="var\(--bad\)"', svg)
    (zero,) = re.findall(r'd="M([\d.]+) [\d.]+V[\d.]+" stroke="var\(--axis\)"', svg)
    ends = map(float, [*re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)M', svg)[0], limit, zero])
    places = [found["a: -0.5"][0], found["b: 0.5"][0], *ends]
    require_linear([-0.5, 0.5, -1, 0.1, 0.2, 0], places, 1)


def test_long_names_do_not_overlap() -> None:
    names = [f"tensorrt/van_b3-int8-sm89-rtx1.7.1.{i}" for i in range(9)]
    marks = [Mark(n, 10.0 + i, text=f"{i} ms INCONCLUSIVE") for i, n in enumerate(names)]
    series = {n: [Mark("", i, i), Mark("", 9, 9)] for i, n in enumerate(names)}
    require_readable(rows_chart(marks, "latency (ms)"))
    require_readable(xy_chart(series, "x", "y"))


@each(("low", "high"), [(0, 9.3), (-1, 1), (0, 1e-6), (99.9, 100.1), (0, 123456), (5, 5), (0, 0)])
def test_ticks_cover_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 9
    lines = xy_chart({"s": [Mark("", 1, low), Mark("", 1, high)]}, "x", "y")
    for svg in (lines, rows_chart([Mark("p", high, interval=(low, high))], "x")):
        assert not any(np.isnan(place).any() for place in dots(svg).values())

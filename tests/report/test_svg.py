"""Plots: well-formed, inside their frame, and every value named."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from tests.each import each
from van_deploy.report.svg import (
    Axis,
    Bar,
    Point,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
    nice_ticks,
    scatter,
)


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.get(name, "nan")) for name in names]


def titles(svg: str) -> list[str]:
    return [title.text or "" for title in ET.fromstring(svg).iter("title")]


@each(("low", "high"), [(0, 1), (0, 9.3), (-1, 1), (0, 1e-6), (99.9, 100.1), (0, 123456), (5, 5)])
def test_ticks_are_round_few_and_cover_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    mantissa = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
    assert round(mantissa, 6) in {1, 2, 2.5, 5, 10}


def test_lines_go_up_where_values_do_and_stay_inside() -> None:
    series = [Series("a<b", [(1, 10), (2, 20), (8, 80)]), Series("flat", [(1, 5), (8, 5)])]
    svg = line_chart(series, Axis("batch", log=True, ticks=(1, 2, 8)), Axis("ms"), 500, 300)
    root = ET.fromstring(svg)
    marks = list(root.iter("circle"))
    x, y = zip(*(numbers(mark, "cx", "cy") for mark in marks), strict=True)
    assert list(x[:3]) == sorted(x[:3])
    assert list(y[:3]) == sorted(y[:3], reverse=True), "SVG counts downwards"
    assert y[3] == y[4]
    assert all(0 < v < 500 for v in x)
    assert all(0 < v < 300 for v in y)
    assert titles(svg) == [
        "a<b: 10 at 1",
        "a<b: 20 at 2",
        "a<b: 80 at 8",
        "flat: 5 at 1",
        "flat: 5 at 8",
    ]
    texts = [text.text for text in root.iter("text")]
    assert {"batch", "ms", "a<b", "flat"} <= set(texts)


def test_a_logarithmic_axis_spaces_decades_evenly() -> None:
    svg = line_chart([Series("s", [(1, 1), (2, 10), (3, 100)])], Axis("x"), Axis("y", log=True))
    y = [numbers(mark, "cy")[0] for mark in ET.fromstring(svg).iter("circle")]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart([Bar("one", 10, "10"), Bar("two", 20, "20", low=18, high=23)], Axis("ms"))
    widths = [numbers(bar, "width")[0] for bar in ET.fromstring(svg).iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert titles(svg) == ["one: 10", "two: 20"]


def test_points_and_intervals_are_where_they_belong() -> None:
    points = [Point("left", 1, 70, 1, 65, 75), Point("right", 9, 71)]
    marks = list(ET.fromstring(scatter(points, Axis("x"), Axis("y", zero=False))).iter("circle"))
    assert numbers(marks[0], "cx")[0] < numbers(marks[1], "cx")[0]
    svg = interval_chart([Point("a", -0.5, 0, 1, -1.0, 0.0), Point("b", 0.5, 0)], Axis("points"))
    left, right = (numbers(m, "cx")[0] for m in ET.fromstring(svg).iter("circle"))
    line = re.search(r'd="M([\d.]+) [\d.]+V', svg)
    assert line is not None
    assert left < float(line[1]) < right, "zero is between them"


@each("value", [0.0, 1e-9, 5.0, -3.0])
def test_one_value_alone_is_no_trouble(value: float) -> None:
    for svg in (
        line_chart([Series("s", [(1, value)])], Axis("x"), Axis("y")),
        bar_chart([Bar("b", value, "b")], Axis("x")),
        scatter([Point("p", value, value)], Axis("x"), Axis("y", zero=False)),
        interval_chart([Point("p", value, 0.0, 1, value, value)], Axis("x")),
    ):
        assert "nan" not in svg
        ET.fromstring(svg)


def test_colours_come_from_the_page() -> None:
    svg = line_chart([Series(str(i), [(0, i)]) for i in range(9)], Axis("x"), Axis("y"))
    assert set(re.findall(r'(?:fill|stroke)="([^"]+)"', svg)) <= {
        "none",
        "var(--ink)",
        "var(--muted)",
        "var(--grid)",
        "var(--axis)",
        "var(--surface)",
        *(f"var(--series-{i})" for i in range(1, 9)),
    }

"""Plots: well-formed, inside the frame, without overlaps, with tooltips."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from tests.each import each
from van_deploy.report.plots import CHARACTER, Mark, colours, nice_ticks, rows_chart, xy_chart


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.get(name, "nan")) for name in names]


def titles(svg: str) -> list[str]:
    return [title.text or "" for title in ET.fromstring(svg).iter("title")]


def boxes(svg: str) -> list[tuple[str, float, float, float]]:
    """Return text, left end, right end and y of each horizontal text."""
    found = []
    for text in ET.fromstring(svg).iter("text"):
        x, y = numbers(text, "x", "y")
        width = CHARACTER * len(text.text or "")
        start = {"start": x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor", "")]
        if text.get("y") != text.get("x") and x != 14:  # a turned label
            found.append((text.text or "", start, start + width, y))
    return found


def require_readable(svg: str) -> None:
    """Check that texts are inside the plot and do not overlap."""
    width = float(ET.fromstring(svg).get("width", "0"))
    texts = boxes(svg)
    for name, start, end, _ in texts:
        assert start >= -1, name
        assert end <= width + 1, name
    for i, (one, start, end, y) in enumerate(texts):
        for other, low, high, at in texts[i + 1 :]:
            assert abs(y - at) >= 10 or end <= low + 1 or high <= start + 1, (one, other)


@each(("low", "high"), [(0, 1), (0, 9.3), (-1, 1), (0, 1e-6), (99.9, 100.1), (0, 123456), (5, 5)])
def test_nice_ticks_cover_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9


def test_xy_chart_positions_and_tooltips() -> None:
    series = {
        "a<b": [Mark("", 1, 10), Mark("", 2, 20), Mark("", 8, 80)],
        "flat": [Mark("", 1, 5), Mark("", 8, 5, interval=(4, 6))],
    }
    svg = xy_chart(series, "batch", "ms")
    x, y = zip(*(numbers(m, "cx", "cy") for m in ET.fromstring(svg).iter("circle")), strict=True)
    named = titles(svg)
    lines = [index for index, name in enumerate(named) if " at " in name]
    assert [named[i] for i in lines][:3] == ["a<b: 10 at 1", "a<b: 20 at 2", "a<b: 80 at 8"]
    xs, ys = [x[i] for i in lines], [y[i] for i in lines]
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[1]) / 6, abs=0.2)
    assert ys[0] - ys[1] == pytest.approx((ys[1] - ys[2]) / 6, abs=0.2), "SVG counts downwards"
    assert ys[3] == ys[4]
    require_readable(svg)
    (low, high) = map(float, re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", svg)[-1])
    assert low - ys[4] == pytest.approx(ys[4] - high, abs=0.2), "a whisker reaches both ends"


def test_rows_chart_positions_and_tooltips() -> None:
    marks = [Mark("a", -0.5, interval=(-1, 0.1), limit=0.2), Mark("b", 0.5, interval=(0.3, 0.9))]
    svg = rows_chart(marks, "points")
    left, right = (numbers(m, "cx")[0] for m in ET.fromstring(svg).iter("circle"))
    (limit,) = re.findall(r'd="M([\d.]+) [\d.]+v24" stroke="var\(--bad\)"', svg)
    (zero,) = re.findall(r'd="M([\d.]+) [\d.]+V[\d.]+" stroke="var\(--axis\)"', svg)
    assert left < float(zero) < float(limit) < right
    assert left - float(zero) == pytest.approx(float(zero) - right, abs=0.2)
    low, high = map(float, re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)M', svg)[0])
    assert (left - low) / (high - left) == pytest.approx(0.5 / 0.6, abs=0.02), "both ends"
    assert titles(svg) == ["a: -0.5", "b: 0.5"]


def test_long_names_do_not_overlap() -> None:
    names = [f"tensorrt/van_b3-int8-sm89-rtx1.7.1.{i}" for i in range(9)]
    marks = [Mark(n, 10.0 + i, text=f"{i} ms INCONCLUSIVE") for i, n in enumerate(names)]
    series = {n: [Mark("", i, i), Mark("", 9, 9)] for i, n in enumerate(names)}
    require_readable(rows_chart(marks, "latency (ms)"))
    require_readable(xy_chart(series, "x", "y"))


@each("value", [0.0, 1e-9, 5.0, -3.0])
def test_charts_of_one_value(value: float) -> None:
    for svg in (
        xy_chart({"s": [Mark("", 1, value)]}, "x", "y"),
        rows_chart([Mark("p", value, interval=(value, value))], "x"),
    ):
        assert "nan" not in svg
        ET.fromstring(svg)


def test_colours() -> None:
    first = colours(["int8", "fp32", "mine"])
    assert colours(["fp32", "pytorch", "int8"]).items() >= {"fp32": 1, "int8": 2}.items()
    assert len({first["int8"], first["fp32"], first["mine"]}) == 3

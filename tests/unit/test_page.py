"""Pieces of a page: escaped, whole, and drawn where the numbers say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from minigpt.page import Html, bar_chart, charts, escape, line_chart, page, table, ticks


def drawings(markup: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", markup, re.S)]


def test_a_page_is_self_contained_and_follows_the_colour_scheme() -> None:
    text = page("a < b", charts([line_chart("Loss", {"train": [(0, 1.0), (9, 2.0)]})]))
    assert "<h1>a &lt; b</h1>" in text
    assert text.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)


def test_what_is_not_markup_is_escaped() -> None:
    assert escape("<b>&") == "&lt;b&gt;&amp;"
    assert escape(Html("<b>")) == "<b>"
    evil = "</svg><script>x"
    for markup in (
        table([evil, "n"], [[evil, 1]]),
        line_chart(evil, {evil: [(0, 1)], "b": [(0, 2)]}, evil, evil),
        bar_chart(evil, [(evil, 1.0)], unit=evil),
    ):
        assert "<script" not in markup


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (23456.7, "23,457"),
        (True, "True"),
    ],
)
def test_numbers_are_written_for_a_reader(value: object, text: str) -> None:
    assert escape(value) == text


def test_a_column_of_numbers_stands_to_the_right() -> None:
    rows = re.findall(r"<tr>.*?</tr>", table(["name", "n"], [["a", 1], ["b", None]]), re.S)
    assert [row.count('class="n"') for row in rows] == [1, 1, 1]
    assert "<td>a</td>" in rows[1]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.013, 0.052, [0.02, 0.03, 0.04, 0.05]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == wanted


def test_lines_leave_out_what_is_not_finite_and_keep_the_last_point() -> None:
    points = [(float(x), 1.0 + x % 7) for x in range(1000)] + [(1000.0, math.nan)]
    (svg,) = drawings(line_chart("Loss", {"train": points}))
    path = next(p for p in svg.iter("path") if p.get("stroke-width") == "1.8")
    drawn = str(path.get("d"))
    assert "nan" not in drawn
    assert 200 < drawn.count("L") <= 301
    last = float(drawn.rsplit("L", 1)[1].split()[0])
    assert 380 < last <= 426
    assert "No points" in line_chart("Loss", {"train": [(0, math.inf)]})


def test_a_flat_line_and_a_single_point_can_be_drawn() -> None:
    for points in ([(5, 0.0)], [(0, 3.0), (9, 3.0)]):
        assert drawings(line_chart("x", {"a": points}))


def test_bars_are_as_long_as_their_values() -> None:
    bars = [("一个很长很长很长的中文标签", 0.5), ("b", 1.0), ("none", 0.0)]
    intervals = [(0.4, 0.6), (0.9, 1.0), (0.0, 0.1)]
    chart = bar_chart("Exam", bars, intervals=intervals, largest=2.0, unit=" m")
    assert re.findall(r'<i style="width:([\d.]+)%"', chart) == ["25.00", "50.00", "0.00"]
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", chart)[1] == ("45.00", "5.00")
    assert "<span>一个很长很长很长的中文标签</span>" in chart
    assert "<b>0.5 m</b>" in chart
    assert "width:100.00%" in bar_chart("by the largest", bars)
    assert "<figcaption>nothing" in bar_chart("nothing", [])

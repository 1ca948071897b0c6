"""Figures stand where their numbers are; tables for screen and Markdown."""

from xml.etree import ElementTree

import pytest
from rich.console import Console

from looplm.evaluation.drawings import BOTTOM, TOP, Mark, cloud_chart, share_chart, share_marks, trade_chart
from looplm.evaluation.intervals import share
from looplm.evaluation.tables import Table


def elements(svg: str, tag: str, kind: str | None = None):
    return [found for found in ElementTree.fromstring(svg).iter(tag) if kind is None or found.get("class") == kind]


def test_marks_stand_at_their_share_with_their_interval():
    drawn = share_chart({"a & b": [Mark(1, 0.0), Mark(2, 1.0, 0.5, 1.0)], "none": []}, "<t>", "share", "loops")
    circles = elements(drawn, "circle")
    assert [float(circle.get("cy")) for circle in circles] == [BOTTOM, TOP]
    assert float(circles[0].get("cx")) < float(circles[1].get("cx"))
    (bar,) = elements(drawn, "path", "leader")
    assert bar.get("d").endswith(f"M{circles[1].get('cx')} {(BOTTOM + TOP) / 2:.1f}V{TOP:.1f}".removeprefix("M"))
    assert ElementTree.fromstring(drawn).find("title").text == "<t>"
    assert "1.00 at 2" in ElementTree.fromstring(drawn).find("desc").text
    assert [text.text for text in elements(drawn, "text", "label")] == ["a & b"]
    assert share_chart({"none": []}, "t", "u") == ""


def test_points_stand_at_their_cost():
    """0 and 1 with 5 % of room: a y range of -.05..1.05; x from 54 (0 %) to 420 (100 %)."""
    points = {"whole": Mark(100, 0.0, 0.0, 0.0), "a & b": Mark(25, 1.0, 0.5, 1.0), "bare": Mark(50, 0.5)}
    drawn = trade_chart(points, "t", "nats", "bytes")
    circles = elements(drawn, "circle")
    assert [float(circle.get("cx")) for circle in circles] == [420, 145.5, 237]
    height = BOTTOM - TOP
    assert [float(circle.get("cy")) for circle in circles] == pytest.approx(
        [BOTTOM - height * 0.05 / 1.1, BOTTOM - height * 1.05 / 1.1, BOTTOM - height * 0.55 / 1.1], abs=0.06
    )
    assert len(elements(drawn, "path", "leader")) == 2
    assert [text.text for text in elements(drawn, "text", "label")] == list(points)
    assert "a & b: 1.000 at 25" in ElementTree.fromstring(drawn).find("desc").text
    assert trade_chart({}, "t", "u", "a") == ""
    assert "NaN" not in trade_chart({"one": Mark(100, 0.0)}, "t", "u", "a")  # no range, no fault


def test_long_lines_have_no_circles():
    drawn = share_chart({"a": [Mark(place / 10, 0.5) for place in range(40)]}, "t", "u")
    assert not elements(drawn, "circle") and len(elements(drawn, "text", "label")) == 1


def test_marks_of_shares():
    assert share_marks({1: share(5, 20), 2: share(1, 2), 3: share(0, 0)}) == [
        Mark(1, 0.25, pytest.approx(0.1119, abs=1e-4), pytest.approx(0.4687, abs=1e-4)),
        Mark(2, 0.5),
    ]


def test_clouds_keep_their_shape_in_their_panel():
    clouds = {"harmful": [(0.0, 0.0), (10.0, 5.0)], "benign": [(5.0, 2.5)]}
    drawn = cloud_chart({"loop 1": clouds, "loop 2": clouds, "loop 3": clouds, "loop 4": clouds}, "t")
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in elements(drawn, "circle")]
    assert len(circles) == 4 * 2 + 1  # and one in the key
    (left, low), (right, high) = circles[:2]
    assert right - left == pytest.approx(2 * (low - high), abs=0.2)  # one scale for both axes
    assert circles[6][1] > circles[0][1] and circles[6][0] == circles[0][0]  # the fourth panel begins a new row
    assert [text.text for text in elements(drawn, "text")][:4] == ["loop 1", "loop 2", "loop 3", "loop 4"]
    assert cloud_chart({"loop 1": {"harmful": []}}, "t") == ""
    assert cloud_chart({"loop 1": {"one": [(1.0, 1.0)]}}, "t").count("<circle") == 2  # no range, no fault


def test_a_table_on_screen_and_in_markdown():
    table = Table("A [bold] title", ("loop", "share"), (("1", "a|b"), ("2*", "–")), ("a note", "* beyond"))
    assert table.markdown() == (
        "**A [bold] title**\n\n| loop | share |\n| --- | ---: |\n| 1 | a\\|b |\n| 2* | – |\n\na note\n\n* beyond\n"
    )
    console = Console(width=60, record=True)
    console.print(table.rich())
    text = console.export_text()
    assert "A [bold] title" in text and "a|b" in text and "* beyond" in text
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        Table("t", ("a", "b"), (("1",),))

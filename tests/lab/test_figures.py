"""Charts: numbers where they belong, whole XML, no request to anywhere."""

import xml.etree.ElementTree as ElementTree

import pytest

from looplm.lab.figures import BOTTOM, LEFT, RIGHT, TOP, curves, dot_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def row(run, arm, loop, score, items=1):
    return {"run": run, "arm": arm, "loop": loop, "score": score, "items": items}


def test_scores_of_a_run_are_weighed_by_items():
    rows = [row("a", "x", 1, 0.0, 30), row("a", "x", 1, 1.0, 10), row("b", "x", 1, 0.5), row("c", "y", 2, 0.7)]
    assert curves(rows, "loop", "arm") == {"x": {1: [0.25, 0.5]}, "y": {2: [0.7]}}


def test_a_line_goes_through_the_means_and_its_band_spans_the_seeds():
    drawing = ElementTree.fromstring(line_chart({"x": {1: [0.0, 1.0], 2: [1.0, 1.0]}}, "a title", "loop"))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter(f"{SVG}circle")]
    assert circles == [(LEFT + 8, (TOP + BOTTOM) / 2), (RIGHT - 8, TOP)]
    (band,) = [path.get("d") for path in drawing.iter(f"{SVG}path") if path.get("class") == "band"]
    assert f"{LEFT + 8:.1f} {BOTTOM:.1f}" in band and f"{LEFT + 8:.1f} {TOP:.1f}" in band
    assert drawing.find(f"{SVG}title").text == "a title"


def test_values_beyond_shares_get_their_own_scale():
    drawing = ElementTree.fromstring(line_chart({"x": {1: [2.0], 2: [4.0]}}, "loss", "loop", "nats"))
    heights = [float(c.get("cy")) for c in drawing.iter(f"{SVG}circle")]
    assert TOP < heights[1] < heights[0] < BOTTOM


def test_every_seed_is_a_dot():
    drawing = ElementTree.fromstring(dot_chart({"a & b": [0.0, 0.5, 1.0], "none yet": [], "c": [0.25]}, "<t>", "score"))
    assert len(list(drawing.iter(f"{SVG}circle"))) == 4
    texts = [text.text for text in drawing.iter(f"{SVG}text")]
    assert "a & b" in texts and "0.500" in texts and "none yet" not in texts


@pytest.mark.parametrize("drawing", [line_chart({}, "t", "loop"), dot_chart({"a": []}, "t", "score")])
def test_without_data_there_is_no_drawing(drawing):
    assert drawing == ""


def test_drawings_ask_nobody_for_anything():
    drawing = line_chart({"x": {1: [0.5]}}, "t", "loop")
    assert "http" not in drawing.replace("http://www.w3.org/2000/svg", "") and "script" not in drawing

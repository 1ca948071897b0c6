import io
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from looplm.display import (
    INK,
    depth_colour,
    depth_legend,
    depth_line_colour,
    depth_plain,
    depth_text,
    printable,
)

TOKENS = [("The", 1), (" quick", 1), (" fox", 4), ("\n", 3), ("ran", 2)]
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ rgb)


def contrast(one, other):
    light, dark = sorted((np.array([0.2126, 0.7152, 0.0722]) @ linear(c) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_ends_of_the_ramp_are_its_first_and_last_anchor():
    assert [depth_colour(d, 4) for d in (1, 2, 3, 4)] == ["#d9f1fb", "#c0c2f5", "#f592b3", "#f36a3c"]
    assert depth_colour(1, 1) == "#d9f1fb"
    # Halfway between anchors 1 (#d9f1fb) and 2 (#b5ddfb): depth 2 of 13 is position 0.5.
    assert depth_colour(2, 13) == "#c7e7fb"


@given(st.integers(1, 64))
def test_every_colour_is_readable(max_depth):
    for depth in range(1, max_depth + 1):
        assert contrast(INK, depth_colour(depth, max_depth)) >= 5.8
        assert contrast("#ffffff", depth_line_colour(depth, max_depth)) >= 4.5
        assert contrast("#14161a", depth_colour(depth, max_depth)) >= 5.8


@given(st.integers(2, 32))
def test_deeper_is_darker(max_depth):
    lightness = [oklab(linear(depth_colour(d, max_depth)))[0] for d in range(1, max_depth + 1)]
    assert all(deeper < shallower for shallower, deeper in pairwise(lightness))


@pytest.mark.parametrize("matrix", BLINDNESS.values(), ids=BLINDNESS)
def test_four_depths_stay_apart_for_colour_blind_eyes(matrix):
    seen = [oklab(np.clip(np.array(matrix) @ linear(depth_colour(d, 4)), 0, 1)) for d in range(1, 5)]
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) > 0.08


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_a_depth_outside_the_ramp_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth {depth} is outside 1\.\.4"):
        depth_colour(depth, 4)


def test_depth_text_keeps_the_text_and_colours_each_token():
    text = depth_text(TOKENS, 4)
    assert text.plain == "The quick fox\nran"
    backgrounds = [text.plain[s.start : s.end] + " " + s.style.bgcolor.name for s in text.spans]
    assert backgrounds == [f"{piece} {depth_colour(depth, 4)}" for piece, depth in TOKENS]


def test_a_terminal_gets_colours_and_a_pipe_gets_none():
    terminal, pipe = io.StringIO(), io.StringIO()
    Console(file=terminal, force_terminal=True, color_system="truecolor").print(depth_text(TOKENS, 4))
    Console(file=pipe).print(depth_text(TOKENS, 4))
    assert "48;2;217;241;251" in terminal.getvalue()
    assert pipe.getvalue() == "The quick fox\nran\n"


def test_the_legend_names_every_depth():
    legend = depth_legend(3)
    assert legend.plain == "depth  1  2  3 "
    assert [span.style.bgcolor.name for span in legend.spans] == [depth_colour(d, 3) for d in (1, 2, 3)]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ([("The", 1), (" quick", 1), (" fox", 4)], "The quick¹ fox⁴"),
        ([("The ", 2), ("end\n", 12)], "The² end¹²\n"),
        ([("fox", 4), ("\n", 1), ("ran", 4)], "fox⁴\n¹ran⁴"),
        ([("a", 1), ("", 3), ("b", 1)], "ab¹"),
        ([("\x1b[31m", 2)], "␛[31m²"),
        ([], ""),
    ],
)
def test_plain_marks(tokens, shown):
    assert depth_plain(tokens) == shown


PIECES = st.text(st.characters(codec="utf-8", exclude_characters=SUPERSCRIPTS))


@given(st.lists(st.tuples(PIECES, st.integers(1, 12)), max_size=8))
def test_plain_marks_add_nothing_but_one_depth_a_run(tokens):
    shown = depth_plain(tokens)
    assert "".join(c for c in shown if c not in SUPERSCRIPTS) == "".join(printable(text) for text, _ in tokens)
    depths = [depth for text, depth in tokens if text]
    runs = [d for i, d in enumerate(depths) if i == 0 or depths[i - 1] != d]
    marks = "".join(c if c in SUPERSCRIPTS else " " for c in shown).split()
    assert ["".join(str(SUPERSCRIPTS.index(c)) for c in mark) for mark in marks] == [str(d) for d in runs]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 🙂\n\t", "plain é 漢 🙂\n\t"),
        ("\x00\x07\r\x1b\x7f", "␀␇␍␛␡"),
        ("\x9b31m", "�31m"),
        ("‮evil", "�evil"),
        ("\ud800", "�"),
        ("👩‍🚀", "👩‍🚀"),
    ],
)
def test_controls_become_visible(text, shown):
    assert printable(text) == shown


def test_what_people_see_needs_no_torch():
    modules = ("files", "display", "training.tracking", "training.report")
    code = ";".join(f"import looplm.{name}" for name in modules) + ";import sys;print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

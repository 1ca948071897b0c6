import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.training.charts import depth_chart, exit_chart, frontier_chart, loss_chart, series, spread, thin, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3.6, 5.2, [4, 4.5, 5]),
        (0, 24_576_000, [0, 5e6, 10e6, 15e6, 20e6]),
        (-0.011, 0.009, [-0.01, -0.005, 0, 0.005]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e12))
def test_ticks_are_few_even_and_inside(low, span):
    marks = ticks(low, low + span)
    assert 2 <= len(marks) <= 9
    assert all(low - span * 1e-6 <= mark <= low + span * (1 + 1e-6) for mark in marks)
    steps = [b - a for a, b in pairwise(marks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)


def test_thin_averages_neighbours_and_skips_gaps():
    rows = [[1, 10.0], [2, 20.0], [3, None], [4, 40.0], [5, 60.0], [6, 70.0]]
    assert thin(rows, most=3) == [[1.5, 15.0], [4.5, 50.0], [6, 70.0]]
    assert thin(rows, most=5) == [[1, 10.0], [2, 20.0], [4, 40.0], [5, 60.0], [6, 70.0]]
    assert thin([]) == []


@given(st.lists(st.floats(-100, 100), max_size=900), st.integers(1, 300))
def test_thin_keeps_order_and_totals(values, most):
    rows = thin([[i, value] for i, value in enumerate(values)], most)
    assert len(rows) <= most
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    size = max(math.ceil(len(values) / most), 1)
    sizes = [min(size, len(values) - i) for i in range(0, len(values), size)]
    total = sum(row[1] * n for row, n in zip(rows, sizes, strict=True))
    assert total == pytest.approx(sum(values), abs=1e-6)


def test_series_keeps_the_rows_of_a_stage_with_its_most_loops():
    rows = [{"tokens": 1, "p": [1.0]}, {"tokens": 2, "p": [0.5, 0.5]}, {"tokens": 3}, {"tokens": 4, "p": [0.1, 0.9]}]
    assert series(rows, "p") == [[[2, 0.5, 0.5], [4, 0.1, 0.9]]]
    staged = [{"stage": "a", **rows[3]}, {"stage": "b", **rows[0]}, {"stage": "b", "tokens": 9, "p": [1.0]}]
    assert series(staged, "p") == [[[4, 0.1, 0.9]], [[1, 1.0], [9, 1.0]]]


def test_stages_of_other_loops_are_all_drawn_and_parted():
    history = [
        {"stage": "a", "tokens": t, "loop_losses": [4.0, 3.5], "exit_probabilities": [0.5, 0.5]} for t in (1, 50)
    ]
    history += [{"stage": "b", "tokens": t, "loop_losses": [3.0], "exit_probabilities": [1.0]} for t in (60, 100)]
    losses, exits = loss_chart(history, []), exit_chart(history)
    assert re.findall(r'class="curve d(\d)"', losses) == ["1", "2", "1"]
    assert re.findall(r'class="band d(\d)"', exits) == ["1", "2", "1"]
    assert 'class="axis" d="M241.6 246V12"' in losses  # 46 + 60 / 100 * 326
    assert losses.count('class="label"') == exits.count('class="label"') == 1  # those of the last stage


def test_spread_moves_only_what_is_too_close():
    assert spread([20, 60, 100], 16, 12, 246) == [20, 60, 100]
    assert spread([20, 22, 100], 16, 12, 246) == [20, 36, 100]
    assert spread([240, 242, 244], 16, 12, 246) == [214, 230, 246]


@given(st.lists(st.floats(12, 246), max_size=12).map(sorted))
def test_spread_labels_never_overlap_nor_leave_the_chart(places):
    moved = spread(places, 16, 12, 246)
    assert len(moved) == len(places)
    assert all(b - a >= 16 - 1e-9 for a, b in pairwise(moved))
    assert all(12 - 1e-9 <= place <= 246 for place in moved)


def points(path):
    return [tuple(map(float, pair.split())) for pair in path.strip("Mz").split("L")]


def test_exit_bands_show_the_shares():
    chart = exit_chart([{"tokens": t, "exit_probabilities": [0.25, 0.75]} for t in (0, 100)])
    bands = re.findall(r'class="band d(\d)" d="([^"]+)"', chart)
    # The data area is 46..372 by 246 (0 %) .. 12 (100 %): 25 % is 246 - 0.25 * 234 = 187.5.
    assert points(bands[0][1]) == [(46, 187.5), (372, 187.5), (372, 246), (46, 246)]
    assert points(bands[1][1]) == [(46, 12), (372, 12), (372, 187.5), (46, 187.5)]
    assert "25% after loop 1, 75% after loop 2" in chart


def test_loss_curves_run_from_the_first_to_the_last_token():
    history = [{"tokens": t, "loop_losses": [3.0, 2.0]} for t in (50, 100)]
    chart = loss_chart(history, [{"tokens": 100, "loop_losses": [3.1, 2.5]}])
    curves = dict(re.findall(r'class="curve d(\d)" d="([^"]+)"', chart))
    # y covers 2.0..3.1 with 5 % (0.055) to spare on both sides: 3.0 is at 246 - (3.0 - 1.945) / 1.21 * 234 = 42.0.
    assert points(curves["1"]) == [(209, 42.0), (372, 42.0)]
    assert points(curves["2"]) == [(209, 235.4), (372, 235.4)]
    assert 'class="point d1" cx="372.0" cy="22.6"' in chart
    assert "<title>loop 2 after 100 tokens: 2.500</title>" in chart


@pytest.mark.parametrize("history", [[], [{"step": 1}], [{"tokens": 1, "loop_losses": [None, 2.0]}]])
def test_no_data_no_chart(history):
    assert loss_chart(history, []) == ""
    assert exit_chart(history) == ""


def test_one_step_is_enough_for_a_chart():
    row = {"tokens": 8, "loop_losses": [2.0], "exit_probabilities": [1.0]}
    assert 'class="curve d1" d="M372.0 129.0h0"' in loss_chart([row], [])
    assert "100% after loop 1" in exit_chart([row])


def test_depth_bars_are_in_percent():
    chart = depth_chart({1: 1, 3: 3}, 4)
    assert re.findall(r'class="value"[^>]*>(\d+)<', chart) == ["25", "0", "75", "0"]
    # The highest bar spans 118..20, a third of it 118 - 98 / 3 = 85.3.
    assert re.findall(r'class="bar d\d" d="M[\d.]+ 118V([\d.]+)H', chart) == ["85.3", "118.0", "20.0", "118.0"]


def frontier_point(loops, loss, spread=0.5, setting=0.5):
    """A point that lies `loss` - 2 above a full depth of 2 nats a token."""
    interval = (loss - 2 - spread, loss - 2 + spread)
    return {"setting": setting, "loops": loops, "loss": loss, "above_full": loss - 2, "above_full_interval": interval}


def test_a_frontier_is_a_line_with_bars_for_each_rule():
    curves = {
        "static depth": [frontier_point(1, 4.0), frontier_point(4, 2.0)],
        "gate <1>": [frontier_point(2.5, 2.5), frontier_point(1.0, 3.5)],
    }
    chart = frontier_chart(curves)
    # x: loops 1..4 on 46..372. y: -0.5..2.5 above full depth with 5 % (0.15) to spare on 246..12: 2 is at
    # 246 - (2 + 0.65) / 3.3 * 234 = 58.1, 0 at 199.9, 0.5 at 164.5, 1.5 at 93.5.
    static, gate = re.findall(r'<g class="rule(\d)"><path class="curve" d="([^"]+)"/>', chart)
    assert static[0] == "0" and points(static[1]) == [(46, 58.1), (372, 199.9)]
    assert gate[0] == "1" and points(gate[1]) == [(46, 93.5), (209, 164.5)]  # in the order of their loops
    assert re.findall(r'class="leader" d="M46.0 ([\d.]+)V([\d.]+)"', chart)[0] == ("93.5", "22.6")  # 1.5 to 2.5
    assert "gate &lt;1&gt; at 0.5: 2.5000 nats a token, 2.50 loops" in chart and "<1>" not in chart
    assert "static depth: +2.000 at 1.00 loops, +0.000 at 4.00 loops; gate" in chart
    assert "mean loops</text>" in chart and "nats a token above full depth</text>" in chart
    assert ".rule1{--line:" in chart and ".rule2" not in chart


def test_rules_beyond_the_colours_begin_again_behind_the_static_one():
    chart = frontier_chart({str(number): [frontier_point(1 + number, 2.0)] for number in range(9)})
    assert re.findall(r'<g class="rule(\d)">', chart) == list("012345612")


def test_no_frontier_no_chart():
    assert frontier_chart({}) == frontier_chart({"gate": []}) == ""

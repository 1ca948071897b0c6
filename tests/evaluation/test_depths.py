"""How depths are written and named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.evaluation.depths import Depth, parse_loops, parse_rule
from looplm.exits import Confidence, QExit, SampledExit, StateDifference


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("q=0.8", QExit(0.8)),
        ("difference=0.1", StateDifference(0.1)),
        ("max_probability=0.9", Confidence("max_probability", 0.9)),
        ("entropy=0.5", Confidence("entropy", 0.5)),
        ("kl=1e-2", Confidence("kl", 0.01)),
        ("sampled=7", SampledExit(7)),
    ],
)
def test_rules(written, rule):
    assert parse_rule(written) == rule


@pytest.mark.parametrize("written", ["", "q", "q=", "q=many", "cdf=0.5", "sampled=0.5"])
def test_what_is_no_rule(written):
    with pytest.raises(ValueError, match=r"exit rule .* give q=Q, difference=E"):
        parse_rule(written)


def test_a_rule_out_of_range():
    with pytest.raises(ValueError, match=r"exit_threshold is 1.5; it must lie in \(0, 1\]"):
        parse_rule("q=1.5")


@pytest.mark.parametrize(("written", "loops"), [("4", [4]), ("1..3", [1, 2, 3]), ("1,2,4..5,2", [1, 2, 4, 5])])
def test_loops(written, loops):
    assert parse_loops(written) == loops


@pytest.mark.parametrize("written", ["", "0", "0..2", "3..1", "a", "1..", "1.5", "-1"])
def test_what_are_no_loops(written):
    with pytest.raises(ValueError, match="loops is "):
        parse_loops(written)


@given(st.sets(st.integers(1, 99), min_size=1))
def test_loops_read_back(loops):
    assert parse_loops(",".join(map(str, loops))) == sorted(loops)


def test_names_tell_depths_apart():
    depths = [Depth(4), Depth(5)]
    depths += [Depth.of_rule("q=0.8", 4, mode) for mode in ("select", "freeze")]
    depths.append(Depth.of_rule("q=0.8", 4, "freeze", "adaptive"))
    names = [depth.name for depth in depths]
    assert names == ["loops-4", "loops-5", "q-0.8-select", "q-0.8-freeze", "q-0.8-freeze-adaptive"]
    assert depths[3].as_dict() == {"loops": 4, "exit_rule": "q=0.8", "exit_mode": "freeze", "prefill": "full"}
    assert depths[0].as_dict()["exit_rule"] is None


def test_depths_that_are_none():
    with pytest.raises(ValueError, match="loops is 0"):
        Depth(0)
    with pytest.raises(ValueError, match="mode is 'skip'"):
        Depth(1, mode="skip")

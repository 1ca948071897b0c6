"""Warnings: each once, for what it is about and nothing else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.training.evaluation import LoopEvaluation
from looplm.training.health import COLLAPSED, RISE, Health


def record(entropy: float, loops: int = 4) -> dict:
    return {"exit_probabilities": [1 / loops] * loops, "gate_entropy": entropy, "expected_depth": 1.1}


def evaluation(*losses: float) -> LoopEvaluation:
    return LoopEvaluation(list(losses), None, [1.0], 1.0, {})


def test_a_gate_that_collapses_is_told_of_once_and_late():
    health, warnings = Health(), []
    for step in range(100):
        found = health.after_step(record(0.0))
        warnings += [(step, text) for text in found]
    # the running mean falls by a twentieth a step: 0.95^n is below 0.05 from n = 59 on, the 59th step
    assert [step for step, _ in warnings] == [math.ceil(math.log(0.05) / math.log(0.95)) - 1] == [58]
    assert "decides alike for every token (entropy 5% of uniform, expected depth 1.10 of 4 loops)" in warnings[0][1]
    assert "raise exit_beta" in warnings[0][1]


@given(st.lists(st.floats(COLLAPSED * math.log(4), math.log(4)), max_size=50))
def test_a_gate_that_tells_tokens_apart_is_not_warned_of(entropies):
    health = Health()
    assert not [text for value in entropies for text in health.after_step(record(value))]


def test_one_loop_has_no_gate_to_collapse():
    health = Health()
    assert not [text for _ in range(200) for text in health.after_step(record(0.0, loops=1))]


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([(3.0, 2.5), (3.04, 2.4)], False),  # within the tolerance
        ([(3.0, 2.5), (3.06, 2.4)], True),
        ([(3.0, 2.5), (3.06, 2.5)], False),  # the last loop did not gain by it
        ([(3.0, 2.5), (2.9, 2.4), (2.96, 2.3)], True),  # against its lowest, not its first
        ([(3.0, 2.5)], False),
    ],
)
def test_shallow_loops_that_get_worse_while_deep_ones_improve(losses, warned):
    assert RISE == 0.05
    health = Health()
    found = [text for pair in losses for text in health.after_evaluation(evaluation(*pair), 2)]
    assert len(found) == warned
    if warned:
        assert "loop 1 gets worse (" in found[0] and "while loop 2 gets better" in found[0]
        assert not health.after_evaluation(evaluation(9.0, 1.0), 2)  # once


def test_a_new_stage_forgets_the_losses():
    health = Health()
    health.after_evaluation(evaluation(3.0, 2.5), 2)
    health.forget_losses()
    assert not health.after_evaluation(evaluation(4.0, 2.4), 2)


def test_loops_beyond_the_trained_do_not_count():
    health = Health()
    health.after_evaluation(evaluation(3.0, 2.5, 9.0), 2)
    assert health.after_evaluation(evaluation(3.2, 2.4, 9.5), 2)

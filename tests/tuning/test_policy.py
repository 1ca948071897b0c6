"""Depth as part of the policy: hand-computed tables, and what must hold for any numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.exits import exit_log_probabilities, exit_probabilities
from looplm.tuning.policy import (
    Actions,
    changed_depths,
    clipped,
    depth_penalty,
    exit_log_probability,
    k3,
    normalised,
    overlong_penalty,
    surrogate,
    visited_gate_entropy,
    with_signal,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


GATES = torch.tensor([[logit(0.25), logit(0.5), logit(0.8)]])  # lambda of three loops; the last is never used


def test_log_probabilities_of_exits_by_hand():
    gates = GATES.expand(4, 3)
    found = exit_log_probability(gates, torch.tensor([1, 2, 3, 0]), 1, 3)
    expected = [math.log(0.25), math.log(0.75 * 0.5), math.log(0.75 * 0.5), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))
    forced = exit_log_probability(gates, torch.tensor([2, 3, 3, 0]), 2, 3)  # the first loop is no choice
    torch.testing.assert_close(forced, torch.tensor([math.log(0.5), math.log(0.5), math.log(0.5), 0.0]))


def test_numbers_beyond_an_exit_are_never_read():
    gates = torch.tensor([[logit(0.25), math.nan, math.nan]], requires_grad=True)
    found = exit_log_probability(gates, torch.tensor([1]), 1, 3)
    found.sum().backward()
    assert gates.grad is not None
    torch.testing.assert_close(found, torch.tensor([math.log(0.25)]))
    torch.testing.assert_close(gates.grad, torch.tensor([[0.75, 0.0, 0.0]]))  # d log lambda = 1 - lambda


def test_entropy_of_visited_decisions_by_hand():
    def binary(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    found = visited_gate_entropy(GATES.expand(4, 3), torch.tensor([1, 2, 3, 0]), 1, 3)
    torch.testing.assert_close(
        found, torch.tensor([binary(0.25), binary(0.25) + binary(0.5), binary(0.25) + binary(0.5), 0.0])
    )


gate_rows = st.lists(st.floats(-4, 4), min_size=1, max_size=6)


@settings(deadline=None)
@given(gate_rows, st.data())
def test_exits_agree_with_equation_three(gates, data):
    loops = len(gates)
    least = data.draw(st.integers(1, loops))
    table = torch.tensor(gates, dtype=torch.float64).expand(loops, loops)
    depths = torch.arange(1, loops + 1)
    found = exit_log_probability(table, depths, least, loops)[least - 1 :]
    torch.testing.assert_close(found, exit_log_probabilities(table[0], least)[least - 1 :])


@settings(deadline=None)
@given(gate_rows, st.data())
def test_the_visited_entropy_is_unbiased(gates, data):
    loops = len(gates)
    least = data.draw(st.integers(1, loops))
    table = torch.tensor(gates, dtype=torch.float64).expand(loops, loops)
    p = exit_probabilities(table[0], least)
    estimate = (p * visited_gate_entropy(table, torch.arange(1, loops + 1), least, loops))[least - 1 :].sum()
    exact = -(p * p.clamp(min=1e-300).log()).sum()
    torch.testing.assert_close(estimate, exact)


@settings(deadline=None)
@given(gate_rows, st.floats(0.05, 1.0), st.data())
def test_changed_depths_are_those_where_the_rule_says_another(gates, threshold, data):
    loops = len(gates)
    least = data.draw(st.integers(1, loops))
    table = torch.tensor(gates, dtype=torch.float64).expand(loops, loops)
    depths = torch.arange(1, loops + 1)
    hidden = table.masked_fill(torch.arange(1, loops + 1) > depths[:, None], torch.nan)
    passed = exit_probabilities(table[0], least).cumsum(0)
    if (passed - threshold).abs().min() < 1e-9:
        return
    rule = next(
        (t for t in range(least, loops) if passed[t - 1] >= threshold),
        loops,
    )
    found = changed_depths(hidden, depths, threshold, least, loops)
    assert found[least - 1 :].tolist() == [depth != rule for depth in range(least, loops + 1)]


def test_no_exit_never_changes():
    assert not changed_depths(GATES, torch.tensor([0]), 0.5, 1, 3).any()


def test_rewards_are_normalised_in_their_group():
    found = normalised(torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64))
    scale = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(found[0], torch.tensor([scale, -scale, -scale, scale], dtype=torch.float64))
    assert found[1].tolist() == [0.0] * 4


def test_what_could_not_be_scored_counts_for_nothing():
    found = normalised(torch.tensor([[1.0, 0.0, math.nan]], dtype=torch.float64))
    alone = normalised(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found[0, :2], alone[0])
    assert found[0, 2] == 0
    assert with_signal(torch.tensor([[1.0, 1.0, math.nan], [1.0, 0.0, math.nan]])).tolist() == [False, True]
    assert not with_signal(torch.tensor([[math.nan, math.nan]]))[0]


def test_depth_costs_by_hand():
    depths = torch.tensor([[0, 2, 4], [0, 2, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = depth_penalty(depths, mask, samples=2, cost=0.1)
    # own and later loops: 6 6 4 and 2 2 -; means of those there are: 4 4 4
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.2, 0.0], [-0.2, -0.2, 0.0]]))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.data())
def test_depth_costs_have_no_mean_in_a_group(groups, samples, length, data):
    lengths = data.draw(st.lists(st.integers(1, length), min_size=groups * samples, max_size=groups * samples))
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    depths = torch.randint(1, 5, mask.shape) * mask
    found = depth_penalty(depths, mask, samples, 1.0)
    assert found.view(groups, samples, length).sum(1).abs().max() < 1e-4
    assert found[~mask].abs().sum() == 0


def test_overlong_answers_pay_as_in_dapo():
    found = overlong_penalty(torch.tensor([80, 90, 95, 100]), longest=100, buffer=20)
    torch.testing.assert_close(found, torch.tensor([0.0, -0.5, -0.75, -1.0]))
    assert overlong_penalty(torch.tensor([100]), 100, 0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, 1.28), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.0, 2.0, 2.0)],
)
def test_clipping_by_hand(ratio, advantage, expected):
    found = clipped(torch.tensor(math.log(ratio)), torch.tensor(advantage), 0.2, 0.28)
    assert found.item() == pytest.approx(expected)


def test_one_ratio_or_two():
    old = Actions(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, -0.5]]))
    now = Actions(torch.tensor([[-1.0, -0.9]]), torch.tensor([[0.0, 0.5]]))
    now.tokens.requires_grad_()
    ones = torch.ones(1, 2)
    joint = surrogate(now, old, ones, 0.2, 0.2, "joint")
    torch.testing.assert_close(joint, torch.tensor([[1.0, 1.2]]))
    separate = surrogate(now, old, ones, 0.2, 0.2, "separate")
    torch.testing.assert_close(separate, torch.tensor([[1.0, math.exp(0.1) + 1.2]]))
    (gradient,) = torch.autograd.grad(joint.sum(), now.tokens, retain_graph=True)
    assert gradient[0].tolist() == [1.0, 0.0]  # the gate that moved has clipped the token away
    (gradient,) = torch.autograd.grad(separate.sum(), now.tokens)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, math.exp(0.1)]]))


@given(st.floats(-5, 0), st.floats(-5, 0))
def test_the_divergence_is_never_negative(now, reference):
    found = k3(torch.tensor(now, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64))
    assert found >= 0 and (now != reference or found == 0)

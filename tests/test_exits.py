"""Exit distribution and exit rules: hand-computed tables, properties, and slow references."""

import math
from collections import Counter

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from looplm.exit_tracker import ExitTracker
from looplm.exits import (
    Confidence,
    ExitRule,
    FixedDepth,
    QExit,
    SampledExit,
    StateDifference,
    check_rows,
    entropy,
    exit_cdf,
    exit_log_probabilities,
    exit_probabilities,
    expected_depth,
    keyed_uniform,
    log_hazards,
    log_survival,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
HAND_LOGITS = torch.tensor([0.0, -math.log(3), -math.log(4), 7.0])
"""Hazards 1/2, 1/4, 1/5 and an ignored last one."""


def drive(
    rule: ExitRule,
    gate_logits: Tensor,
    *,
    states: Tensor | None = None,
    reads: Tensor | None = None,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    min_loops: int = 1,
) -> ExitTracker:
    """Take N positions with (N, T) gate logits through the loops; states (N, T, D), reads (N, T, V) log-probs."""
    n, num_loops = gate_logits.shape
    states = torch.zeros(n, num_loops, 1) if states is None else states
    rows = torch.arange(n) if rows is None else rows
    positions = torch.arange(n) if positions is None else positions
    tracker = ExitTracker(rule, rows, positions, min_loops, num_loops)
    for loop in range(1, num_loops + 1):
        active = tracker.active
        if not len(active):
            break

        def read(state: Tensor, loop: int = loop, active: Tensor = active) -> Tensor:
            assert reads is not None and len(state) == len(active)
            return reads[active, loop - 1]

        tracker.step(loop, gate_logits[active, loop - 1], states[active, loop - 1], read)
    return tracker


def reference(logits: list[float], min_loops: int = 1) -> tuple[list[float], list[float]]:
    """p and S of equation 3 in plain Python floats."""
    probabilities, survivals, survival = [], [], 1.0
    for loop, logit in enumerate(logits, start=1):
        hazard = 1 / (1 + math.exp(-logit))
        if loop < min_loops:
            hazard = 0.0
        if loop == len(logits):
            hazard = 1.0
        probabilities.append(hazard * survival)
        survival *= 1 - hazard
        survivals.append(survival)
    return probabilities, survivals


# --- the distribution ---


def test_equation_3_by_hand() -> None:
    torch.testing.assert_close(exit_probabilities(HAND_LOGITS), torch.tensor([0.5, 0.125, 0.075, 0.3]))
    torch.testing.assert_close(log_survival(HAND_LOGITS).exp(), torch.tensor([0.5, 0.375, 0.3, 0.0]))
    torch.testing.assert_close(exit_cdf(HAND_LOGITS), torch.tensor([0.5, 0.625, 0.7, 1.0]))
    assert float(entropy(exit_log_probabilities(HAND_LOGITS))) == pytest.approx(1.161966, abs=1e-5)
    assert float(expected_depth(exit_probabilities(HAND_LOGITS))) == pytest.approx(2.175)


@pytest.mark.parametrize(
    ("min_loops", "expected"),
    [(2, [0.0, 0.25, 0.15, 0.6]), (3, [0.0, 0.0, 0.2, 0.8]), (4, [0.0, 0.0, 0.0, 1.0])],
)
def test_min_loops_renormalises_by_hand(min_loops: int, expected: list[float]) -> None:
    torch.testing.assert_close(exit_probabilities(HAND_LOGITS, min_loops), torch.tensor(expected))
    log_exit, log_stay = log_hazards(HAND_LOGITS, min_loops)
    assert log_exit[-1] == 0 and log_stay[-1] == -math.inf
    assert (log_exit[: min_loops - 1] == -math.inf).all() and (log_stay[: min_loops - 1] == 0).all()


def test_one_loop_is_certain() -> None:
    assert exit_probabilities(torch.tensor([[-3.0], [40.0]])).tolist() == [[1.0], [1.0]]
    assert exit_cdf(torch.tensor([-3.0])).tolist() == [1.0]


@pytest.mark.parametrize("min_loops", [0, 5, -1])
def test_min_loops_out_of_range(min_loops: int) -> None:
    with pytest.raises(ValueError, match=rf"min_loops is {min_loops}; .*1\.\.4"):
        exit_probabilities(HAND_LOGITS, min_loops)


@QUICK
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=7), st.data())
def test_agrees_with_plain_python(logits: list[float], data: st.DataObject) -> None:
    min_loops = data.draw(st.integers(1, len(logits)))
    wide = torch.tensor(logits, dtype=torch.float64)
    p, s = reference(logits, min_loops)
    torch.testing.assert_close(exit_probabilities(wide, min_loops).tolist(), p, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(log_survival(wide, min_loops).exp().tolist(), s, rtol=1e-9, atol=1e-12)
    narrow = exit_probabilities(wide.float(), min_loops)
    torch.testing.assert_close(narrow.tolist(), p, rtol=1e-4, atol=1e-6)
    assert narrow.dtype == torch.float32
    assert float(entropy(narrow.log())) == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), abs=1e-4)


@QUICK
@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=8), st.sampled_from(["float32", "bfloat16"]))
def test_is_a_distribution(logits: list[float], dtype: str) -> None:
    x = torch.tensor(logits).to(getattr(torch, dtype))
    p, cdf = exit_probabilities(x), exit_cdf(x)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5) and (p >= 0).all()
    assert (cdf.diff() >= 0).all() and cdf[-1] == 1 and (cdf >= 0).all()
    torch.testing.assert_close(p.cumsum(0), cdf, rtol=0, atol=1e-5)
    assert float(expected_depth(p)) + 1e-5 >= 1 and float(expected_depth(p)) <= len(logits) + 1e-4
    assert -1e-6 <= float(entropy(exit_log_probabilities(x))) <= math.log(len(logits)) + 1e-5


@pytest.mark.parametrize("logits", [[40.0, 40.0, 40.0, 0.0], [-40.0] * 4, [40.0, -40.0, 40.0, -40.0], [-40, 0, 40, 1]])
def test_extreme_logits_lose_nothing(logits: list[float]) -> None:
    got = exit_log_probabilities(torch.tensor(logits)).tolist()
    survived = log_survival(torch.tensor(logits)).tolist()
    with mpmath.workdps(60):
        survival = mpmath.mpf(1)
        for loop, (logit, log_p, log_s) in enumerate(zip(logits, got, survived, strict=True), start=1):
            hazard = 1 / (1 + mpmath.e ** (-mpmath.mpf(logit)))
            exact = mpmath.log(survival * hazard) if loop < len(logits) else mpmath.log(survival)
            assert log_p == pytest.approx(float(exact), rel=1e-6)
            survival *= 1 - hazard
            if loop < len(logits):
                assert log_s == pytest.approx(float(mpmath.log(survival)), rel=1e-6)


def test_entropy_gradient_is_finite_where_a_probability_is_zero() -> None:
    logits = HAND_LOGITS.clone().requires_grad_()
    entropy(exit_log_probabilities(logits, min_loops=3)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[[0, 1, 3]].tolist() == [0, 0, 0] and logits.grad[2] != 0
    sure = torch.tensor([0.0, -math.inf], requires_grad=True)
    entropy(sure).backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


def test_gradients_match_finite_differences() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: exit_probabilities(x), (logits,))
    assert torch.autograd.gradcheck(lambda x: entropy(exit_log_probabilities(x)), (logits,))


# --- Q-exit ---


@QUICK
@given(
    st.lists(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2),
    st.integers(1, 4),
)
def test_a_lower_threshold_never_exits_later(logits: list[list[float]], qs: list[float], min_loops: int) -> None:
    gates = torch.tensor(logits)
    low, high = (drive(QExit(q), gates, min_loops=min_loops).depths for q in sorted(qs))
    assert (low <= high).all() and (low >= min_loops).all() and (high <= 4).all()


@QUICK
@given(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), st.floats(0.01, 0.99))
def test_q_exit_is_the_first_loop_whose_cdf_reaches_q(logits: list[float], q: float) -> None:
    p, _ = reference(logits)
    cdf = [sum(p[:t]) for t in range(1, 5)]
    if min(abs(c - q) for c in cdf) < 1e-5:
        return  # a tie within rounding
    depth = next((t for t, c in enumerate(cdf, start=1) if c >= q), 4)
    assert drive(QExit(q), torch.tensor([logits])).depths.tolist() == [depth]


@pytest.mark.parametrize(("q", "depth"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.63, 3), (0.69, 3), (0.71, 4), (1.0, 4)])
def test_q_exit_by_hand(q: float, depth: int) -> None:
    assert drive(QExit(q), HAND_LOGITS[None]).depths.tolist() == [depth]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_threshold_one_means_all_loops_exactly(dtype: torch.dtype) -> None:
    gates = torch.tensor([[40.0, 40, 40, 40], [100, 100, 100, 100], [8, 8, 8, 8], [1e4, 1e4, 1e4, 0]]).to(dtype)
    assert drive(QExit(1.0), gates).depths.tolist() == [4] * 4
    assert drive(QExit(torch.ones(4)), gates).depths.tolist() == [4] * 4
    assert drive(QExit(0.999), gates).depths.tolist() == [1] * 4


def test_thresholds_and_depths_one_a_row() -> None:
    gates = HAND_LOGITS.repeat(6, 1)
    rows = torch.tensor([0, 1, 2, 2, 1, 0])
    q = QExit(torch.tensor([0.3, 0.6, 1.0]))
    assert drive(q, gates, rows=rows).depths.tolist() == [1, 2, 4, 4, 2, 1]
    fixed = FixedDepth(torch.tensor([3, 1, 2]))
    assert drive(fixed, gates, rows=rows).depths.tolist() == [3, 1, 2, 2, 1, 3]


# --- the other rules ---


@pytest.mark.parametrize(("loops", "depth"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_fixed_depth(loops: int, depth: int) -> None:
    assert drive(FixedDepth(loops), HAND_LOGITS.repeat(2, 1)).depths.tolist() == [depth, depth]
    assert drive(FixedDepth(loops), HAND_LOGITS[None], min_loops=2).depths.tolist() == [max(depth, 2)]


def test_state_difference_by_hand() -> None:
    # Changes in loops 2, 3, 4: 5, 0.5, 0 for the first position and 0.1, ... for the second.
    states = torch.tensor([[[3.0, 4], [0, 0], [0.3, 0.4], [0.3, 0.4]], [[0, 0], [0.1, 0], [9, 9], [9, 9]]])
    gates = HAND_LOGITS.repeat(2, 1)
    assert drive(StateDifference(0.6), gates, states=states).depths.tolist() == [3, 2]
    assert drive(StateDifference(0.5), gates, states=states).depths.tolist() == [4, 2]
    assert drive(StateDifference(6.0), gates, states=states).depths.tolist() == [2, 2]
    assert drive(StateDifference(6.0), gates, states=states, min_loops=3).depths.tolist() == [3, 4]
    assert drive(StateDifference(torch.tensor([0.6, 0.01])), gates, states=states).depths.tolist() == [3, 4]


READS = torch.tensor(
    [[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.9, 0.05, 0.05]], [[0.998, 0.001, 0.001]] * 4]
).log()


@pytest.mark.parametrize(
    ("rule", "depths"),
    [
        (Confidence("max_probability", 0.5), [1, 1]),
        (Confidence("max_probability", 0.75), [2, 1]),
        (Confidence("max_probability", 0.85), [4, 1]),
        (Confidence("max_probability", torch.tensor([0.75, 0.9])), [2, 1]),
        (Confidence("entropy", 1.04), [1, 1]),  # H of loop 1 is 1.0397, of loop 2 0.6390
        (Confidence("entropy", 1.03), [2, 1]),
        (Confidence("entropy", 0.63), [4, 1]),
        (Confidence("kl", 0.2), [2, 2]),  # KL(loop 2 || loop 1) is 0.1927, KL(loop 3 || loop 2) 0
        (Confidence("kl", 0.19), [3, 2]),
        (Confidence("kl", 1e9), [2, 2]),
    ],
)
def test_confidence_by_hand(rule: Confidence, depths: list[int]) -> None:
    assert drive(rule, HAND_LOGITS.repeat(2, 1), reads=READS).depths.tolist() == depths


def test_kl_compares_with_a_loop_below_min_loops() -> None:
    """`min_loops` says where a position may stop, not what may be compared."""
    gates = HAND_LOGITS.repeat(2, 1)
    assert drive(Confidence("kl", 0.2), gates, reads=READS, min_loops=2).depths.tolist() == [2, 2]
    assert drive(Confidence("kl", 0.19), gates, reads=READS, min_loops=3).depths.tolist() == [3, 3]


def test_the_read_out_is_computed_at_most_once_a_loop_and_only_if_asked() -> None:
    calls = Counter()

    def read(loop: int, state: Tensor) -> Tensor:
        calls[loop] += 1
        return torch.full((len(state), 3), 1 / 3).log()

    for rule, expected in ((QExit(0.9), {}), (Confidence("kl", 0.1), {1: 1, 2: 1})):
        calls.clear()
        tracker = ExitTracker(rule, torch.zeros(2, dtype=torch.long), torch.arange(2), 1, 3)
        for loop in (1, 2):
            tracker.step(
                loop,
                torch.full((len(tracker.active),), -9.0),
                torch.ones(len(tracker.active), 2),
                lambda s, t=loop: read(t, s),
            )
        assert calls == expected


def test_tracker_records_probabilities_up_to_the_exit() -> None:
    tracker = drive(QExit(0.6), torch.stack([HAND_LOGITS, torch.full((4,), -20.0)]))
    assert tracker.depths.tolist() == [2, 4]
    torch.testing.assert_close(
        tracker.log_probabilities[0].exp(), torch.tensor([0.5, 0.125, math.nan, math.nan]), equal_nan=True
    )
    torch.testing.assert_close(tracker.log_probabilities[1], exit_log_probabilities(torch.full((4,), -20.0)))
    assert float(tracker.log_survival[0]) == pytest.approx(math.log(0.375)) and tracker.log_survival[1] == -math.inf


@QUICK
@given(
    st.lists(st.lists(st.floats(-40, 40, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_tracker_has_the_renormalised_distribution(logits: list[list[float]], min_loops: int) -> None:
    gates = torch.tensor(logits)
    tracker = drive(FixedDepth(4), gates, min_loops=min_loops)
    torch.testing.assert_close(tracker.log_probabilities, exit_log_probabilities(gates, min_loops))


def test_tracker_refuses_bad_limits() -> None:
    with pytest.raises(ValueError, match=r"min_loops is 3; it must lie in 1\.\.max_loops = 2"):
        ExitTracker(FixedDepth(1), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), 3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QExit(0.0), "exit_threshold is 0.0"),
        (lambda: QExit(1.5), r"exit_threshold is 1.5; it must lie in \(0, 1\]"),
        (lambda: QExit(math.nan), "exit_threshold is nan"),
        (lambda: QExit(torch.tensor([0.5, -1.0])), "exit_threshold is"),
        (lambda: FixedDepth(0), "FixedDepth.loops is 0"),
        (lambda: StateDifference(-1.0), "StateDifference.epsilon is -1.0"),
        (lambda: Confidence("margin", 0.5), "Confidence.measure is 'margin'"),  # type: ignore[arg-type]
        (lambda: Confidence("max_probability", 1.1), "Confidence.threshold is 1.1"),
        (lambda: Confidence("kl", 0.0), "Confidence.threshold is 0.0"),
    ],
)
def test_bad_values_name_field_and_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


# --- sampled exits ---


def python_splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_reference_is_splitmix64() -> None:
    assert python_splitmix64(0) == 0xE220A8397B1DCDAF and python_splitmix64(1234567) == 6457827717110365317


@QUICK
@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.integers(1, 9))
def test_keyed_uniform_against_python_integers(seed: int, positions: list[int], loop: int) -> None:
    def draw(position: int) -> float:
        mixed = python_splitmix64(python_splitmix64(python_splitmix64(seed % 2**64) ^ position) ^ loop)
        return (mixed >> 11) / 2**53

    got = keyed_uniform(torch.tensor(seed), torch.tensor(positions), loop)
    assert got.dtype == torch.float64 and got.tolist() == [draw(p) for p in positions]
    assert (got >= 0).all() and (got < 1).all()


@pytest.mark.parametrize(
    ("min_loops", "logits"), [(1, HAND_LOGITS), (2, HAND_LOGITS), (1, torch.tensor([-2.0, 1.0, 0.5, 3.0]))]
)
def test_sampled_exits_follow_the_distribution(min_loops: int, logits: Tensor) -> None:
    n = 20_000
    depths = drive(SampledExit(11), logits.repeat(n, 1), min_loops=min_loops).depths
    expected = exit_probabilities(logits, min_loops).double() * n
    counts = torch.bincount(depths, minlength=5)[1:].double()
    assert (counts[expected == 0] == 0).all()
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert float(chi_square) < 16.3  # the 99.9 % quantile with 3 degrees of freedom


def test_sampled_exits_do_not_depend_on_the_batch() -> None:
    gates = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    rows, positions = torch.arange(12) % 3, torch.arange(12) // 3
    seeds = torch.tensor([5, 6, 5])
    whole = drive(SampledExit(seeds), gates, rows=rows, positions=positions).depths
    alone = [
        int(drive(SampledExit(int(seeds[rows[i]])), gates[i : i + 1], positions=positions[i : i + 1]).depths)
        for i in range(12)
    ]
    assert whole.tolist() == alone
    assert len(set(drive(SampledExit(1), HAND_LOGITS.repeat(50, 1)).depths.tolist())) > 1
    same = drive(SampledExit(1), HAND_LOGITS.repeat(50, 1), positions=torch.full((50,), 7)).depths
    assert len(set(same.tolist())) == 1


def test_values_one_a_row_must_fit_the_batch() -> None:
    check_rows(QExit(torch.tensor([0.5, 0.6])), 2)
    check_rows(QExit(torch.tensor(0.5)), 2)
    with pytest.raises(ValueError, match=r"QExit\.threshold has 3 values; the batch has 2 rows"):
        check_rows(QExit(torch.full((3,), 0.5)), 2)
    with pytest.raises(ValueError, match=r"SampledExit\.seed has 2x1 values; the batch has 2 rows"):
        check_rows(SampledExit(torch.zeros(2, 1)), 2)
    assert drive(QExit(torch.tensor(0.6)), HAND_LOGITS.repeat(2, 1)).depths.tolist() == [2, 2]

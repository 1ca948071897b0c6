"""Scores of many depths from one pass equal a separate pass for each, and what they cost is counted right."""

import pytest
import torch
from eval_models import random_requests
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model

from looplm.evaluation import scoring
from looplm.evaluation.batches import plan_batches
from looplm.evaluation.depths import Depth
from looplm.evaluation.forcing import score_forced
from looplm.evaluation.items import Item
from looplm.evaluation.scoring import Scores, choice_requests, chosen, score, score_batches
from looplm.exits import Confidence, FixedDepth, QExit, SampledExit, StateDifference
from looplm.model import readout

FIXED = [Depth(loop) for loop in (1, 2, 3, 5)]
RULES = {
    "q=0.6": QExit(0.6),
    "difference=4": StateDifference(4.0),
    "max_probability=0.2": Confidence("max_probability", 0.2),
    "entropy=3": Confidence("entropy", 3.0),
    "kl=0.9": Confidence("kl", 0.9),
    "sampled=3": SampledExit(3),
}


def read(model, request, **how):
    """Log-probabilities, matches and depths of one request from a plain forward pass of its own."""
    context, target = request
    with torch.no_grad():
        out = model(torch.tensor([context + target[:-1]]), **how)
    rows = out.logits[0, -len(target) :].log_softmax(-1)
    wanted = torch.tensor(target)
    return rows.gather(1, wanted[:, None])[:, 0], rows.argmax(-1) == wanted, out.exit_depths[0, -len(target) :]


def same(scored, place, expected):
    log_p, greedy, depths = expected
    torch.testing.assert_close(scored.log_probabilities[place], log_p, atol=1e-10, rtol=0)
    assert torch.equal(scored.greedy[place], greedy) and torch.equal(scored.read_depths[place], depths)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:running 5 loops")
def test_every_depth_from_one_pass_is_that_of_a_pass_of_its_own(name):
    model, requests = tiny_model(**VARIANTS[name]), random_requests(7)
    scores = score(model, requests, FIXED, batch_size=3)
    for scored, request in zip(scores.requests, requests, strict=True):
        for place, depth in enumerate(FIXED):
            same(scored, place, read(model, request, num_loop_steps=depth.loops, exit_threshold=1.0))


@pytest.mark.parametrize("name", ["plain", "prelude-coda", "no-sandwich", "causal-mean"])
@pytest.mark.parametrize("written", RULES)
def test_rules_that_select_read_what_forward_reads(name, written):
    model, requests = tiny_model(**VARIANTS[name]), random_requests(5)
    depths = [Depth(1), Depth(3, RULES[written], "select", written=written), Depth(3)]
    scores = score(model, requests, depths, batch_size=4)
    for scored, request in zip(scores.requests, requests, strict=True):
        same(scored, 1, read(model, request, exit_rule=RULES[written]))
    if name == "plain" and written != "sampled=3":
        assert len(torch.cat([scored.read_depths[1] for scored in scores.requests]).unique()) > 1


def test_a_rule_has_the_distribution_of_its_own_loops_whatever_else_is_read():
    model, requests = tiny_model(), random_requests(5)
    rule = QExit(0.9)
    beside_deep = score(model, requests, [Depth(3, rule), Depth(6)], batch_size=2)
    for scored, request in zip(beside_deep.requests, requests, strict=True):
        same(scored, 0, read(model, request, exit_rule=rule, num_loop_steps=3))


@pytest.mark.parametrize("written", RULES)
def test_rules_that_freeze_read_what_a_freezing_pass_reads(written):
    model, requests = tiny_model(), random_requests(5)
    depth = Depth(3, RULES[written], "freeze", "adaptive", written)
    scores = score(model, requests, [depth, Depth(2)], batch_size=4)
    for scored, request in zip(scores.requests, requests, strict=True):
        same(scored, 0, read(model, request, exit_rule=RULES[written], exit_mode="freeze"))
        same(scored, 1, read(model, request, num_loop_steps=2))


@pytest.mark.parametrize("name", ["plain", "prelude-coda"])
@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_freezing_behind_a_prompt_is_what_generation_does(name, prefill):
    model, requests = tiny_model(**VARIANTS[name]), random_requests(6)
    depth = Depth(3, QExit(0.6), "freeze", prefill, "q=0.6")
    found = score(model, requests, [depth], batch_size=3)
    generated = {}
    for part in score_forced(model, requests, [depth], "per_loop", batch_size=1):
        generated |= part
    for place, scored in enumerate(found.requests):
        wanted = generated[place]
        torch.testing.assert_close(scored.log_probabilities, wanted.log_probabilities.double(), atol=1e-5, rtol=0)
        assert torch.equal(scored.read_depths, wanted.read_depths)
        assert torch.equal(scored.loops_run, wanted.loops_run)
    if prefill == "full":
        assert all(int(scored.read_depths[0, 0]) == 3 for scored in found.requests)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 99))
def test_batches_do_not_matter(count, batch_size, seed):
    model, requests = tiny_model(), random_requests(count, seed)
    depths = [Depth(1), Depth(3), Depth(3, QExit(0.6), "select"), Depth(3, QExit(0.6), "freeze", "adaptive")]
    alone = [score(model, [request], depths, batch_size=1) for request in requests]
    together = score(model, requests, depths, batch_size=batch_size)
    torch.testing.assert_close(together.sums, torch.cat([one.sums for one in alone], 1), atol=1e-10, rtol=0)
    assert torch.equal(together.greedy, torch.cat([one.greedy for one in alone], 1))
    for scored, one in zip(together.requests, alone, strict=True):
        assert torch.equal(scored.loops_run, one.requests[0].loops_run)


def test_the_vocabulary_is_met_in_chunks(monkeypatch):
    model, requests = tiny_model(), random_requests(7)
    depths = [*FIXED[:3], Depth(3, Confidence("kl", 0.9))]
    whole = score(model, requests, depths, batch_size=8)
    monkeypatch.setattr(scoring, "READ_BYTES", 4 * 64 * 2)
    parts = score(model, requests, depths, batch_size=8)
    torch.testing.assert_close(parts.sums, whole.sums, atol=1e-12, rtol=0)
    assert torch.equal(parts.mean_read_depth, whole.mean_read_depth)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(2, 40),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_targets_are_read_as_from_the_whole_table_to_the_last_bit(count, vocabulary, block, seed, dtype):
    """Few values, so that the largest one often comes twice: the first of them is the likeliest, as for `argmax`."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (count, vocabulary), generator=draw).to(dtype)
    targets = torch.randint(0, vocabulary, (count,), generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readout, "CACHE_BYTES", 4 * vocabulary * block)
        log_p, match = readout.at_targets(logits, targets)
    table = logits.float().log_softmax(-1)
    assert torch.equal(log_p, table.gather(1, targets[:, None])[:, 0])
    assert torch.equal(match, table.argmax(-1) == targets)


def test_loops_are_counted_over_read_and_over_processed_positions():
    model = tiny_model()
    requests = [([5, 6, 7], [8]), ([9], [10, 11])]
    rule = FixedDepth(2)
    frozen = [Depth(3, rule, "freeze", "full"), Depth(3, rule, "freeze", "adaptive")]
    scores = score(model, requests, [Depth(2), Depth(3, rule, "select"), *frozen], batch_size=2)
    assert [scored.positions for scored in scores.requests] == [3, 2]
    # fixed: 2 loops each; select: all 3; freeze behind a full prompt: 3 x 3, then 3 + 2; freezing all: 2 each
    assert [scored.loops_run.tolist() for scored in scores.requests] == [[6, 9, 9, 6], [4, 6, 5, 4]]
    assert scores.mean_loops_run.tolist() == [2.0, 3.0, 14 / 5, 2.0]
    assert scores.mean_read_depth.tolist() == [2.0, 2.0, (3 + 3 + 2) / 3, 2.0]


def test_equal_inputs_run_once_and_long_ones_first():
    requests = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]), ([1, 2, 3, 4], [5]), ([7], [8])]
    assert plan_batches(requests, 2) == [[[3], [0, 1]], [[2], [4]]]


def test_what_is_done_is_not_run_again_and_changes_nothing():
    model, requests = tiny_model(), random_requests(8)
    parts = list(score_batches(model, requests, [Depth(2)], batch_size=2))
    rest = list(score_batches(model, requests, [Depth(2)], batch_size=2, done=set(parts[0])))
    assert len(rest) == len(parts) - 1 and [set(part) for part in rest] == [set(part) for part in parts[1:]]
    for part, again in zip(parts[1:], rest, strict=True):
        assert all(torch.equal(part[n].log_probabilities, again[n].log_probabilities) for n in part)


def test_progress_and_mode_are_left_as_they_were():
    model, shares = tiny_model().train(), []
    score(model, random_requests(5), [Depth(1)], batch_size=2, report=shares.append)
    assert model.training and shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 2


@pytest.mark.parametrize(
    ("requests", "depths", "said"),
    [
        ([([], [1])], [Depth(1)], "request 0 has 0 context and 1 target tokens"),
        ([([1], [])], [Depth(1)], "request 0 has 1 context and 0 target tokens"),
        ([([1] * 128, [1, 1])], [Depth(1)], "request 0 has 129 tokens, but the context holds 128"),
        ([([1], [1])], [], "0 depths in batches of 2"),
    ],
)
def test_requests_that_cannot_be_scored(requests, depths, said):
    with pytest.raises(ValueError, match=said):
        score(tiny_model(), requests, depths, batch_size=2)


def test_a_pooled_gate_cannot_freeze():
    model = tiny_model(exit_gate_pooling="causal_mean")
    with pytest.raises(ValueError, match="a rule that freezes needs 'token'"):
        score(model, [([1], [1])], [Depth(3, QExit(0.5), "freeze")], batch_size=1)


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 90 for letter in text if letter != " "]


def test_choices_are_continuations_and_the_likeliest_is_chosen():
    items = [Item("a", "ab", ("c", "ddd"), 0), Item("b", "z", ("x", "yy", "w"), 1)]
    requests = choice_requests(Letters(), items)
    assert requests[1] == ([7, 8], [10, 10, 10]) and len(requests) == 5
    scored = [torch.tensor([[value]]) for value in (-3.0, -5.0, -2.0, -1.0, -4.0)]
    parts = [
        scoring.Scored(value, value > 0, torch.ones(1, 1, dtype=torch.int64), torch.ones(1), 1) for value in scored
    ]
    scores = Scores((Depth(1),), tuple(parts))
    assert chosen(scores, items).tolist() == [[0, 1]]
    assert chosen(scores, items, per_character=True).tolist() == [[1, 1]]  # -5 / 3 > -3


def test_a_continuation_needs_tokens_of_its_own():
    with pytest.raises(ValueError, match="each needs tokens of its own"):
        scoring.encode_pair(Letters(), "ab", "  ")
    assert scoring.encode_pair(Letters(), "ab ", "c") == ([7, 8], [9])

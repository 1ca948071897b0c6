"""Forced generation gives what generation itself gives, under every KV policy, rule and batch."""

import pytest
import torch
from eval_models import random_requests
from tiny import tiny_model

from looplm.evaluation.depths import Depth
from looplm.evaluation.forcing import score_forced
from looplm.evaluation.scoring import score
from looplm.exits import QExit

DEPTHS = [Depth(2), Depth(3), Depth(3, QExit(0.6), "freeze", "full", "q=0.6")]


def forced(model, requests, depths, policy, batch_size=3):
    found = {}
    for part in score_forced(model, requests, depths, policy, batch_size=batch_size):
        found |= part
    return [found[place] for place in range(len(requests))]


def test_with_per_loop_keys_it_equals_the_parallel_pass():
    model, requests = tiny_model(), random_requests(6)
    parallel = score(model, requests, DEPTHS, batch_size=4).requests
    for one, other in zip(forced(model, requests, DEPTHS, "per_loop"), parallel, strict=True):
        torch.testing.assert_close(one.log_probabilities.double(), other.log_probabilities, atol=1e-5, rtol=0)
        assert torch.equal(one.greedy, other.greedy) and torch.equal(one.read_depths, other.read_depths)
        assert torch.equal(one.loops_run, other.loops_run) and one.positions == other.positions


@pytest.mark.parametrize("policy", ["last", "average", "first"])
@pytest.mark.parametrize("depth", DEPTHS, ids=lambda depth: depth.name)
def test_what_a_model_writes_has_the_log_probabilities_it_was_written_with(policy, depth):
    model = tiny_model()
    how = {"adaptive_loop": False, "num_loop_steps": depth.loops}
    if depth.rule is not None:
        how = {"exit_rule": depth.rule}
    prompt = [5, 9, 12, 7]
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=6,
        do_sample=False,
        kv_policy=policy,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    new = out.sequences[0, 4:]
    expected = torch.stack([step[0].double().log_softmax(-1) for step in out.logits]).gather(1, new[:, None])[:, 0]
    requests = [(prompt, new.tolist()), ([3, 4], [9, 9, 9, 9, 9, 9, 9, 9])]
    scored = forced(model, requests, [depth], policy, batch_size=2)[0]
    torch.testing.assert_close(scored.log_probabilities[0].double(), expected, atol=1e-5, rtol=0)
    assert bool(scored.greedy.all()) and torch.equal(scored.read_depths, out.exit_depths)
    assert int(scored.loops_run[0]) == int(out.position_depths.sum())


def test_policies_differ_where_a_target_is_long():
    model, requests = tiny_model(), [([5, 6, 7], [8, 9, 10, 11])]
    sums = [
        float(forced(model, requests, [Depth(3)], policy)[0].log_probabilities.sum()) for policy in ("last", "first")
    ]
    assert abs(sums[0] - sums[1]) > 1e-3


def test_selecting_is_refused():
    with pytest.raises(ValueError, match="exits freeze: use exit mode freeze"):
        next(score_forced(tiny_model(), [([1], [1])], [Depth(3, QExit(0.5))], "last", batch_size=1))

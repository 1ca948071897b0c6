"""Rollouts and their replay: the learner says what the rollout said, whatever decided the depths."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_model

from looplm.exits import QExit
from looplm.tuning.replay import ratio_free_loss, replay
from looplm.tuning.rl_recipe import DepthSettings
from looplm.tuning.rollouts import Drawing, Rows, Sample, roll_out

LOOPS = 3
MODES = {
    "fixed": {"mode": "fixed"},
    "adaptive": {"mode": "adaptive", "exit_threshold": 0.6},
    "sampled": {"mode": "sampled"},
    "sampled from two": {"mode": "sampled", "min_loops": 2},
    "per-loop": {"mode": "per-loop"},
    "paper": {"mode": "paper-off-policy", "exit_threshold": 0.6},
}


def model_of(seed: int, **fields):
    torch.manual_seed(seed)
    model = small_model(**{"vocab_size": 11, "max_position_embeddings": 64, "eos_token_id": 2, **fields})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.model.early_exit_gate.weight.normal_(std=2.0, generator=generator)
    return model.eval()


def drawing_of(depth: DepthSettings, loops: int = LOOPS, temperature: float = 1.0) -> Drawing:
    return Drawing(depth, loops, temperature, 7, 1 << 26)


def learner(model, samples, depth, loops, temperature):
    rows = Rows.of(samples)
    if depth.mode in ("per-loop", "paper-off-policy"):
        weights = torch.zeros(rows.ids.shape)
        tokens = ratio_free_loss(model, rows, weights, depth, temperature=temperature, max_loops=loops)[1]
        return rows, tokens, torch.zeros_like(tokens)
    found = replay(model, rows, temperature=temperature, min_loops=depth.min_loops, max_loops=loops).actions
    return rows, found.tokens, found.exits


def test_samples_side_by_side():
    samples = [
        Sample([5, 6, 7], [8, 9], [3, 3, 3, 1], [-0.1, -0.2], [0.0, -0.7], True),
        Sample([4], [3], [2], [-0.3], [0.0], False),
    ]
    rows = Rows.of(samples)
    assert rows.ids.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert rows.targets.tolist() == [[6, 7, 8, 9], [3, 0, 0, 0]]
    assert rows.depths.tolist() == [[3, 3, 3, 1], [2, 0, 0, 0]]
    assert rows.acts.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert rows.exits.tolist() == [[False, False, False, True], [False] * 4]  # the prompt's last exit is no action
    torch.testing.assert_close(rows.old_tokens, torch.tensor([[0, 0, -0.1, -0.2], [-0.3, 0, 0, 0]]))
    torch.testing.assert_close(rows.old_exits, torch.tensor([[0, 0, 0, -0.7], [0, 0, 0, 0.0]]))
    assert samples[0].loops == [3, 1] and samples[1].loops == [2]


prompts_drawn = st.lists(st.lists(st.integers(3, 10), min_size=1, max_size=20), min_size=1, max_size=5)


@pytest.mark.parametrize("name", MODES)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(prompts=prompts_drawn, seed=st.integers(0, 99), temperature=st.sampled_from([0.7, 1.0, 1.5]))
def test_learner_and_rollout_agree(name, prompts, seed, temperature):
    model, depth = model_of(seed), DepthSettings(**MODES[name])
    samples = roll_out(model, prompts, range(len(prompts)), drawing_of(depth, temperature=temperature))
    rows, tokens, exits = learner(model, samples, depth, LOOPS, temperature)
    torch.testing.assert_close(tokens, rows.old_tokens, rtol=0, atol=2e-5)
    if depth.mode == "sampled":
        torch.testing.assert_close(exits, rows.old_exits, rtol=0, atol=2e-5)
    # every row alone says the same: padding and neighbours change nothing
    for number, sample in enumerate(samples):
        alone, *said = learner(model, [sample], depth, LOOPS, temperature)
        width = alone.ids.shape[1]
        torch.testing.assert_close(said[0][0], tokens[number, :width], rtol=0, atol=2e-5)
    again = roll_out(model, prompts[::-1], range(len(prompts))[::-1], drawing_of(depth, temperature=temperature))
    assert [sample.tokens for sample in again[::-1]] == [sample.tokens for sample in samples]  # by seed alone


def test_tokens_and_exits_are_one_distribution():
    """All answers of two tokens, with every exit there can be: their probabilities sum to 1."""
    model, prompt = model_of(1, vocab_size=5, eos_token_id=None), [3, 4]
    samples = [
        Sample(prompt, [first, second], [LOOPS, LOOPS, depth], [0.0, 0.0], [0.0, 0.0], False)
        for first, second in itertools.product(range(5), repeat=2)
        for depth in range(1, LOOPS + 1)
    ]
    found = replay(model, Rows.of(samples), temperature=1.3, min_loops=1, max_loops=LOOPS).actions
    total = found.joint.sum(1).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)
    assert found.exits[:, :2].abs().sum() == 0 and (found.exits[:, 2] < 0).all()


def test_full_depth_keys_and_the_first_loop_over_the_threshold():
    """The paper's rollout against full passes without a cache, row by row."""
    model, depth = model_of(7), DepthSettings(**MODES["paper"])
    prompts, loops = [[3, 4, 5, 6, 7], [8]], set()
    for prompt, sample in zip(prompts, roll_out(model, prompts, [1, 2], drawing_of(depth)), strict=True):
        text = torch.tensor([[*prompt, *sample.tokens]])
        out = model(text, exit_rule=QExit(0.6), num_loop_steps=LOOPS)
        first = len(prompt) - 1
        assert out.exit_depths[0, first:-1].tolist() == sample.loops
        log_p = out.logits[0, first:-1].log_softmax(-1).gather(-1, text[0, first + 1 :, None])[:, 0]
        torch.testing.assert_close(log_p, torch.tensor(sample.log_probabilities), rtol=0, atol=1e-5)
        loops |= set(sample.loops)
    assert len(loops) > 1


@pytest.mark.parametrize("credit", ["uniform", "progressive", "exit"])
def test_credit_for_every_loop_by_its_definition(credit):
    model = model_of(3)
    depth = DepthSettings(mode="per-loop", credit=credit)
    samples = roll_out(model, [[3, 4, 5], [6, 7]], [5, 6], drawing_of(depth))
    rows = Rows.of(samples)
    weights = torch.randn(rows.ids.shape, generator=torch.Generator().manual_seed(0)) * rows.acts
    loss = ratio_free_loss(model, rows, weights, depth, temperature=1.4, max_loops=LOOPS)[0]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = torch.zeros(())
    with torch.no_grad():
        p = model(rows.ids, num_loop_steps=LOOPS).exit_probabilities
    share = {"uniform": [1 / 3] * 3, "progressive": [1 / 6, 2 / 6, 3 / 6]}.get(credit)
    for loop in range(1, LOOPS + 1):
        logits = model(rows.ids, exit_at_step=loop - 1, num_loop_steps=LOOPS).logits / 1.4
        log_p = logits.log_softmax(-1).gather(-1, rows.targets[..., None])[..., 0]
        w = p[..., loop - 1] if share is None else share[loop - 1]
        expected = expected - (weights * w * log_p).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-5)
    assert not any("early_exit_gate" in name for name in found if found[name].abs().sum() > 0)


def test_exit_gradients_may_end_in_the_gate():
    for detached in (False, True):
        model = model_of(4)
        model.model.detached_gate = detached
        samples = roll_out(model, [[3, 4, 5]] * 4, range(4), drawing_of(DepthSettings(mode="sampled")))
        exits = replay(model, Rows.of(samples), temperature=1.0, min_loops=1, max_loops=LOOPS).actions.exits
        exits.sum().backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        gate = {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
        assert moved == gate if detached else moved > gate

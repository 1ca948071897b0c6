"""Depth arguments: what they mean, which are refused, and a budget that is kept."""

from typing import Any

import pytest
import torch
from checks import FULL, LOOPS, PROMPTS, check_rows, left_padded, limited, q_exit
from tiny import tiny_config, tiny_model, tokens
from torch import Tensor

from looplm.exits import Confidence, FixedDepth, QExit
from looplm.model.cache import LoopCache
from looplm.model.depth import BUDGET_GAIN, DepthOptions, DepthSession
from looplm.model.outputs import OuroCausalLMOutput

pytestmark = pytest.mark.filterwarnings("ignore:running . loops")

CONFIG = tiny_config()  # three loops


def gather(**arguments: Any) -> DepthOptions:
    return DepthOptions.gather(CONFIG, **arguments)


# --- options ---


def test_full_depth_is_max_loops_else_num_loop_steps_else_the_trained() -> None:
    for arguments, loops in (({}, 3), ({"num_loop_steps": 2}, 2), ({"num_loop_steps": 2, "max_loops": 5}, 5)):
        options = gather(**arguments)
        assert options == DepthOptions(None, None, 1, loops) and not options.adaptive and options.num_loops == loops
    assert gather(max_loops=torch.tensor([2, 4, 1])).num_loops == 4


def test_which_rule_is_in_force() -> None:
    assert gather(exit_threshold=0.4).rule == QExit(0.4)
    assert gather(exit_rule=FixedDepth(2)).rule == FixedDepth(2)
    assert gather(adaptive_loop=True).rule == QExit(1.0)
    assert gather(depth_budget=2.0).rule is None and gather(depth_budget=2.0).adaptive
    low = tiny_config(early_exit_threshold=0.7)
    assert DepthOptions.gather(low).rule == QExit(0.7)
    assert DepthOptions.gather(low, adaptive_loop=False).rule is None
    assert DepthOptions.gather(low, depth_budget=2.0).rule is None


def test_tensors_of_one_number_are_numbers() -> None:
    options = gather(num_loop_steps=torch.tensor(2), min_loops=torch.tensor(1), depth_budget=torch.tensor(1.5))
    assert (options.budget, options.min_loops, options.max_loops) == (1.5, 1, 2)
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **FULL, num_loop_steps=torch.tensor(2))
    assert torch.equal(result.sequences, model.generate(**left_padded(PROMPTS), **FULL, num_loop_steps=2).sequences)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_threshold": 0.0}, r"exit_threshold is 0.0; it must lie in \(0, 1\]"),
        ({"exit_threshold": 1.01}, "exit_threshold is 1.01"),
        ({"exit_threshold": float("nan")}, "exit_threshold is nan"),
        ({"exit_threshold": torch.tensor([0.5, -1.0])}, r"exit_threshold is tensor\(\[ 0.5000, -1.0000\]\)"),
        ({"depth_budget": 0.9}, r"depth_budget is 0.9; it must lie in min_loops\.\.max_loops = 1\.\.3"),
        ({"depth_budget": 3.1}, "depth_budget is 3.1"),
        ({"depth_budget": 1.5, "min_loops": 2}, r"depth_budget is 1.5; .* = 2\.\.3"),
        ({"depth_budget": float("nan")}, "depth_budget is nan"),
        ({"depth_budget": torch.tensor([1.0, 4.0])}, "depth_budget is tensor"),
        ({"depth_budget": 2.0, "exit_threshold": 0.5}, "exit_threshold and depth_budget are both given"),
        ({"depth_budget": 2.0, "exit_rule": QExit(0.5)}, "exit_rule and depth_budget are both given"),
        ({"depth_budget": 2.0, "adaptive_loop": False}, "adaptive_loop is False, but depth_budget is given"),
        ({"min_loops": 0}, r"min_loops is 0; it must lie in 1\.\.max_loops = 3"),
        ({"min_loops": torch.tensor([1, 3]), "max_loops": torch.tensor([3, 2])}, "min_loops is tensor"),
        ({"max_loops": 0}, r"max_loops \(or num_loop_steps\) is 0; it must be at least 1"),
        ({"num_loop_steps": torch.tensor([3, 0])}, r"max_loops \(or num_loop_steps\) is tensor\(\[3, 0\]\)"),
        ({"prefill": "half"}, "prefill is 'half'; it must be full or adaptive"),
        ({"prefill": "adaptive"}, "prefill is 'adaptive', but no exit rule is given; pass exit_threshold, exit_rule"),
        ({"prefill": "adaptive", "adaptive_loop": False}, "prefill is 'adaptive', but no exit rule is given"),
        ({"kv_policy": "mean"}, "kv_policy is 'mean'; it must be one of per_loop, last, average, first"),
    ],
)
def test_refused_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gather(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth_budget": torch.tensor([2.0, 2.0])}, "depth_budget has 2 values; the batch has 3 rows"),
        ({"max_loops": torch.tensor([2, 2, 2, 2])}, "max_loops has 4 values; the batch has 3 rows"),
        ({"num_loop_steps": torch.tensor([[2, 2, 2]])}, "max_loops has 1x3 values; the batch has 3 rows"),
        ({"min_loops": torch.tensor([1, 1, 1, 1]), "exit_threshold": 0.5}, "min_loops has 4 values"),
        ({"exit_threshold": torch.tensor([0.5, 0.5])}, "QExit.threshold has 2 values; the batch has 3 rows"),
        ({"exit_rule": Confidence("kl", torch.tensor([0.1] * 4))}, "Confidence.threshold has 4 values"),
        ({"max_loops": torch.tensor([2, 2, 2]), "num_return_sequences": 2, "do_sample": True}, "the batch has 6 rows"),
        ({"max_loops": torch.tensor([2, 2, 2]), "exit_at_step": 0}, "take one number of loops, not one a row"),
    ],
)
def test_values_one_a_row_must_fit_the_batch(arguments: dict[str, Any], message: str) -> None:
    model, calls = tiny_model(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        model.generate(**left_padded(PROMPTS), max_new_tokens=2, **arguments)
    assert not calls, "refused before anything runs"


@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_limits_one_a_row(prefill: str) -> None:
    model, least, most = tiny_model(), [1, 2, 1], [2, 4, 1]
    limits = {"min_loops": torch.tensor(least), "max_loops": torch.tensor(most)}
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6, prefill=prefill, **limits)
    check_rows(model, result, PROMPTS, [limited(q_exit(0.6), low) for low in least], most, "per_loop", prefill, least)


# --- the session ---


def step(*depths: int) -> OuroCausalLMOutput:
    return OuroCausalLMOutput(exit_depths=torch.tensor(depths)[:, None])


def test_the_threshold_follows_what_was_spent() -> None:
    """0.5 + gain x (loops left over so far), row by row, within 0.001..1."""
    session = DepthSession(DepthOptions(budget=torch.tensor([2.0, 1.5, 3.0]), max_loops=3), prompt_end=4)
    assert session.rule() == QExit(0.5)
    session.record(step(3, 3, 1))
    session.record(step(2, 0, 1))  # 0: the row has ended and spends nothing
    expected = [0.5 - BUDGET_GAIN * 1.0, 0.5 - BUDGET_GAIN * 1.5, 0.5 + BUDGET_GAIN * 4.0]
    assert session.rule().threshold.tolist() == pytest.approx([min(max(x, 1e-3), 1.0) for x in expected])
    uniform = DepthSession(DepthOptions(budget=2.0, max_loops=3), prompt_end=4)
    uniform.record(step(3, 1))
    assert uniform.rule().threshold.tolist() == pytest.approx([0.5 - BUDGET_GAIN, 0.5 + BUDGET_GAIN])


def test_depths_recorded_beyond_the_last_token_are_dropped() -> None:
    """Some devices and sharded runs go on for a pass or two after the last token."""
    session = DepthSession(DepthOptions(QExit(0.5), max_loops=3), prompt_end=4, eos_token_id=[9])
    for depth in (3, 1, 2, 2):
        session.record(step(depth, depth))
    recorded = session.recorded(torch.tensor([[5, 9, 0], [5, 6, 7]]))
    assert recorded["exit_depths"].tolist() == [[3, 1, 0], [3, 1, 2]]
    assert recorded["reached_depth"].tolist() == [2.0, 2.0]
    session.cache = LoopCache(CONFIG)
    session.cache.depths = torch.arange(14).view(2, 7)
    recorded = session.recorded(torch.tensor([[5, 9, 0], [5, 6, 7]]))
    assert recorded["position_depths"].tolist() == [[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]]


@pytest.mark.parametrize("budget", [1.3, 2.0, 2.6, [1.2, 2.0, 2.8]])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_budget_is_kept(budget: float | list[float], seed: int) -> None:
    model = tiny_model(seed)
    torch.manual_seed(seed)
    wanted: float | Tensor = torch.tensor(budget) if isinstance(budget, list) else budget
    settings = {"max_new_tokens": 60, "do_sample": True, "return_dict_in_generate": True}
    result = model.generate(tokens(3, 5, seed=seed), **settings, depth_budget=wanted)
    torch.testing.assert_close(result.reached_depth, result.exit_depths.float().mean(1))
    assert (result.reached_depth - wanted).abs().max() < 0.15
    assert len(result.exit_depths.unique()) == LOOPS


@pytest.mark.parametrize(("budget", "reached"), [(1.0, 1.0), (3.0, 3.0)])
def test_a_budget_at_the_limits(budget: float, reached: float) -> None:
    """The first token is read at full depth; what it spent is made up for as far as the limits allow."""
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **{**FULL, "max_new_tokens": 40}, depth_budget=budget)
    assert (result.reached_depth - reached).abs().max() < 0.15


def test_a_budget_with_adaptive_prefill_and_a_short_end() -> None:
    """Ended rows report the mean of the tokens they have."""
    model = tiny_model()
    free = model.generate(**left_padded(PROMPTS), **FULL, depth_budget=2.0, prefill="adaptive")
    end = int(free.sequences[0, 8])
    result = model.generate(**left_padded(PROMPTS), **FULL, depth_budget=2.0, prefill="adaptive", eos_token_id=end)
    for depths, reached in zip(result.exit_depths, result.reached_depth, strict=True):
        assert float(reached) == pytest.approx(float(depths[depths > 0].float().mean()))
    assert (result.exit_depths[0] == 0).any()

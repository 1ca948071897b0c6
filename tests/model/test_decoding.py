"""Early exit in decoding: tokens, logits and depths equal a slow oracle, and loops not run cost nothing."""

from typing import Any

import pytest
import torch
from checks import ADAPTIVE, FULL, LOOPS, PROMPTS, RULES, STEPS, check_rows, close, left_padded, limited, q_exit
from tiny import tiny_model
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from looplm.exits import QExit
from looplm.model.cache import KV_POLICIES
from looplm.model.modeling import OuroForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:running . loops")


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_equals_the_oracle_in_a_padded_batch(name: str) -> None:
    rule, criterion = RULES[name]
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_rule=rule)
    check_rows(model, result, PROMPTS, [limited(criterion)] * 3)
    assert (result.exit_depths[:, 0] == LOOPS).all()
    if name != "fixed":
        later = result.exit_depths[:, 1:]
        assert len(later.unique()) >= 2 and (later != later[0]).any(), "the rows should part"


@pytest.mark.parametrize("name", list(ADAPTIVE))
@pytest.mark.parametrize("rule", ["q", "kl"])
def test_every_variant_equals_the_oracle(name: str, rule: str) -> None:
    model = tiny_model(**ADAPTIVE[name])
    result = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_rule=RULES[rule][0])
    check_rows(model, result, PROMPTS[:2], [limited(RULES[rule][1])] * 2)


@pytest.mark.parametrize(("min_loops", "max_loops"), [(2, 3), (1, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("rule", ["q", "kl", "sampled"])
def test_depth_limits(rule: str, min_loops: int, max_loops: int) -> None:
    model = tiny_model()
    limits = {"min_loops": min_loops, "max_loops": max_loops}
    result = model.generate(**left_padded(PROMPTS[1:]), **FULL, exit_rule=RULES[rule][0], **limits)
    check_rows(
        model, result, PROMPTS[1:], [limited(RULES[rule][1], min_loops)] * 2, max_loops, min_loops=[min_loops] * 2
    )
    assert result.exit_depths.min() >= min_loops and result.exit_depths.max() <= max_loops


def test_thresholds_one_a_row() -> None:
    model, thresholds = tiny_model(), [0.3, 0.9, 1.0]
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=torch.tensor(thresholds))
    check_rows(model, result, PROMPTS, [limited(q_exit(q)) for q in (0.3, 0.9, 2.0)])


def test_the_configured_threshold_is_the_default() -> None:
    model = tiny_model(early_exit_threshold=0.6)
    asked = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    for arguments in ({}, {"adaptive_loop": True}, {"exit_rule": QExit(0.6)}):
        result = model.generate(**left_padded(PROMPTS), **FULL, **arguments)
        assert torch.equal(result.exit_depths, asked.exit_depths)
        assert torch.equal(result.sequences, asked.sequences)
    assert (model.generate(**left_padded(PROMPTS), **FULL, adaptive_loop=False).exit_depths == LOOPS).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_early_exit_saves_the_loops(rows: int) -> None:
    model, calls, heads = tiny_model(), [], []
    model.lm_head.register_forward_hook(lambda _, inputs, __: heads.append(inputs[0].shape))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    result = model.generate(**left_padded(PROMPTS[:rows]), **FULL, exit_threshold=0.6)
    prompt = [shape for shape in calls if shape[1] > 1]
    assert len(prompt) == 2 * LOOPS  # layers x loops, whole batch
    later = result.exit_depths[:, 1:]
    assert sum(shape[0] for shape in calls if shape[1] == 1) == 2 * int(later.sum())
    assert len(calls) - len(prompt) == 2 * int(later.max(0).values.sum())
    assert int(later.sum()) < later.numel() * LOOPS
    assert heads == [(rows, 1, 32)] * STEPS


def test_outputs_of_a_decoding_pass() -> None:
    """Exit probabilities are equation 3 up to the exit and NaN beyond it."""
    model, outputs = tiny_model(), []
    model.register_forward_hook(lambda _, __, output: outputs.append(output))
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.8, min_loops=2)
    assert outputs[0].exit_probabilities.shape == (3, 6, LOOPS)
    for step, output in enumerate(outputs[1:], start=1):
        depths = result.exit_depths[:, step]
        assert torch.equal(output.exit_depths[:, 0], depths)
        for p, depth in zip(output.exit_probabilities[:, 0], depths, strict=True):
            assert p[:depth].isfinite().all() and p[depth:].isnan().all() and p[0] == 0
            assert p[:depth].sum() >= (0.8 if depth < LOOPS else 1 - 1e-6)


@pytest.mark.parametrize("name", ["q", "max-probability"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    model, rule = tiny_model(), RULES[name][0]
    together = model.generate(**left_padded(PROMPTS), **FULL, exit_rule=rule)
    for b, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **FULL, exit_rule=rule)
        assert torch.equal(together.sequences[b, -STEPS:], alone.sequences[0, -STEPS:])
        assert torch.equal(together.exit_depths[b], alone.exit_depths[0])


def test_eager_attention_agrees() -> None:
    results = []
    for backend in ("sdpa", "eager"):
        model = tiny_model(num_key_value_heads=2)
        model.set_attn_implementation(backend)
        results.append(model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].exit_depths, results[1].exit_depths)
    close(torch.stack(results[0].logits), torch.stack(results[1].logits))


@pytest.mark.parametrize("many", [False, True])
def test_depths_are_0_after_the_end(many: bool) -> None:
    model = tiny_model()
    free = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    end = int(free.sequences[0, -4])  # the third new token of the first row
    ends = [end, 63] if many else end
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6, eos_token_id=ends)
    depths = torch.zeros(3, result.exit_depths.shape[1], dtype=torch.long)
    for b in range(3):
        new = free.sequences[b, -STEPS:].tolist()
        stop = min([i + 1 for i, token in enumerate(new) if token in ([end, 63] if many else [end])], default=STEPS)
        depths[b, :stop] = free.exit_depths[b, :stop]
        assert result.sequences[b, 6 : 6 + stop].tolist() == new[:stop]
        assert (result.sequences[b, 6 + stop :] == 0).all()
    assert torch.equal(result.exit_depths, depths) and (depths == 0).any()


# --- what was not run, and what went wrong ---


class EndRow(StoppingCriteria):
    """Ends one row after some new tokens without an end token, as a stop string does."""

    def __init__(self, row: int, length: int) -> None:
        self.row, self.length = row, length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return (torch.arange(len(input_ids)) == self.row) & (input_ids.shape[1] >= self.length)


def layer_calls(model: OuroForCausalLM) -> list[tuple[int, int]]:
    """(rows, positions) of every call of a core layer from now on."""
    calls: list[tuple[int, int]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, __: calls.append((inputs[0].shape[0], inputs[0].shape[1])))
    return calls


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("prefill", ["full", "adaptive"])
@pytest.mark.parametrize("end", ["length", "eos", "criterion"])
def test_layer_calls_are_the_recorded_depths(policy: str, prefill: str, end: str) -> None:
    """Layer calls x rows of the new positions equal the sum of their depths; ended rows are not run any more."""
    model = tiny_model(num_prelude_layers=1)
    settings = {**FULL, "exit_threshold": 0.6, "kv_policy": policy, "prefill": prefill}
    free = model.generate(**left_padded(PROMPTS), **settings)
    new = free.sequences[1, 6:].tolist()
    cut = next(i for i in (2, 1, 3) if new[i] not in new[:i])
    if end == "eos":
        settings["eos_token_id"] = new[cut]
    if end == "criterion":
        settings["stopping_criteria"] = StoppingCriteriaList([EndRow(1, 7 + cut)])
    calls, heads = layer_calls(model), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: heads.append(inputs[0].shape[0]))
    result = model.generate(**left_padded(PROMPTS), **settings)
    depths = result.position_depths[:, 6:]
    assert sum(rows for rows, length in calls if length == 1) == 2 * int(depths.sum())
    assert all(rows == 3 for rows, length in calls if length > 1)
    prompt_loops = int(result.position_depths[:, :6].max()) if prefill == "adaptive" else LOOPS
    assert sum(length > 1 for _, length in calls) == 2 * prompt_loops
    if end != "length":
        assert (result.exit_depths[1] > 0).tolist() == [i <= cut for i in range(result.exit_depths.shape[1])]
        assert sum(heads) == int((result.exit_depths > 0).sum())
    assert torch.equal(result.position_depths[:, 6:], result.exit_depths[:, 1:])
    for b in (0, 2):  # the others do not notice
        stop = int((result.exit_depths[b] > 0).sum())
        assert torch.equal(result.sequences[b, : 6 + stop], free.sequences[b, : 6 + stop])
        assert torch.equal(result.exit_depths[b, :stop], free.exit_depths[b, :stop])


def poison(model: OuroForCausalLM, token: int) -> None:
    """A token whose embedding is not a number; as an output it never wins."""
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan


def assert_rows_equal(result: Any, clean: Any, rows: tuple[int, ...]) -> None:
    for b in rows:
        assert torch.equal(result.sequences[b], clean.sequences[b])
        assert torch.equal(result.exit_depths[b], clean.exit_depths[b])
        close(torch.stack(result.logits)[:, b], torch.stack(clean.logits)[:, b])


@pytest.mark.parametrize("eos", [None, 63])
@pytest.mark.parametrize("prefill", ["full", "adaptive"])
@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_nan_in_the_prompt_ends_that_row_alone(policy: str, prefill: str, eos: int | None) -> None:
    model = tiny_model()
    settings = {**FULL, "exit_threshold": 0.6, "kv_policy": policy, "prefill": prefill, "eos_token_id": eos}
    inputs = left_padded(PROMPTS)
    clean = model.generate(**inputs, **settings)
    bad = next(t for t in inputs["input_ids"][1, 2:5].tolist() if t not in clean.sequences[[0, 2]].flatten().tolist())
    poison(model, bad)
    for more in ({}, {"prefill_chunk_size": 4}):
        with pytest.warns(UserWarning, match="^row 1: the logits are not finite at position") as caught:
            result = model.generate(**inputs, **settings, **more)
        assert "\n" not in str(caught[0].message)
        assert_rows_equal(result, clean, (0, 2))
        assert result.errors[0] is None and result.errors[2] is None and "check the weights" in result.errors[1]
        assert (result.exit_depths[1, 1:] == 0).all() and (result.position_depths[1, 6:] == 0).all()
        assert result.sequences[1, 6:].tolist() == [eos or 0] + [0] * (STEPS - 1)


def test_a_nan_in_decoding_ends_that_row_alone() -> None:
    model = tiny_model()
    settings = {**FULL, "exit_threshold": 0.6}
    clean = model.generate(**left_padded(PROMPTS), **settings)
    elsewhere = set(clean.sequences[[0, 2]].flatten().tolist()) | set(clean.sequences[1, :6].tolist())
    new = clean.sequences[1, 6:].tolist()
    place = next(i for i, token in enumerate(new) if token not in elsewhere)
    assert place < STEPS - 1, "the token must be run"
    poison(model, new[place])
    with pytest.warns(UserWarning, match=rf"^row 1: the exit gate is not finite at position {6 + place};"):
        result = model.generate(**left_padded(PROMPTS), **settings)
    assert_rows_equal(result, clean, (0, 2))
    assert result.sequences[1, 6 : 7 + place].tolist() == new[: place + 1]
    assert (result.exit_depths[1, : place + 1] == clean.exit_depths[1, : place + 1]).all()
    assert (result.exit_depths[1, place + 2 :] == 0).all()


@pytest.mark.parametrize("eos", [None, 63])
def test_all_rows_failing_is_an_error(eos: int | None) -> None:
    model = tiny_model()
    calls = layer_calls(model)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    settings = {**FULL, "max_new_tokens": 50, "min_new_tokens": 40, "eos_token_id": eos}
    with pytest.raises(FloatingPointError, match=r"^row 0: the logits are not finite.*; row 1: .*; row 2: "):
        model.generate(**left_padded(PROMPTS), **settings, exit_threshold=0.6)
    assert len(calls) == 2 * LOOPS  # the prompt only: nothing goes on for rows that are over


def test_a_gate_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.early_exit_gate.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"row 0: the exit gate is not finite at position 6; .*row 2: "):
        model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)

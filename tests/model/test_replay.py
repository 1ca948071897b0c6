"""Freezing in one parallel pass: replay of recorded depths, a rule that finds its own, gradients and checkpointing."""

from typing import Any

import pytest
import torch
from checks import ADAPTIVE, FULL, LOOPS, PROMPTS, RULES, close, left_padded
from oracle import Sweep
from tiny import tiny_config, tiny_model, tokens
from torch import Tensor

from looplm.exits import Confidence, FixedDepth, QExit, SampledExit
from looplm.model.cache import LoopCache
from looplm.model.modeling import OuroForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning"),  # until transformers 6
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),  # the oracle under autograd
]


def replayed(result: Any, prompts: list[Tensor]) -> dict[str, Tensor]:
    """The arguments of `forward` that replay a generation."""
    ids, padded = result.sequences[:, :-1], left_padded(prompts)["attention_mask"]
    mask = torch.nn.functional.pad(padded, (0, ids.shape[1] - padded.shape[1]), value=1)
    return {"input_ids": ids, "attention_mask": mask}


# --- replay equals generation ---


@pytest.mark.parametrize("prefill", ["full", "adaptive"])
@pytest.mark.parametrize("rule", list(RULES))
def test_replay_gives_the_logits_of_the_generation(rule: str, prefill: str) -> None:
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_rule=RULES[rule][0], prefill=prefill)
    replay = model(**replayed(result, PROMPTS), exit_depths=result.position_depths)
    close(replay.logits[:, 5:].detach(), torch.stack(result.logits, dim=1))
    assert replay.logits.requires_grad
    depths = result.position_depths.clamp(min=1)
    assert torch.equal(replay.exit_depths, depths)
    close(replay.expected_depth, depths[result.position_depths > 0].double().mean())


@pytest.mark.parametrize("name", list(ADAPTIVE))
def test_replay_of_every_variant(name: str) -> None:
    model = tiny_model(**ADAPTIVE[name])
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6, prefill="adaptive")
    replay = model(**replayed(result, PROMPTS), exit_depths=result.position_depths)
    close(replay.logits[:, 5:].detach(), torch.stack(result.logits, dim=1))


def test_replay_of_a_sampled_text_with_ended_rows() -> None:
    """0 before a text and after its end; what comes after the end changes nothing before it."""
    model = tiny_model()
    free = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    torch.manual_seed(1)
    settings = {**FULL, "do_sample": True, "eos_token_id": free.sequences[:2, 8].tolist(), "max_new_tokens": 12}
    result = model.generate(**left_padded(PROMPTS), **settings, exit_rule=SampledExit(torch.tensor([4, 5, 6])))
    ran = result.exit_depths > 0
    assert not ran.all(), "a row should end early"
    replay = model(**replayed(result, PROMPTS), exit_depths=result.position_depths)
    close(replay.logits[:, 5:].detach()[ran], torch.stack(result.logits, dim=1)[ran])


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rule_finds_its_own_depths(rule: str) -> None:
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_rule=RULES[rule][0], prefill="adaptive")
    found = model(**replayed(result, PROMPTS), exit_rule=RULES[rule][0], exit_mode="freeze")
    ran = result.position_depths > 0
    assert torch.equal(found.exit_depths[ran], result.position_depths[ran])
    close(found.logits[:, 5:].detach(), torch.stack(result.logits, dim=1))
    probabilities = (x.detach().float() for x in (found.exit_probabilities[:, 5:], result.exit_probabilities))
    torch.testing.assert_close(*probabilities, rtol=1e-5, atol=1e-6, equal_nan=True)
    close(found.survival[:, 5:], result.survival)
    if rule == "fixed":  # all stop alike: nothing is seen of deeper loops
        return
    with pytest.raises(AssertionError):  # the released exits let deeper loops of earlier positions through
        close(model(**replayed(result, PROMPTS), exit_rule=RULES[rule][0]).logits[:, 5:], found.logits[:, 5:])


def test_records_of_a_freezing_pass() -> None:
    """Gate logits and probabilities up to the exit and NaN beyond; survival 0 where the exit was forced."""
    out = tiny_model()(tokens(3, 9), exit_rule=QExit(0.6), exit_mode="freeze")
    ran = torch.arange(1, LOOPS + 1) <= out.exit_depths[..., None]
    assert len(out.exit_depths.unique()) == LOOPS
    for table in (out.gate_logits, out.exit_probabilities):
        assert torch.equal(table.isnan(), ~ran)
    gone = out.exit_probabilities.nan_to_num(0).sum(-1)
    close(out.survival, 1 - gone)
    assert (out.survival[out.exit_depths == LOOPS] == 0).all() and (out.survival[out.exit_depths < LOOPS] > 0).all()


def test_full_depth_and_depth_one() -> None:
    model, ids = tiny_model(), tokens(2, 7)
    for loops in (1, 2, 3):
        plain = model(ids, num_loop_steps=loops).logits
        close(model(ids, exit_depths=torch.full((2, 7), loops)).logits, plain)
        close(model(ids, exit_rule=FixedDepth(loops), exit_mode="freeze").logits, plain)
    close(model(ids, exit_mode="freeze").logits, plain)
    close(model(ids, exit_mode="freeze", exit_at_step=0).logits, model(ids, num_loop_steps=1).logits)


@pytest.mark.parametrize("rule", ["q", "sampled", "kl"])
@pytest.mark.parametrize("least", [2, torch.tensor([1, 3, 2])])
def test_limits_of_a_generation_are_replayed(rule: str, least: int | Tensor) -> None:
    """The rule finds the depths of a generation with limits, and so do its probabilities and its survival."""
    model = tiny_model()
    options = {"exit_rule": RULES[rule][0], "prefill": "adaptive", "min_loops": least, "max_loops": 3}
    result = model.generate(**left_padded(PROMPTS), **FULL, **options)
    inputs, ran = replayed(result, PROMPTS), result.position_depths > 0
    found = model(**inputs, exit_rule=RULES[rule][0], exit_mode="freeze", min_loops=least, num_loop_steps=3)
    replay = model(**inputs, exit_depths=result.position_depths, min_loops=least)
    assert torch.equal(found.exit_depths[ran], result.position_depths[ran])
    for output in (found, replay):
        close(output.logits[:, 5:].detach(), torch.stack(result.logits, dim=1))
        probabilities = (x.detach().float() for x in (output.exit_probabilities[:, 5:], result.exit_probabilities))
        torch.testing.assert_close(*probabilities, rtol=1e-5, atol=1e-6, equal_nan=True)
        close(output.survival[:, 5:], result.survival)


@pytest.mark.parametrize("mode", ["rule", "replay"])
def test_what_a_freezing_pass_returns(mode: str) -> None:
    model, ids = tiny_model(num_prelude_layers=1, num_coda_layers=1), tokens(2, 6)
    how = {"exit_rule": QExit(0.6), "exit_mode": "freeze"}
    whole = model(ids, labels=ids, **how)
    if mode == "replay":
        how = {"exit_depths": whole.exit_depths}
    output = model(ids, labels=ids, skip_logits=True, **how)
    assert output.logits is None and torch.equal(output.exit_depths, whole.exit_depths)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    close(output.token_losses, torch.nn.functional.pad(expected, (0, 1)).detach())
    close(output.loss, whole.loss)
    part = model(ids, logits_to_keep=2, **how)
    close(part.logits, whole.logits[:, -2:])
    assert torch.equal(part.exit_depths, whole.exit_depths[:, -2:])


# --- what stays frozen ---


@torch.no_grad()
def test_keys_after_the_exit_are_those_of_the_exit_and_of_generation() -> None:
    model = tiny_model(num_prelude_layers=1, num_coda_layers=1)
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6, prefill="adaptive")
    cache = LoopCache(model.config)
    model(**replayed(result, PROMPTS), exit_depths=result.position_depths, past_key_values=cache, use_cache=True)
    text = result.position_depths > 0
    for mine, theirs in zip(cache.slots, result.past_key_values.slots, strict=True):
        for name in ("keys", "values"):
            a, b = (getattr(x, name)[:, :, :, : text.shape[1]].movedim(2, -2)[:, text] for x in (mine, theirs))
            close(a, b)
            if len(a) == LOOPS:
                for loop in range(1, LOOPS):
                    over = result.position_depths[text] <= loop
                    assert torch.equal(a[loop][over], a[loop - 1][over])
                    assert not torch.equal(a[loop][~over], a[loop - 1][~over])


@torch.no_grad()
def test_replay_in_two_parts_on_a_cache() -> None:
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    arguments, cache = replayed(result, PROMPTS), LoopCache(model.config)
    ids, mask, depths = arguments["input_ids"], arguments["attention_mask"], result.position_depths
    whole = model(**arguments, exit_depths=depths)
    parts = [
        model(ids[:, a:b], mask[:, :b], exit_depths=depths[:, a:b], past_key_values=cache, use_cache=True).logits
        for a, b in ((0, 4), (4, 9), (9, 11))
    ]
    close(torch.cat(parts, dim=1)[mask.bool()], whole.logits[mask.bool()])
    assert torch.equal(cache.depths, depths)


# --- gradients ---


def gradients(model: OuroForCausalLM) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradients_equal_those_of_the_oracle() -> None:
    """Through frozen states and keys too: autograd through one position at a time gives the same."""
    model = tiny_model(num_key_value_heads=2, num_prelude_layers=1, num_coda_layers=1, input_injection="add")
    ids, depths = tokens(1, 6)[0], [2, 1, 3, 1, 2, 3]
    weights = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slow = Sweep(model, lambda look: look.loop >= depths[look.position], LOOPS)
    for token in ids.tolist():
        slow.extend(token)
    (torch.stack(slow.logits) * weights).sum().backward()
    expected = gradients(model)
    (model(ids[None], exit_depths=torch.tensor([depths])).logits[0] * weights).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_the_gate_learns_through_the_probabilities() -> None:
    model = tiny_model()
    out = model(tokens(2, 6), exit_rule=QExit(0.6), exit_mode="freeze")
    chosen = out.exit_probabilities.gather(2, out.exit_depths[..., None] - 1)
    chosen.log().sum().backward()
    assert model.model.early_exit_gate.weight.grad.abs().sum() > 0


def test_the_loss_is_the_cross_entropy_at_the_exits() -> None:
    model, ids = tiny_model(), tokens(2, 6)
    depths = torch.tensor([[1, 3, 2, 2, 1, 3], [3, 1, 1, 2, 3, 3]])
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, exit_depths=depths, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    close(out.loss, expected / 8)
    close(model(ids, exit_depths=depths, labels=labels, num_items_in_batch=20).loss, expected / 20)


@pytest.mark.parametrize("name", list(ADAPTIVE))
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model, ids = tiny_model(**ADAPTIVE[name]).train(), tokens(2, 8)
    mask = torch.tensor([[0, 0] + [1] * 6, [1] * 8])
    depths = torch.tensor([[0, 0, 1, 3, 2, 2, 1, 3], [3, 1, 1, 2, 3, 3, 0, 0]])
    for more in ({"exit_depths": depths}, {"exit_rule": QExit(0.6), "exit_mode": "freeze"}):
        model.gradient_checkpointing_disable()
        plain = model(ids, mask, labels=ids, **more)
        plain.loss.backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        passes = []
        hook = model.model.layers[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
        checked = model(ids, mask, labels=ids, **more)
        checked.loss.backward()
        hook.remove()
        assert len(passes) == 2 * LOOPS, "every loop should run again in backward"
        torch.testing.assert_close(checked.loss, plain.loss)
        torch.testing.assert_close(gradients(model), expected)


def saved_bytes(model: OuroForCausalLM, ids: Tensor, depths: Tensor) -> int:
    """Bytes kept for backward, each storage once and without the parameters."""
    kept: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model(ids, exit_depths=depths).logits
    assert logits.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_memory_with_gradient_checkpointing() -> None:
    """What a loop adds is D + 2 L H_kv D_h values a position, as `freezing` says, not all activations."""
    plain, checked = [], []
    for loops in (2, 4):
        model, ids = tiny_model(total_ut_steps=loops, num_key_value_heads=2, num_hidden_layers=3).train(), tokens(2, 32)
        depths = torch.randint(1, loops + 1, ids.shape, generator=torch.Generator().manual_seed(0))
        depths[0, 0] = loops
        plain.append(saved_bytes(model, ids, depths))
        model.gradient_checkpointing_enable()
        checked.append(saved_bytes(model, ids, depths))
    values = 2 * 32 * 2 * 8  # positions, two loops more, fp64
    promised = 32 + 2 * 3 * 2 * 8
    assert promised <= (checked[1] - checked[0]) / values <= 1.06 * promised  # the rest: gates and masks
    assert (plain[1] - plain[0]) / values > 10 * promised


# --- refusals ---


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        (torch.ones(2, 5, dtype=torch.long), r"exit_depths has shape \(2, 5\); it must be \(2, 6\), one a position"),
        (torch.ones(6, dtype=torch.long), r"exit_depths has shape \(6,\)"),
        (torch.ones(2, 6, 1, dtype=torch.long), r"exit_depths has shape \(2, 6, 1\)"),
        (torch.full((2, 6), 4), r"exit_depths spans 4\.\.4; it must hold whole loops in 1\.\.3"),
        (torch.full((2, 6), -1), r"exit_depths spans -1\.\.-1"),
        (torch.full((2, 6), 1.5), "whole loops"),
        (torch.tensor([[0, 1, 2, 0, 1, 0], [1] * 6]), "exit_depths has a 0 between two depths"),
    ],
)
def test_recorded_depths_that_cannot_be(depths: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model()(tokens(2, 6), exit_depths=depths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_threshold": 0.5, "exit_depths": torch.ones(2, 6).long()}, "exit_depths replays recorded depths; drop"),
        ({"exit_at_step": 1, "exit_depths": torch.ones(2, 6).long()}, "exit_depths replays recorded depths; drop"),
        ({"use_weighted_exit": True, "exit_mode": "freeze"}, "use_weighted_exit mixes all loops"),
        ({"exit_mode": "skip", "exit_threshold": 0.5}, "exit_mode is 'skip'; it must be select or freeze"),
        ({"exit_mode": "freeze", "exit_threshold": 1.5}, "exit_threshold is 1.5; it must lie in"),
        ({"min_loops": 2}, "min_loops is 2, but goes with exit_mode='freeze' or exit_depths only"),
        ({"min_loops": torch.tensor([2, 1])}, "but goes with exit_mode='freeze' or exit_depths only"),
        ({"exit_mode": "freeze", "min_loops": 4}, r"min_loops is 4; it must lie in 1..max_loops = 3"),
        ({"exit_mode": "freeze", "min_loops": torch.ones(3).long()}, r"min_loops has shape \(3,\)"),
        ({"exit_depths": torch.ones(2, 6).long(), "min_loops": torch.ones(3).long()}, r"min_loops has shape \(3,\)"),
        ({"min_loops": 2, "exit_depths": torch.ones(2, 6).long()}, "exit_depths spans 1..1; it must hold .* in 2..3"),
        ({"exit_mode": "freeze", "output_hidden_states": True}, "output_hidden_states is True, but a freezing pass"),
        ({"exit_mode": "freeze", "objective": "last", "labels": tokens(2, 6)}, "objective is 'last', but a freezing"),
        ({"exit_mode": "freeze", "exit_rule": QExit(torch.tensor([0.5] * 3))}, "has 3 values; the batch has 2 rows"),
        ({"exit_mode": "freeze", "past_key_values": LoopCache(tiny_config(num_coda_layers=1))}, "holds layers"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model()(tokens(2, 6), **arguments)
    assert "\n" not in str(caught.value)


def test_a_pooled_gate_replays_but_finds_no_depths() -> None:
    model, ids = tiny_model(exit_gate_pooling="causal_mean"), tokens(1, 5)
    with pytest.raises(ValueError, match="exit_gate_pooling is 'causal_mean': a rule that freezes needs 'token'"):
        model(ids, exit_mode="freeze", exit_rule=Confidence("entropy", 2.0))
    close(model(ids, exit_depths=torch.full((1, 5), 2)).logits, model(ids, num_loop_steps=2).logits)


def test_a_cache_carries_no_gradients() -> None:
    with pytest.raises(ValueError, match="use_cache is True in training"):
        tiny_model().train()(tokens(1, 5), exit_depths=torch.full((1, 5), 2), use_cache=True)

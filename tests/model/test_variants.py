"""Every variant of the architecture keeps the same promises: cache, padding, packing, causality, gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import sweep
from tiny import VARIANTS, tiny_config, tiny_model, tokens
from torch import Tensor, nn

from looplm.exits import Confidence, ExitRule, FixedDepth, QExit, SampledExit, StateDifference
from looplm.model.cache import LoopCache
from looplm.model.modeling import OuroForCausalLM

IDS = tokens(2, 11)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


@pytest.fixture
def model(variant: dict[str, Any]) -> OuroForCausalLM:
    return tiny_model(**variant)


def count_calls(module: nn.Module) -> list[torch.Size]:
    """The input shapes of every call to come."""
    shapes: list[torch.Size] = []
    module.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    return shapes


# --- the numbers ---


@torch.no_grad()
def test_forward_is_what_the_formulas_say(model: OuroForCausalLM) -> None:
    output, ids = model(IDS[:1]), IDS[0].tolist()
    slow = sweep(model, ids, lambda look: False, 3)
    close(output.logits[0], torch.stack(slow.logits))
    assert output.logits.isfinite().all() and output.exit_probabilities.isfinite().all()
    if model.config.exit_gate_pooling == "token":
        close(output.gate_logits[0], torch.tensor(slow.gates, dtype=torch.float64))


@torch.no_grad()
def test_pooled_gate_reads_the_running_mean() -> None:
    model = tiny_model(exit_gate_pooling="causal_mean")
    output = model(IDS, output_hidden_states=True)
    for i in range(IDS.shape[1]):
        for loop in range(3):
            mean = output.hidden_states[loop + 1][:, : i + 1].mean(1)
            close(output.gate_logits[:, i, loop], model.model.early_exit_gate(mean)[:, 0])


@torch.no_grad()
def test_save_and_load(model: OuroForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again, report = OuroForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    tied = model.config.tie_word_embeddings
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) is tied


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_larger_vocabulary(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    before = model(IDS).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == model.config.vocab_size == 70
    close(model(IDS).logits[..., :64], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


# --- the cache ---


@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 5], [11]], ids=["tokens", "chunks", "whole"])
@torch.no_grad()
def test_cached_passes_equal_one_parallel_pass(model: OuroForCausalLM, chunks: list[int]) -> None:
    whole = model(IDS, output_hidden_states=True)
    cache, logits, states = LoopCache(model.config), [], []
    for ids in IDS.split(chunks, dim=1):
        output = model(ids, past_key_values=cache, output_hidden_states=True)
        assert output.past_key_values is cache
        logits.append(output.logits)
        states.append(output.hidden_states[-1])
    close(torch.cat(logits, 1), whole.logits)
    close(torch.cat(states, 1), whole.hidden_states[-1])
    assert cache.get_seq_length() == 11 and cache.num_loops == 3


@torch.no_grad()
def test_the_gate_behind_a_cache() -> None:
    cache, pooled = LoopCache(tiny_config()), tiny_model(exit_gate_pooling="causal_mean")
    assert pooled(IDS[:, :5], past_key_values=cache).gate_logits is not None
    after = pooled(IDS[:, 5:], past_key_values=cache)  # the mean needs states that are gone
    assert after.gate_logits is None and after.exit_probabilities is None and after.logits.isfinite().all()
    for arguments in ({"exit_threshold": 0.5}, {"use_weighted_exit": True}):
        with pytest.raises(ValueError, match="causal_mean"):
            pooled(IDS[:, :1], past_key_values=cache, **arguments)


@torch.no_grad()
def test_fewer_loops_behind_a_cache_offer_their_last_keys() -> None:
    """A pass of n loops is a pass whose positions all left after loop n, also to a later pass of more loops."""
    model, depths = tiny_model(), [3, 3, 3, 1, 1, 2, 3, 1, 2, 3, 3]
    slow = sweep(model, IDS[0].tolist(), lambda look: look.loop >= depths[look.position], 3)
    cache, start = LoopCache(model.config), 0
    for length, loops in ((3, 3), (2, 1), (1, 2), (1, 3), (1, 1), (1, 2), (2, 3)):
        ids = IDS[:1, start : start + length]
        output = model(ids, past_key_values=cache, num_loop_steps=loops)
        close(output.logits[0], torch.stack(slow.logits[start : start + length]))
        start += length


@torch.no_grad()
def test_a_reset_cache_starts_over() -> None:
    model = tiny_model()
    cache = LoopCache(model.config)
    model(IDS, past_key_values=cache)
    for ids, loops in ((IDS[:1], 2), (tokens(3, 4), 3)):
        cache.reset()
        output = model(ids, past_key_values=cache, num_loop_steps=loops)
        close(output.logits, model(ids, num_loop_steps=loops).logits)
        assert cache.num_loops == loops
    cache.crop(-4)
    close(model(IDS, past_key_values=cache).logits, model(IDS).logits)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="holds layers"):
        model(IDS, past_key_values=LoopCache(tiny_config(num_coda_layers=1)))
    cache = LoopCache(model.config)
    model(IDS, past_key_values=cache, num_loop_steps=2)
    with pytest.raises(ValueError, match="filled with 2 loops"):
        model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="has 2 rows; the input has 1"):
        model(IDS[:1, :1], past_key_values=cache, num_loop_steps=2)
    with pytest.raises(ValueError, match="is a list; a looped model needs a LoopCache"):
        model(IDS, past_key_values=[])


# --- padding and packing ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_rows_equal_themselves_alone(model: OuroForCausalLM, side: str, backend: str) -> None:
    model.set_attn_implementation(backend)
    lengths = [11, 7, 1]
    batch, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    rows = [tokens(length, seed=length) for length in lengths]
    places = [slice(0, n) if side == "right" else slice(11 - n, 11) for n in lengths]
    for b, (row, place) in enumerate(zip(rows, places, strict=True)):
        batch[b, place], mask[b, place] = row, 1
    output = model(batch, attention_mask=mask, exit_threshold=0.6)
    assert output.logits.isfinite().all() and output.gate_logits.isfinite().all()
    depths = []
    for b, (row, place) in enumerate(zip(rows, places, strict=True)):
        alone = model(row[None], exit_threshold=0.6)
        close(output.gate_logits[b, place], alone.gate_logits[0])
        assert torch.equal(output.exit_depths[b, place], alone.exit_depths[0])
        close(output.logits[b, place], alone.logits[0])
        depths.append((alone.exit_probabilities[0] * torch.arange(1, 4)).sum(-1))
    close(output.expected_depth, torch.cat(depths).mean())


@torch.no_grad()
def test_padded_cached_decoding(model: OuroForCausalLM) -> None:
    prompt, mask = IDS.clone(), torch.ones_like(IDS)
    prompt[1, :4], mask[1, :4] = 0, 0
    cache, more = LoopCache(model.config), tokens(2, 3, seed=5)
    model(prompt, attention_mask=mask, past_key_values=cache)
    for i in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        got = model(more[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits[:, 0]
        for b, start in enumerate((0, 4)):
            alone = torch.cat([IDS[b, start:], more[b, : i + 1]])[None]
            close(got[b], model(alone).logits[0, -1])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model: OuroForCausalLM) -> None:
    lengths = [4, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for row in IDS.split(1):
        packed = model(row, position_ids=positions, exit_threshold=0.6)
        documents = [model(document, exit_threshold=0.6) for document in row.split(lengths, dim=1)]
        close(packed.logits, torch.cat([d.logits for d in documents], 1))
        close(packed.gate_logits, torch.cat([d.gate_logits for d in documents], 1))
    both = model(IDS, position_ids=positions)  # (1, S) positions for every row
    close(both.logits[1:], model(IDS[1:], position_ids=positions).logits)
    close(both.gate_logits[1:], model(IDS[1:], position_ids=positions).gate_logits)


@torch.no_grad()
def test_a_prepared_mask_and_embeddings(model: OuroForCausalLM) -> None:
    mask = (
        torch.full((11, 11), torch.finfo(torch.float64).min, dtype=torch.float64)
        .triu(1)[None, None]
        .expand(2, 1, -1, -1)
    )
    embeddings = model.model.embed_tokens(IDS)
    output = model(inputs_embeds=embeddings, attention_mask=mask)
    close(output.logits, model(IDS).logits)


# --- causality ---


@pytest.mark.parametrize("pooling", ["token", "causal_mean"])
@torch.no_grad()
def test_nothing_sees_a_later_position(variant: dict[str, Any], pooling: str) -> None:
    model = tiny_model(**{**variant, "exit_gate_pooling": pooling})
    before = model(IDS, exit_threshold=0.6)
    changed = IDS.clone()
    changed[:, 6:] = tokens(2, 5, seed=99)
    after = model(changed, exit_threshold=0.6)
    close(after.gate_logits[:, :6], before.gate_logits[:, :6])
    close(after.logits[:, :6], before.logits[:, :6])
    assert not torch.allclose(after.gate_logits[:, 6:], before.gate_logits[:, 6:])


def test_gate_gradients_are_causal() -> None:
    for pooling in ("token", "causal_mean"):
        model = tiny_model(exit_gate_pooling=pooling)
        embeddings = model.model.embed_tokens(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings).gate_logits[:, 4].sum().backward()
        assert embeddings.grad is not None and (embeddings.grad[:, 5:] == 0).all()
        assert (embeddings.grad[:, :5].abs().sum(-1) > 0).all()


# --- gradients ---


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    results = []
    for checkpointing in (False, True):
        model = tiny_model(**VARIANTS[name]).train()
        calls = count_calls(model.model.layers[0])
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
        loss.backward()
        assert len(calls) == (6 if checkpointing else 3)  # every loop is recomputed
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for parameter, gradient in results[0][1].items():
        assert gradient is not None, parameter
        close(results[1][1][parameter], gradient)


# --- the vocabulary product ---


@pytest.mark.parametrize("arguments", [{}, {"exit_threshold": 0.6}, {"use_weighted_exit": True}, {"exit_at_step": 1}])
@torch.no_grad()
def test_logits_to_keep_cuts_before_the_head(model: OuroForCausalLM, arguments: dict[str, Any]) -> None:
    whole, shapes = model(IDS, **arguments), count_calls(model.lm_head)
    for keep, places in ((1, [10]), (4, [7, 8, 9, 10]), (torch.tensor([0, 3, 9]), [0, 3, 9])):
        shapes.clear()
        output = model(IDS, logits_to_keep=keep, **arguments)
        close(output.logits, whole.logits[:, places])
        assert shapes == [(2, len(places), 32)]
        if whole.exit_depths is not None:
            kept = output.exit_depths if model.config.num_coda_layers == 0 else output.exit_depths[:, places]
            assert torch.equal(kept, whole.exit_depths[:, places])


@pytest.mark.parametrize(
    ("rule", "extra"),
    [
        (None, 0),
        (FixedDepth(2), 0),
        (QExit(0.6), 0),
        (StateDifference(3.0), 0),
        (SampledExit(1), 0),
        (Confidence("entropy", 1e-6), 2),  # never: loops 1 and 2 are read; at the last one nothing is left to decide
        (Confidence("kl", 1e-9), 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_head_is_called_once_with_one_state_a_position(rule: ExitRule | None, extra: int) -> None:
    model = tiny_model()
    shapes = count_calls(model.lm_head)
    output = model(IDS, exit_rule=rule)
    assert shapes == [(22, 32)] * extra + [(2, 11, 32)]
    if rule is not None:
        reads = torch.stack([model(IDS, exit_at_step=loop).logits for loop in range(3)])
        index = (output.exit_depths - 1)[None, ..., None].expand(1, -1, -1, 64)
        close(output.logits, reads.gather(0, index)[0])


@torch.no_grad()
def test_confidence_rules_look_only_at_positions_still_looping() -> None:
    model = tiny_model()
    shapes = count_calls(model.lm_head)
    output = model(IDS, exit_rule=Confidence("max_probability", 0.3))
    left = int((output.exit_depths > 1).sum())
    assert 0 < left < 22 and shapes[:2] == [(22, 32), (left, 32)]


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 11, 32).double()},
            "exactly one of input_ids and inputs_embeds",
        ),
        ({"input_ids": IDS[:, :0]}, r"the input has shape \(2, 0\)"),
        ({"input_ids": IDS[:0]}, r"the input has shape \(0, 11\)"),
        ({"input_ids": tokens(1, 129)}, "129 positions, but max_position_embeddings is 128"),
    ],
)
def test_bad_inputs(arguments: dict[str, Any], message: str) -> None:
    for callee in (tiny_model(), tiny_model().model):
        with pytest.raises(ValueError, match=message):
            callee(**arguments)


@torch.no_grad()
def test_the_context_may_be_filled_to_the_brim() -> None:
    model = tiny_model(max_position_embeddings=8)
    cache = LoopCache(model.config)
    model(IDS[:, :7], past_key_values=cache)
    close(model(IDS[:, 7:8], past_key_values=cache).logits, model(IDS[:, :8]).logits[:, -1:])
    with pytest.raises(ValueError, match="9 positions, but max_position_embeddings is 8"):
        model(IDS[:, 8:9], past_key_values=cache)

"""`generate` at full depth, what transformers' generation can do besides, and what it refuses."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import FULL, LOOPS, PROMPTS, STEPS, close, left_padded, limited, q_exit
from oracle import Look, sweep
from tiny import VARIANTS, tiny_config, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from looplm.exits import FixedDepth, QExit, SampledExit
from looplm.model.cache import LoopCache
from looplm.model.modeling import OuroForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:running . loops")


# --- full depth ---


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("loops", [1, 3, 4])
@torch.no_grad()
def test_full_depth_is_greedy_from_scratch(name: str, loops: int) -> None:
    model = tiny_model(**VARIANTS[name])
    result = model.generate(**left_padded(PROMPTS), **FULL, adaptive_loop=False, num_loop_steps=loops)
    for b, prompt in enumerate(PROMPTS):
        ids = prompt
        for step in range(STEPS):
            logits = model(ids[None], num_loop_steps=loops).logits[0, -1]
            close(result.logits[step][b], logits)
            ids = torch.cat([ids, logits.argmax()[None]])
        assert torch.equal(result.sequences[b, -STEPS:], ids[-STEPS:])
    assert result.exit_depths.shape == (3, STEPS) and (result.exit_depths == loops).all()
    uncached = model.generate(
        **left_padded(PROMPTS), **FULL, adaptive_loop=False, num_loop_steps=loops, use_cache=False
    )
    assert torch.equal(uncached.sequences, result.sequences) and torch.equal(uncached.exit_depths, result.exit_depths)


def test_max_loops_is_the_full_depth() -> None:
    model = tiny_model()
    two = model.generate(PROMPTS[0][None], **FULL, num_loop_steps=2)
    assert torch.equal(model.generate(PROMPTS[0][None], **FULL, max_loops=2).sequences, two.sequences)
    assert (two.exit_depths == 2).all()


def test_the_plain_call_returns_a_tensor() -> None:
    model = tiny_model()
    settings = {"max_new_tokens": STEPS, "do_sample": False}
    assert torch.equal(model.generate(PROMPTS[0][None], **settings), model.generate(PROMPTS[0][None], **FULL).sequences)


# --- what transformers' generate can do besides ---


def test_a_prompt_may_be_prefilled_in_chunks() -> None:
    model = tiny_model()
    whole = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6)
    for size in (2, 5):  # 5 leaves a chunk of a single token, which is no new token
        chunked = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6, prefill_chunk_size=size)
        assert torch.equal(chunked.sequences, whole.sequences)
        assert torch.equal(chunked.exit_depths, whole.exit_depths)


def test_a_second_turn_on_the_same_cache() -> None:
    """Positions keep the depth they were generated at; the new prompt runs at full depth."""
    model, cache = tiny_model(), LoopCache(tiny_config())
    first = model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, past_key_values=cache)
    conversation = torch.cat([first.sequences, PROMPTS[1][None]], dim=1)
    second = model.generate(conversation, **FULL, exit_threshold=0.6, past_key_values=cache)
    generated = [*range(6, 6 + STEPS - 1), *range(conversation.shape[1], 100)]  # the last token was not run yet
    stop = limited(q_exit(0.6))
    slow = sweep(model, second.sequences[0].tolist(), lambda look: look.position in generated and stop(look), LOOPS)
    at = slice(conversation.shape[1] - 1, -1)
    close(torch.stack(second.logits)[:, 0], torch.stack(slow.logits[at]))
    assert second.exit_depths[0].tolist() == slow.depths[at]
    assert set(slow.depths[6 : 6 + STEPS - 1]) != {LOOPS}


def test_a_second_turn_given_as_new_tokens_only() -> None:
    """With an attention mask of the whole conversation, transformers takes the new tokens alone."""
    model, caches = tiny_model(), [LoopCache(tiny_config()) for _ in range(2)]
    for cache in caches:
        first = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6, past_key_values=cache)
    new = torch.cat([first.sequences[:, -1:], tokens(2, 3, seed=5)], dim=1)
    mask = torch.nn.functional.pad(left_padded(PROMPTS[:2])["attention_mask"], (0, STEPS + 3), value=1)
    whole = torch.cat([first.sequences, new[:, 1:]], dim=1)
    results = [
        model.generate(ids, attention_mask=mask, **FULL, exit_threshold=0.6, past_key_values=cache)
        for ids, cache in zip((whole, new), caches, strict=True)
    ]
    assert torch.equal(results[0].sequences[:, -STEPS:], results[1].sequences[:, -STEPS:])
    for name in ("exit_depths", "position_depths"):
        assert torch.equal(results[0][name], results[1][name])
    assert (results[0].exit_depths[:, 0] == LOOPS).all() and (results[0].exit_depths < LOOPS).any()


def test_a_cache_must_be_a_beginning_of_the_prompt() -> None:
    model, cache = tiny_model(), LoopCache(tiny_config())
    first = model.generate(PROMPTS[0][None], **FULL, past_key_values=cache)
    for text in (first.sequences[:, :-1], PROMPTS[0][None]):
        with pytest.raises(
            ValueError, match=rf"holds 11 positions, but the prompt has {text.shape[1]}; pass the whole"
        ):
            model.generate(text, **FULL, past_key_values=cache)


def test_a_second_turn_after_rows_that_ended() -> None:
    """Positions after a row's end were never run: they may be masked, not attended to."""
    model = tiny_model()
    free = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6)
    end, cache = int(free.sequences[1, 8]), LoopCache(tiny_config())
    settings = {**FULL, "exit_threshold": 0.6, "eos_token_id": end}
    first = model.generate(**left_padded(PROMPTS[:2]), **settings, past_key_values=cache)
    ran = first.position_depths > 0
    assert not ran[1, 6:].all()
    text = torch.cat([first.sequences, tokens(2, 3, seed=5)], dim=1)
    mask = torch.nn.functional.pad(left_padded(PROMPTS[:2])["attention_mask"], (0, text.shape[1] - 6), value=1)
    with pytest.raises(ValueError, match=r"has nothing at position 8 of row 1, which had ended; put 0 there in"):
        model.generate(text, attention_mask=mask, **settings, past_key_values=cache)
    mask[:, : ran.shape[1]] &= ran
    result = model.generate(text, attention_mask=mask, **settings, past_key_values=cache)
    alone = text[1, mask[1].bool()]  # what row 1 sees, as a text of its own, with the depths that it has
    depths = result.position_depths[1, : mask.shape[1]][mask[1].bool()].tolist()
    slow = sweep(model, alone.tolist(), lambda look: look.loop >= depths[look.position], LOOPS)
    close(result.logits[0][1], slow.logits[-1])


def test_logits_processors() -> None:
    """They act on the logits of the exit; depths and logits belong to the text that they made."""
    model = tiny_model()
    plain = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    settings = {"bad_words_ids": [[int(plain.sequences[0, 7])]], "repetition_penalty": 1.5, "output_scores": True}
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6, **settings)
    assert not torch.equal(result.sequences, plain.sequences)
    assert torch.equal(torch.stack(result.scores, 1).argmax(-1), result.sequences[:, -STEPS:])
    check_text(model, result, q_exit(0.6))


@torch.no_grad()
def check_text(model: OuroForCausalLM, result: Any, criterion: Callable[[Look, int], bool]) -> None:
    """Depths and logits of a text, whoever chose its tokens."""
    for b, prompt in enumerate(PROMPTS):
        ids, start = result.sequences[b, 6 - len(prompt) : -1].tolist(), len(prompt)
        stop = limited(criterion)
        slow = sweep(model, ids, lambda look, s=start, stop=stop: look.position >= s and stop(look), LOOPS)
        close(torch.stack(result.logits, 1)[b], torch.stack(slow.logits[start - 1 :]))
        assert result.exit_depths[b].tolist() == slow.depths[start - 1 :]


@pytest.mark.parametrize("adaptive", [False, True])
def test_without_a_prompt_it_starts_from_bos(adaptive: bool) -> None:
    model = tiny_model()
    threshold = {"exit_rule": FixedDepth(1)} if adaptive else {}
    result = model.generate(**FULL, **threshold)
    explicit = model.generate(torch.tensor([[1]]), **FULL, **threshold)
    assert torch.equal(result.sequences, explicit.sequences)
    assert torch.equal(result.exit_depths, explicit.exit_depths) and result.exit_depths[0].tolist() == (
        [LOOPS] + [1 if adaptive else LOOPS] * (STEPS - 1)
    )


def test_embeddings_as_prompt() -> None:
    model = tiny_model()
    ids = model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6)
    embedded = model.generate(inputs_embeds=model.model.embed_tokens(PROMPTS[0][None]), **FULL, exit_threshold=0.6)
    assert torch.equal(embedded.sequences, ids.sequences[:, 6:])
    assert torch.equal(embedded.exit_depths, ids.exit_depths)


def test_sampling_with_a_seed_is_reproducible() -> None:
    model, results = tiny_model(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        settings = {**FULL, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
        results.append(model.generate(**left_padded(PROMPTS), **settings, exit_rule=SampledExit(5)))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].exit_depths, results[1].exit_depths)
    assert not torch.equal(results[0].sequences, results[2].sequences)
    assert results[0].exit_depths.shape == (6, STEPS)


@torch.no_grad()
def test_recorded_depths_replay_a_sampled_text() -> None:
    """Whatever was sampled, the oracle at the recorded depths gives the logits that were sampled from."""
    model = tiny_model()
    torch.manual_seed(0)
    result = model.generate(PROMPTS[1][None], **{**FULL, "do_sample": True}, exit_rule=SampledExit(5))
    depths = [LOOPS] * 4 + result.exit_depths[0, 1:].tolist()
    slow = sweep(model, result.sequences[0, :-1].tolist(), lambda look: look.loop >= depths[look.position], LOOPS)
    close(torch.stack(result.logits)[:, 0], torch.stack(slow.logits[3:]))


def test_streamer() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    result = tiny_model().generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, streamer=streamer)
    assert streamer.pieces == result.sequences[0].tolist() and streamer.ended


def test_beam_search_at_full_depth() -> None:
    model, prompts = tiny_model(), tokens(8, 3, seed=1)
    beams = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    results = [model.generate(prompts, **FULL, **beams, use_cache=cached) for cached in (True, False)]
    assert torch.equal(results[0].sequences, results[1].sequences)
    close(results[0].sequences_scores, results[1].sequences_scores)
    greedy = model.generate(prompts, **FULL)
    assert not torch.equal(results[0].sequences[::2], greedy.sequences)
    assert results[0].exit_depths.shape == (16, STEPS) and (results[0].exit_depths == LOOPS).all()


@pytest.mark.parametrize("draft", ["itself", "another", "shallow", "lookup"])
def test_assisted_generation_at_full_depth(draft: str) -> None:
    model, calls = tiny_model(), []
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    greedy = model.generate(PROMPTS[0][None], **settings)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assistants = {"itself": tiny_model(), "another": tiny_model(seed=1), "shallow": tiny_model()}
    assistants["shallow"].config.early_exit_threshold = 0.3
    helped = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": assistants[draft]}
    drafted = model.generate(PROMPTS[0][None], **settings, **helped)
    assert torch.equal(greedy.sequences, drafted.sequences)
    assert drafted.exit_depths.shape == (1, 12) and (drafted.exit_depths == LOOPS).all()
    assert draft != "itself" or len(calls) < 12


@torch.no_grad()
def test_the_released_exits_work_in_generate() -> None:
    """`exit_at_step` and `use_weighted_exit` select a state after all loops have run."""
    model = tiny_model()
    for arguments in ({"exit_at_step": 0}, {"use_weighted_exit": True}):
        result = model.generate(PROMPTS[0][None], **FULL, **arguments)
        ids = PROMPTS[0][None]
        for step in range(STEPS):
            logits = model(ids, **arguments).logits[:, -1]
            close(result.logits[step], logits)
            ids = torch.cat([ids, logits.argmax(-1)[None]], dim=1)
        assert torch.equal(result.sequences, ids)
    assert "exit_depths" not in result  # a mixture has none


# --- refusals ---


def assistant() -> OuroForCausalLM:
    return tiny_model(seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adaptive_loop": False, "exit_threshold": 0.5}, "adaptive_loop is False, but exit_threshold is given"),
        ({"adaptive_loop": False, "exit_rule": QExit(0.5)}, "adaptive_loop is False, but exit_rule is given"),
        ({"exit_threshold": 0.5, "exit_rule": QExit(0.5)}, "exit_threshold and exit_rule are both given"),
        ({"exit_threshold": 0.0}, "exit_threshold is 0.0"),
        ({"exit_threshold": torch.tensor([0.5, 0.5])}, "has 2 values; the batch has 1 rows"),
        ({"min_loops": 4}, r"min_loops is 4; it must lie in 1\.\.max_loops = 3"),
        ({"min_loops": 0}, "min_loops is 0"),
        ({"num_loop_steps": 0}, r"max_loops \(or num_loop_steps\) is 0; it must be at least 1"),
        ({"exit_threshold": 0.5, "use_cache": False}, "use_cache is False: early exit and KV policies need the cache"),
        ({"exit_threshold": 0.5, "num_beams": 2}, "run at full depth"),
        ({"exit_threshold": 0.5, "generation_config": GenerationConfig(num_beams=2)}, "run at full depth"),
        ({"exit_threshold": 0.5, "prompt_lookup_num_tokens": 2}, "run at full depth"),
        ({"exit_threshold": 0.5, "assistant_model": assistant}, "run at full depth"),
        ({"exit_threshold": 0.5, "exit_at_step": 1}, "exit_at_step"),
        ({"exit_threshold": 0.5, "use_weighted_exit": True}, "use_weighted_exit"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation is 'offloaded'"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"past_key_values": StaticCache(tiny_config(), max_cache_len=32)}, "past_key_values is a StaticCache"),
        ({"past_key_values": LoopCache(tiny_config(num_hidden_layers=3))}, r"holds layers \(0, 3, 0\)"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    arguments = {k: v() if v is assistant else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model().generate(PROMPTS[0][None], max_new_tokens=3, **arguments)
    assert "\n" not in str(caught.value)


def test_beams_of_the_models_own_generation_config_are_refused_too() -> None:
    model = tiny_model()
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="run at full depth"):
        model.generate(PROMPTS[0][None], max_new_tokens=3, exit_threshold=0.5)


def test_pooled_gates_cannot_decode_adaptively() -> None:
    model = tiny_model(exit_gate_pooling="causal_mean")
    for arguments in ({"exit_threshold": 0.5}, {"adaptive_loop": True}, {"exit_rule": FixedDepth(1)}):
        with pytest.raises(ValueError, match="exit_gate_pooling is 'causal_mean'"):
            model.generate(PROMPTS[0][None], max_new_tokens=3, **arguments)


def test_empty_and_endless_prompts() -> None:
    model = tiny_model(max_position_embeddings=8)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)
    with pytest.raises(ValueError, match="9 positions, but max_position_embeddings is 8"):
        model.generate(tokens(1, 9), max_new_tokens=3)


def test_more_loops_than_trained_warn_once() -> None:
    model = tiny_model(total_ut_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = model.generate(PROMPTS[0][None], **FULL, num_loop_steps=5)
    assert (result.exit_depths == 5).all()
    messages = [str(warning.message) for warning in caught if "loops" in str(warning.message)]
    assert len(messages) == 1 and messages[0].startswith("running 5 loops, but the model was trained with 2: ")


def test_generation_leaves_the_configuration_alone() -> None:
    model = tiny_model()
    before = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))
    model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, min_loops=2)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before

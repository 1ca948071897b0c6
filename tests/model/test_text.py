"""Text with depths: pieces that join to the text, one depth each, and continuations that are `generate`'s own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from looplm.data.tokenizers import train_bpe
from looplm.exits import FixedDepth, QExit
from looplm.model.modeling import OuroForCausalLM
from looplm.model.text import DepthText, continue_text, decode_pieces

TOKENIZER = train_bpe(["the loop goes round and round, and the gate opens at loop four. " * 3, "naïve ☃"], 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = OuroForCausalLM(tiny_config(vocab_size=len(TOKENIZER), max_position_embeddings=48)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # the gate and the read-out differ from token to token
    return model


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_mean_depth_by_hand():
    assert DepthText("p", [("a", 1), ("b", 4), ("c", 4)]).mean_depth == 3.0
    assert DepthText("p", []).mean_depth == 0.0


def test_special_tokens_and_ended_positions_are_left_out():
    a, b = encode("the loop")[0], encode("x")[0]
    assert decode_pieces(TOKENIZER, [a, 1, b, 0, a, a], [3, 2, 1, 2, 0, 0]) == [(TOKENIZER.decode([a]), 3), ("x", 1)]
    assert decode_pieces(TOKENIZER, [], []) == []


def test_a_character_of_several_tokens_is_shown_with_the_last():
    ids = encode("a🦊b")
    assert len(ids) == 6  # the fox is four bytes that were never merged
    assert decode_pieces(TOKENIZER, ids, [1, 2, 3, 4, 3, 2]) == [
        ("a", 1),
        ("", 2),
        ("", 3),
        ("", 4),
        ("🦊", 3),
        ("b", 2),
    ]


def test_a_character_cut_off_at_the_end_is_marked():
    assert decode_pieces(TOKENIZER, encode("a🦊")[:3], [1, 1, 2]) == [("a", 1), ("", 1), ("�", 2)]


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text):
    ids = encode(text)
    pieces = decode_pieces(TOKENIZER, ids, [1] * len(ids))
    assert len(pieces) == len(ids) and "".join(piece for piece, _ in pieces) == TOKENIZER.decode(ids)


@given(st.lists(st.integers(3, 299), max_size=30))
def test_pieces_join_to_what_any_tokens_decode_to(ids):
    pieces = decode_pieces(TOKENIZER, ids, [1] * len(ids))
    assert "".join(piece for piece, _ in pieces) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("rule", [None, QExit(0.5), FixedDepth(2)])
def test_greedy_text_is_that_of_generate(model, rule):
    ids = torch.tensor([encode("the loop")])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        exit_rule=rule,
        adaptive_loop=rule is not None,
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
    )
    text = continue_text(model, TOKENIZER, "the loop", max_new_tokens=12, exit_rule=rule, temperature=0)
    new = result.sequences[0, ids.shape[1] :].tolist()
    assert text.prompt == "the loop"
    assert text.tokens == decode_pieces(TOKENIZER, new, result.exit_depths[0].tolist())


def test_depths_follow_the_rule(model):
    def depths(**options):
        return [
            depth
            for _, depth in continue_text(
                model, TOKENIZER, "the gate opens", max_new_tokens=10, temperature=0, **options
            ).tokens
        ]

    assert set(depths()) == {3} == set(depths(exit_rule=QExit(1.0)))  # all loops
    assert set(depths(num_loop_steps=1)) == {1} and set(depths(num_loop_steps=2)) == {2}
    first, *others = depths(exit_rule=FixedDepth(1))  # the prompt runs to full depth, and the first token reads it
    assert first == 3 and set(others) == {1}
    assert 1 < sum(depths(exit_rule=QExit(0.5))) / len(depths(exit_rule=QExit(0.5))) < 3


def test_sampling_is_seeded(model):
    def sample(seed):
        return continue_text(model, TOKENIZER, "and", max_new_tokens=12, temperature=1.0, top_p=0.95, seed=seed).tokens

    assert sample(1) == sample(1) and len({str(sample(seed)) for seed in range(4)}) > 1


def test_a_narrow_nucleus_is_greedy(model):
    narrow = continue_text(model, TOKENIZER, "and", max_new_tokens=8, temperature=1.0, top_p=1e-6)
    assert narrow.tokens == continue_text(model, TOKENIZER, "and", max_new_tokens=8, temperature=0).tokens


def test_the_callers_generator_is_seeded_only_through_the_seed(model):
    torch.manual_seed(99)
    first = continue_text(model, TOKENIZER, "and", max_new_tokens=5, seed=7)
    torch.manual_seed(100)
    assert continue_text(model, TOKENIZER, "and", max_new_tokens=5, seed=7) == first


def test_the_context_may_be_filled_but_not_passed(model):
    room = 48 - len(encode("the loop"))
    assert continue_text(model, TOKENIZER, "the loop", max_new_tokens=room, temperature=0).prompt == "the loop"
    with pytest.raises(ValueError, match=r"and \d+ are to come, but the context holds 48; shorten the prompt"):
        continue_text(model, TOKENIZER, "the loop", max_new_tokens=room + 1)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty; give some text"):
        continue_text(model, TOKENIZER, "", max_new_tokens=4)


def test_a_pooled_gate_generates_at_full_depth_only():
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(TOKENIZER), exit_gate_pooling="causal_mean")
    pooled = OuroForCausalLM(config).eval()
    text = continue_text(pooled, TOKENIZER, "the", max_new_tokens=4, temperature=0)
    assert [depth for _, depth in text.tokens] == [3] * len(text.tokens)
    with pytest.raises(ValueError, match="causal_mean"):
        continue_text(pooled, TOKENIZER, "the", max_new_tokens=4, exit_rule=QExit(0.5))

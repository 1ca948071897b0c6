"""Loss by loop on a text, against one plain forward pass a token, whatever the windows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model

from looplm.data.tokenizers import train_bpe
from looplm.model import measuring
from looplm.model.measuring import encode_text, measure_text

TEXT = "the loop goes round and the text goes on, <|im_end|> 12 times or more."
TOKENIZER = train_bpe([TEXT * 3], 280)


def model_of(seed=0, **fields):
    return tiny_model(seed, vocab_size=len(TOKENIZER), **fields)


@torch.no_grad()
def slow(model, ids, window, loops):
    """One pass a predicted token: nats of each loop, and the mean exit distribution by the products of equation 3."""
    nats, mass, trained = [0.0] * loops, [0.0] * model.config.total_ut_steps, model.config.total_ut_steps
    for target in range(1, len(ids)):
        seen = ids[(target - 1) // window * window : target][None]
        for loop in range(loops):
            logits = model(seen, num_loop_steps=max(loops, trained), exit_at_step=loop).logits[0, -1]
            nats[loop] -= float(logits.log_softmax(-1)[ids[target]])
        hazards = model(seen).gate_logits[0, -1].sigmoid().tolist()
        survival = 1.0
        for loop, hazard in enumerate(hazards):
            share = survival if loop == trained - 1 else survival * hazard
            mass[loop] += share
            survival -= share
    return [n / (len(ids) - 1) for n in nats], [m / (len(ids) - 1) for m in mass]


@pytest.mark.filterwarnings("ignore:running")
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_it_is_the_plain_loss_of_every_loop(fields, monkeypatch):
    monkeypatch.setattr(measuring, "WINDOW", 7)
    model = model_of(**fields)
    text = TEXT[-24:]
    measured = measure_text(model, TOKENIZER, text, 4)
    losses, mass = slow(model, encode_text(model, TOKENIZER, text), 7, 4)
    assert measured.losses == pytest.approx(losses, rel=1e-6)
    assert measured.exit_probabilities == pytest.approx(mass, rel=1e-5)
    assert measured.expected_depth == pytest.approx(mass[0] + 2 * mass[1] + 3 * mass[2], rel=1e-5)


@settings(deadline=None, max_examples=15)
@given(window=st.integers(6, 60), loops=st.integers(1, 5), seed=st.integers(0, 9))
def test_properties_for_any_window(window, loops, seed):
    seen = []
    model = model_of(seed, max_position_embeddings=window)
    measured = measure_text(model, TOKENIZER, TEXT, loops, seen.append)
    assert measured.tokens == len(encode_text(model, TOKENIZER, TEXT)) - 1
    assert len(measured.losses) == loops and all(loss > 0 for loss in measured.losses)
    assert sum(measured.exit_probabilities) == pytest.approx(1, abs=1e-6)
    assert 1 <= measured.expected_depth <= 3 + 1e-6
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) == -(-measured.tokens // window)


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary():
    model = model_of()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert measure_text(model, TOKENIZER, TEXT).losses == pytest.approx([math.log(len(TOKENIZER))] * 3)


def test_special_tokens_are_text():
    ids = encode_text(model_of(), TOKENIZER, TEXT)
    assert TOKENIZER.convert_tokens_to_ids("<|im_end|>") not in ids.tolist()
    assert TOKENIZER.decode(ids) == TEXT


@pytest.mark.parametrize(("text", "count"), [("", 0), ("t", 1)])
def test_too_little_text(text, count):
    with pytest.raises(ValueError, match=f"the text has {count} tokens; measuring takes at least 2"):
        measure_text(model_of(), TOKENIZER, text)


def test_a_tokenizer_of_another_model():
    with pytest.raises(ValueError, match="but the model's vocab_size is 64: it belongs to another model"):
        measure_text(tiny_model(), TOKENIZER, TEXT)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        measure_text(model_of().half(), TOKENIZER, TEXT)

"""Converting: tokens everywhere, another dtype, and weights that a dtype cannot hold."""

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig

from looplm.data.tokenizers import train_bpe
from looplm.model.conversion import convert

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def tokenizer():
    return train_bpe(["to convert is to change a little " * 4], 270)


def released():
    """Tokens as in the released config.json."""
    model = tiny_model(vocab_size=270, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    return model


def test_the_tokens_are_set_in_every_place(tokenizer):
    model = released()
    convert(model, tokenizer)
    for holder in (model.config, model.generation_config, tokenizer):
        assert {name: getattr(holder, name) for name in TOKENS} == TOKENS
    assert "enable_thinking" in tokenizer.chat_template


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_the_weights_are_rounded_once_and_otherwise_untouched(tokenizer, dtype):
    model, before = released(), released()
    convert(model, tokenizer, dtype)
    assert model.dtype == (dtype or torch.float64)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old.to(model.dtype))


def test_a_weight_beyond_the_range_of_fp16_is_named(tokenizer):
    model = released()
    with torch.no_grad():
        model.model.norm.weight[3] = -70000.0
    with pytest.raises(ValueError, match=r"weight model.norm.weight reaches 7e\+04, beyond what float16 holds"):
        convert(model, tokenizer, torch.float16)
    assert model.dtype == torch.float64
    convert(model, tokenizer, torch.bfloat16)
    assert model.dtype == torch.bfloat16

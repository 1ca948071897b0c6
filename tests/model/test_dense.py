"""Loading a dense model, and one line for every kind that cannot be made looped."""

import json
from pathlib import Path

import pytest
import torch
from small_dense import FAMILIES, small_config, small_dense
from small_gguf import small_llama, write_gguf
from transformers import GPT2Config, GPT2LMHeadModel

from looplm.data.tokenizers import train_bpe
from looplm.model.dense import check_dense, load_dense


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    train_bpe(["the union of states"], 259).save_pretrained(folder)
    return folder


def refused(source: object) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        load_dense(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_in_its_own_dtype(family: str, tmp_path: Path) -> None:
    dense = small_dense(family).to(torch.bfloat16)
    again, tokenizer = load_dense(str(save(dense, tmp_path / "m")))
    assert again.dtype == torch.bfloat16 and not again.training and len(tokenizer) == 259
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_gguf_file_loads(tmp_path: Path) -> None:
    dense, tokenizer = load_dense(str(write_gguf(tmp_path / "m.gguf", small_llama())))
    assert dense.config.model_type == "llama" and tokenizer.tokenize("1 2")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {}, "a 'gpt2' model cannot be retrofitted; supported are Llama (and SmolLM2), Mistral, Qwen2, Qwen3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "RoPE scaling 'linear' is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; 1.0 is supported",
        ),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32, within the context of 64; not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window is 16, within the context of 64"),
        ("llama", {"attention_bias": True}, "attention_bias is true; biases are supported on"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true; biases are supported on"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ],
)
def test_what_a_looped_model_could_not_reproduce(family: str, fields: dict, message: str, tmp_path: Path) -> None:
    config = GPT2Config() if family == "gpt2" else small_config(family, **fields)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (looked at below)
        check_dense(config)
    assert str(caught.value).startswith(message)
    config.save_pretrained(tmp_path)  # and it is refused before any weight is looked for
    assert refused(tmp_path).startswith(f"{tmp_path}: {message}")


@pytest.mark.parametrize("window", [64, 4096])
def test_a_window_as_long_as_the_context_is_none(window: int) -> None:
    check_dense(small_config("mistral", sliding_window=window))


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith(f"no such model: {tmp_path}/nowhere; give a folder")
    assert refused(tmp_path).startswith(f"{tmp_path} has no config.json that can be read")
    folder = tmp_path / "m"
    small_dense("llama").save_pretrained(folder)
    assert refused(folder).startswith(f"{folder}: no tokenizer at {folder}")
    save(small_dense("llama"), folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert refused(folder).startswith(f"{folder}: ")
    (folder / "config.json").write_text("{")
    assert refused(folder).startswith(f"{folder} has no config.json that can be read")


def test_missing_weights(tmp_path: Path) -> None:
    folder = save(small_dense("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    assert "9 weights are missing, such as model.layers.5." in refused(folder)


def test_a_dense_model_of_another_kind_entirely(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)).save_pretrained(tmp_path)
    assert refused(tmp_path).startswith(f"{tmp_path}: a 'gpt2' model cannot be retrofitted")

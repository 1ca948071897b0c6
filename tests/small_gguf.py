"""A tiny Llama written as a GGUF the way llama.cpp stores one, with a tokenizer whose merges are known."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ġ 1", "t h", "th e", "Ġ the", "1 2"]  # "Ġ1" and "12" are traps: digits stand alone
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


def small_llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """Four layers of width 32 over `TOKENS`, every parameter random, norms included."""
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "rms_norm_eps": 1e-5,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **fields}))
    return shake(model.eval(), seed)


def shake(model: Any, seed: int) -> Any:
    """Random parameters, large enough to see: norms around 1, everything else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kinds: dict[str, Kind] | None = None,
    drop: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
    values: dict[str, str | None] | None = None,
    merges: bool = True,
) -> Path:
    """Write the model.

    Args:
        kinds: quantisation of the matrices of these names (gguf's names without block number); F32 otherwise.
        drop: a tensor to leave out.
        extra: tensors that do not belong there.
        values: string fields to replace, or to leave out (None).
        merges: whether the tokenizer has its merges.
    """
    strings = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", **(values or {})}
    writer = gguf.GGUFWriter(path, strings.pop("general.architecture", "llama"))
    config = model.config
    for name, value in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    for name, value in strings.items():
        if value is not None:
            writer.add_string(name, value)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    if merges:
        writer.add_token_merges(MERGES)
    for role, token in {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    for name, tensor in stored(model).items():
        if name != drop:
            kind = (kinds or {}).get(name.split(".")[-2], Kind.F32)
            data = tensor if kind == Kind.F32 else gguf.quants.quantize(tensor, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names, query and key rows in its order; a tied head is not stored."""
    tensors = {}
    for name, value in model.state_dict().items():
        parts, array = name.removeprefix("model.").removesuffix(".weight").split("."), value.numpy().copy()
        if parts[0] == "lm_head" and model.config.tie_word_embeddings:
            continue
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        short = NAMES[".".join(parts[2:] if block else parts)]
        if short in ("attn_q", "attn_k"):
            array = neighbouring_pairs(array, model.config.head_dim)
        tensors[f"{block}{short}.weight"] = array
    return tensors


def neighbouring_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Row i of a head's first half goes to its row 2 i, row i of the second half to 2 i + 1."""
    output, half = np.empty_like(rows), head_dim // 2
    for start in range(0, len(rows), head_dim):
        for i in range(half):
            output[start + 2 * i] = rows[start + i]
            output[start + 2 * i + 1] = rows[start + half + i]
    return output

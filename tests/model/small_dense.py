"""Tiny random dense models of every supported architecture."""

from typing import Any

from small_gguf import shake
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}


def small_config(family: str, **fields: Any) -> Any:
    """Five layers of width 32, 4 heads over 2."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
    }
    return AutoConfig.for_model(family, **{**settings, **FAMILIES.get(family, {}), **fields})


def small_dense(family: str, seed: int = 0, **fields: Any) -> Any:
    """An fp32 model in evaluation mode whose every parameter is random, biases and norms included."""
    return shake(AutoModelForCausalLM.from_config(small_config(family, **fields)).eval(), seed)

"""Tiny looped models with weights large enough that loops, gates and positions differ visibly."""

from typing import Any

import torch
from torch import Tensor

from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "prelude-coda": {"num_prelude_layers": 1, "num_coda_layers": 1},
    "no-sandwich": {"sandwich_norm": False, "loop_norm": False},
    "retrofit": {
        "num_key_value_heads": 2,
        "num_prelude_layers": 1,
        "num_coda_layers": 2,
        "sandwich_norm": False,
        "loop_norm": False,
        "qkv_bias": True,
        "qk_norm": True,
    },
    "injection": {"input_injection": "add"},
    "causal-mean": {"exit_gate_pooling": "causal_mean"},
    "all": {
        "num_key_value_heads": 1,
        "head_dim": 10,
        "tie_word_embeddings": True,
        "num_prelude_layers": 2,
        "num_coda_layers": 1,
        "sandwich_norm": False,
        "input_injection": "add",
        "exit_gate_pooling": "causal_mean",
    },
}


def tiny_config(**overrides: Any) -> OuroConfig:
    """Two layers of width 32, 64 tokens, three loops."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "total_ut_steps": 3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return OuroConfig(**{**settings, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> OuroForCausalLM:
    """A model in eval mode and fp64 whose every parameter is random, norms and gate included.

    In fp64 two ways of computing the same thing agree to 1e-9, so that a tolerance hides nothing.
    """
    model = OuroForCausalLM(tiny_config(**overrides)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
        model.model.early_exit_gate.bias.fill_(-0.5)
    return model


def tokens(*shape: int, seed: int = 0, vocab_size: int = 64) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))

"""The released config.json loads, survives a round trip, and means exactly the released model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM

RELEASED: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModel": "modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "bos_token_id": 0,
    "early_exit_threshold": 1.0,
    "eos_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": ["full_attention"] * 24,
    "max_position_embeddings": 65536,
    "max_window_layers": 24,
    "model_type": "ouro",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "total_ut_steps": 4,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 49152,
}
ADDED: dict[str, Any] = {
    "num_prelude_layers": 1,
    "num_coda_layers": 2,
    "sandwich_norm": False,
    "loop_norm": False,
    "qkv_bias": True,
    "qk_norm": True,
    "input_injection": "add",
    "exit_gate_pooling": "causal_mean",
    "exit_beta": 0.1,
    "exit_prior": 0.25,
}


@pytest.fixture
def released(tmp_path: Path) -> OuroConfig:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    return OuroConfig.from_pretrained(tmp_path)


def test_a_released_file_loads(released: OuroConfig) -> None:
    for name, value in RELEASED.items():
        if name not in ("auto_map", "torch_dtype", "transformers_version", "rope_scaling"):
            assert getattr(released, name) == value, name
    assert released.dtype == torch.bfloat16 and not hasattr(released, "auto_map")
    assert (released.num_prelude_layers, released.num_coda_layers, released.sandwich_norm) == (0, 0, True)
    assert (released.loop_norm, released.qkv_bias, released.qk_norm) == (True, False, False)
    assert (released.input_injection, released.exit_gate_pooling) == ("none", "token")


def test_round_trip_keeps_everything_but_the_remote_code(released: OuroConfig, tmp_path: Path) -> None:
    released.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for name, value in RELEASED.items():
        if name not in ("auto_map", "transformers_version", "rope_scaling"):
            assert written[name] == value, name
    assert "auto_map" not in written and written["rope_parameters"]["rope_theta"] == 1e6
    assert OuroConfig.from_pretrained(tmp_path / "again").to_dict() == released.to_dict()


def test_round_trip_of_the_added_fields(tmp_path: Path) -> None:
    config = tiny_config(**ADDED, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 4e4})
    config.save_pretrained(tmp_path)
    again = OuroConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in ADDED} == ADDED
    assert again.rope_theta == 4e4 and again.to_dict() == config.to_dict()


def test_derived_fields() -> None:
    config = OuroConfig(hidden_size=64, num_attention_heads=4)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    assert OuroConfig().num_key_value_heads == 16 and OuroConfig(rope_theta=1e6).rope_theta == 1e6


@pytest.mark.parametrize(("layers", "count"), [(24, 1_434_652_673), (48, 2_667_974_657)])
def test_released_sizes_names_and_shapes(layers: int, count: int) -> None:
    config = OuroConfig(**{**RELEASED, "num_hidden_layers": layers, "layer_types": ["full_attention"] * layers})
    with torch.device("meta"):
        model = OuroForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count
    expected = {
        "model.embed_tokens.weight": (49152, 2048),
        "model.norm.weight": (2048,),
        "model.early_exit_gate.weight": (1, 2048),
        "model.early_exit_gate.bias": (1,),
        "lm_head.weight": (49152, 2048),
    }
    for n in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected[f"model.layers.{n}.self_attn.{name}.weight"] = (2048, 2048)
        expected[f"model.layers.{n}.mlp.gate_proj.weight"] = (5632, 2048)
        expected[f"model.layers.{n}.mlp.up_proj.weight"] = (5632, 2048)
        expected[f"model.layers.{n}.mlp.down_proj.weight"] = (2048, 5632)
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{n}.{name}.weight"] = expected[f"model.layers.{n}.{name}_2.weight"] = (2048,)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", "many"),
        ("hidden_size", -1),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", 7),
        ("total_ut_steps", 0),
        ("total_ut_steps", 2.5),
        ("num_prelude_layers", -1),
        ("num_coda_layers", -2),
        ("early_exit_threshold", 0.0),
        ("early_exit_threshold", 1.01),
        ("input_injection", "concat"),
        ("exit_gate_pooling", "mean"),
        ("exit_beta", -0.1),
        ("exit_prior", "poisson"),
        ("exit_prior", 1.0),
        ("use_sliding_window", True),
        ("rope_theta", -1.0),
        ("pad_token_id", 64),
    ],
)
def test_bad_values_name_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        tiny_config(**{field: value})
    assert "\n" not in str(caught.value) and str(value) in str(caught.value)


def test_other_kinds_of_attention_and_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_types is .*sliding_attention.*; it must be full_attention"):
        tiny_config(layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="rope_type is 'linear'; it must be default"):
        tiny_config(rope_scaling={"rope_type": "linear", "factor": 2.0})

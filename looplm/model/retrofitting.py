"""Retrofit: a dense Llama-family model becomes prelude + looped core + coda, with every layer and weight kept.

With one loop the result computes what the dense model does, for any split of the layers. That fixes three choices:

- No sandwich norms, and no norm between the layers: a pre-norm model's residual stream runs through all of them as it
  is, so `loop_norm` is off. The next loop takes the stream up where the last one left it, and the coda too; the dense
  model's final norm stands before the head. (Normed after every loop, as Ouro is, the stream would be scaled down to
  unit size on its way into layers that never saw it so; docs/log.md has the losses of both.)
- The gate reads the state through an RMSNorm (gain 1, or the final norm where there is no coda), since a residual
  stream has no bounded size. It begins with weight 0 and bias -log(T - 1): a hazard of 1/T at every token.
- Nothing is random: a retrofit of the same model is the same model.

The core is chosen by hand, or by block influence: 1 - mean cosine of a layer's input and output states (ShortGPT's
measure of a layer, arXiv 2403.03853). The layers that turn the state least are the ones whose repetition disturbs it
least. The papers behind Ouro have no retrofit.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from looplm.model.configuration import OuroConfig
from looplm.model.dense import check_dense
from looplm.model.measuring import WINDOW
from looplm.model.modeling import OuroForCausalLM

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SAME_FIELDS = (
    "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps bos_token_id eos_token_id pad_token_id "
    "tie_word_embeddings attention_dropout"
).split()


def retrofit(dense: PreTrainedModel, core: range, loops: int) -> OuroForCausalLM:
    """A looped model with copies of the dense model's weights, of its dtype, in evaluation mode.

    Args:
        dense: a Llama, Mistral, Qwen2 or Qwen3 for causal language modelling.
        core: the layers that loop, counted from 0; those before are the prelude, those after the coda.
        loops: T of the new configuration.

    Raises:
        ValueError: an architecture or option that is not supported, a core outside the layers, fewer than one loop.
    """
    config = _configuration(dense.config, core, loops)
    weights = {_place(name, core): value for name, value in dense.state_dict().items()}
    if config.num_coda_layers:
        weights["model.coda_norm.weight"] = weights.pop("model.norm.weight")
    made: Any = OuroForCausalLM(config)  # its `to` is typed for a model alone
    looped: OuroForCausalLM = made.to(device=dense.device, dtype=dense.dtype)
    missing, unexpected = looped.load_state_dict(weights, strict=False)
    new = {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    if config.num_coda_layers:
        new.add("model.norm.weight")  # what the gate reads through; it keeps its gain of 1
    assert set(missing) == new and not unexpected, (missing, unexpected)  # `check_dense` knows the architectures
    with torch.no_grad():
        looped.model.early_exit_gate.weight.zero_()
        looped.model.early_exit_gate.bias.fill_(-math.log(loops - 1) if loops > 1 else 0.0)
    return looped.eval()


def check_core(core: range, num_layers: int) -> None:
    """Refuse a core that is not a run of a model's layers.

    Raises:
        ValueError: an empty core, or one outside the layers.
    """
    if not 0 <= core.start < core.stop <= num_layers or core.step != 1:
        raise ValueError(
            f"core {core.start}:{core.stop} does not lie in the model's layers 0:{num_layers} (counted from 0, the end "
            f"not included); give FIRST:END with 0 <= FIRST < END <= {num_layers}"
        )


@torch.no_grad()
def block_influence(dense: PreTrainedModel, ids: Tensor) -> list[float]:
    """1 - mean cosine of each layer's input and output states over all positions of a text, in [0, 2].

    Args:
        ids: token ids (S,) int64, at least one; read in windows of 512.
    """
    layers: Any = dense.get_submodule("model.layers")
    turned = torch.zeros(len(layers), dtype=torch.float64)

    def measure(index: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            turned[index] += (1 - cosine(inputs[0], output)).sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(index)) for index, layer in enumerate(layers)]
    try:
        for window in ids.split(min(WINDOW, dense.config.max_position_embeddings)):
            dense.get_submodule("model")(window[None].to(dense.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (turned / len(ids)).tolist()


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of states (..., D) in fp64, shape (...): in a lower precision 1 - cosine of near states is noise."""
    return torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)


def choose_core(influence: Sequence[float], size: int) -> range:
    """The run of `size` layers with the smallest sum of influence, the first of several equal ones.

    Raises:
        ValueError: a size outside 1..L.
    """
    if not 1 <= size <= len(influence):
        raise ValueError(f"a core of {size} layers cannot be chosen of {len(influence)}; give 1 to {len(influence)}")
    sums = [math.fsum(influence[first : first + size]) for first in range(len(influence) - size + 1)]
    first = sums.index(min(sums))
    return range(first, first + size)


def _configuration(dense: Any, core: range, loops: int) -> OuroConfig:
    check_dense(dense)
    check_core(core, dense.num_hidden_layers)
    fields = {name: getattr(dense, name) for name in _SAME_FIELDS if getattr(dense, name, None) is not None}
    return OuroConfig(
        **{"bos_token_id": None, "eos_token_id": None, **fields},
        rope_parameters=dict(dense.rope_parameters),
        num_prelude_layers=core.start,
        num_hidden_layers=len(core),
        num_coda_layers=dense.num_hidden_layers - core.stop,
        total_ut_steps=loops,
        sandwich_norm=False,
        loop_norm=False,
        qkv_bias=dense.model_type == "qwen2",
        qk_norm=dense.model_type == "qwen3",
    )


def _place(name: str, core: range) -> str:
    """Where a dense model's weight goes."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    index, rest = int(found[1]), found[2]
    if index < core.start:
        return f"model.prelude.{index}.{rest}"
    if index < core.stop:
        return f"model.layers.{index - core.start}.{rest}"
    return f"model.coda.{index - core.stop}.{rest}"

"""Released folders made right: the tokens and the template of ChatML, every key that readers look for, one dtype.

The released files name one token as beginning, end and padding, point to remote code, and have no chat template with
`enable_thinking`; the weights are taken as they are.
"""

import torch
from transformers import PreTrainedTokenizerBase

from looplm.data.chatml import CHAT_TOKEN_IDS, set_chatml
from looplm.model.modeling import OuroForCausalLM


def convert(model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None) -> None:
    """Set tokens and template of a model and its tokenizer, and the weights' dtype, in place.

    Args:
        dtype: the model's own by default.

    Raises:
        ValueError: a tokenizer of another layout, or a weight that `dtype` cannot hold.
    """
    set_chatml(tokenizer)
    for name, number in CHAT_TOKEN_IDS.items():
        setattr(model.config, name, number)
        if model.generation_config is not None:
            setattr(model.generation_config, name, number)
    if dtype is None or dtype == model.dtype:
        return
    largest = torch.finfo(dtype).max
    for name, weight in model.named_parameters():
        low, high = (float(end) for end in weight.detach().aminmax())
        if max(-low, high) > largest:
            raise ValueError(
                f"weight {name} reaches {max(-low, high):.4g}, beyond what {str(dtype).removeprefix('torch.')} holds "
                f"({largest:.4g}); use bf16"
            )
    torch.nn.Module.to(model, dtype)  # transformers' own `to` has no usable signature for type checkers

"""Text from a prompt with the depth of every token: what `looplm generate` and the demo's report show."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from looplm.model.modeling import OuroForCausalLM


@dataclass(frozen=True)
class DepthText:
    """A continuation as (text, depth) pieces; depths count from 1."""

    prompt: str
    tokens: list[tuple[str, int]]

    @property
    def mean_depth(self) -> float:
        """Mean depth of the new tokens, in loops."""
        return sum(depth for _, depth in self.tokens) / max(len(self.tokens), 1)


def continue_text(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    **depth: Any,
) -> DepthText:
    """Continue a prompt.

    Args:
        temperature: 0 is greedy.
        **depth: depth arguments of `OuroForCausalLM.generate`: `exit_threshold`, `depth_budget`, `kv_policy` ...

    Raises:
        ValueError: an empty prompt, one that leaves no room in the context, or depth arguments that do not fit.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty; give some text to continue")
    limit = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and {max_new_tokens} are to come, but the context holds {limit}; "
            "shorten the prompt or lower max-new-tokens"
        )
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    result = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        **depth,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        top_k=0 if temperature > 0 else None,
        **sampling,
    )
    new, depths = result.sequences[0, ids.shape[1] :].tolist(), result.exit_depths[0].tolist()
    return DepthText(prompt, decode_pieces(tokenizer, new, depths))


def decode_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], depths: list[int]) -> list[tuple[str, int]]:
    """Text and depth of each token; special tokens and ended positions (depth 0) are left out.

    A character that several byte-level tokens make up is shown with the last of them (as � where the text ends in it).
    """
    kept = [(i, d) for i, d in zip(ids, depths, strict=True) if d > 0 and i not in tokenizer.all_special_ids]
    pieces, shown = [], ""
    for count in range(1, len(kept) + 1):
        text = str(tokenizer.decode([i for i, _ in kept[:count]]))
        whole = text if count == len(kept) else text.removesuffix("�")
        pieces.append((whole[len(shown) :], kept[count - 1][1]))
        shown = whole
    return pieces

"""The loss of every loop, and where the gate would stop, on one text: what `upcycle` and `verify` print.

The text is cut into windows that share one token, so every token but the first is predicted once, from what its window
holds before it. No begin token is added: what a checkpoint calls its begin token must not change the number. (The
training's own evaluation reads whole validation sets; the exit distribution is that of the trained T there as here.)
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplm.exits import exit_probabilities
from looplm.model.modeling import OuroForCausalLM

WINDOW = 512
"""Tokens predicted in one pass, at most."""


@dataclass(frozen=True)
class TextMeasurement:
    """Means over the predicted tokens of a text.

    Attributes:
        tokens: how many were predicted.
        losses: nats a token after loops 1..n.
        exit_probabilities: mean p_t over the trained loops 1..T (equation 3).
    """

    tokens: int
    losses: list[float]
    exit_probabilities: list[float]

    @property
    def expected_depth(self) -> float:
        """Mean of sum_t t p_t, in loops."""
        return sum(loop * p for loop, p in enumerate(self.exit_probabilities, start=1))


@torch.no_grad()
def measure_text(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    loops: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> TextMeasurement:
    """Measure a model on a text.

    Args:
        loops: the losses of loops 1..`loops`; the trained number by default.
        progress: called with the share of the text that is done, in (0, 1], after each window.

    Raises:
        ValueError: fewer than two tokens, a tokenizer of another model, or a float16 model.
    """
    ids = encode_text(model, tokenizer, text)
    trained, targets = model.config.total_ut_steps, len(ids) - 1
    loops = trained if loops is None else loops
    window = min(WINDOW, model.config.max_position_embeddings)
    nats, mass = torch.zeros(loops, dtype=torch.float64), torch.zeros(trained, dtype=torch.float64)
    for first in range(0, targets, window):
        piece = ids[first : first + window + 1].to(model.device)
        with warnings.catch_warnings(action="ignore"):  # running beyond the trained depth may be the point
            out = model(
                piece[None, :-1], shift_labels=piece[None, 1:], num_loop_steps=max(loops, trained), skip_logits=True
            )
        nats += out.loop_losses[:loops].double().cpu() * (len(piece) - 1)
        mass += exit_probabilities(out.gate_logits[0, :, :trained]).double().sum(0).cpu()
        if progress is not None:
            progress(min((first + window) / targets, 1.0))
    return TextMeasurement(targets, (nats / targets).tolist(), (mass / targets).tolist())


def encode_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The tokens of a text, (S,) int64, special tokens read as the characters that they are written with.

    Raises:
        ValueError: fewer than two tokens, or tokens that the model does not have.
    """
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ids = torch.tensor(encoded, dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; measuring takes at least 2")
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {int(ids.max())}, but the model's vocab_size is {model.config.vocab_size}: "
            "it belongs to another model"
        )
    return ids

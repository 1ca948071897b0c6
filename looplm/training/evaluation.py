"""Loss at every depth from one pass: what a looped model knows after each loop, the trained T and beyond.

The losses of loops 1..n come from one run of n loops, chunked over the vocabulary product. The exit distribution is
that of the trained T (equation 3: the last of T loops takes the remaining mass), whatever n is.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from looplm.data.pipeline import Windows, validation_batches
from looplm.exits import exit_probabilities
from looplm.model.modeling import OuroForCausalLM


@dataclass(frozen=True)
class LoopEvaluation:
    """Means over the validation tokens.

    Attributes:
        losses: nats a token after loops 1..n.
        bits_per_character: the same in bits per character of text; None where only a part was read.
        exit_probabilities: mean p_t over loops 1..T.
        expected_depth: sum_t t p_t, in loops.
    """

    losses: list[float]
    bits_per_character: list[float] | None
    exit_probabilities: list[float]
    expected_depth: float


@torch.no_grad()
def evaluate_loops(
    model: OuroForCausalLM, windows: Windows, loops: int, batch_size: int, characters: int, limit: int | None = None
) -> LoopEvaluation:
    """Evaluate loops 1..`loops` on all windows, or on the first `limit` (rounded up to whole batches).

    Args:
        windows: made with `keep_remainder=True`, so that every text token is a target once.
        characters: of the whole text behind the windows.
    """
    trained, device = model.config.total_ut_steps, model.device
    nats, mass, tokens = torch.zeros(loops, dtype=torch.float64), torch.zeros(trained, dtype=torch.float64), 0
    was_training = model.training
    model.eval()
    for batch in validation_batches(windows, batch_size, None if limit is None else -(-limit // batch_size)):
        short = batch_size - len(batch["labels"])  # a smaller last batch would be compiled anew
        ids, places = (pad(batch[name], (0, 0, 0, short)).to(device) for name in ("input_ids", "position_ids"))
        labels = pad(batch["labels"], (0, 0, 0, short), value=-100).to(device)
        with warnings.catch_warnings(action="ignore"):  # running beyond the trained depth is the point here
            out = model(
                ids, position_ids=places, shift_labels=labels, num_loop_steps=max(loops, trained), skip_logits=True
            )
        valid = labels != -100
        count = int(valid.sum())
        nats += out.loop_losses[:loops].double().cpu() * count
        mass += exit_probabilities(out.gate_logits[..., :trained])[valid].double().sum(0).cpu()
        tokens += count
    model.train(was_training)
    losses, probabilities = (nats / tokens).tolist(), (mass / tokens).tolist()
    bits = None if limit is not None else (nats / math.log(2) / max(characters, 1)).tolist()
    return LoopEvaluation(losses, bits, probabilities, sum(t * p for t, p in enumerate(probabilities, start=1)))

"""Loss at every depth from one pass: what a looped model knows after each loop, the trained T and beyond.

The losses of loops 1..n come from one run of n loops, chunked over the vocabulary product. The exit distribution is
that of the trained T (equation 3: the last of T loops takes the remaining mass), whatever n is.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
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
        source_losses: nats a token after loops 1..n by source.
    """

    losses: list[float]
    bits_per_character: list[float] | None
    exit_probabilities: list[float]
    expected_depth: float
    source_losses: dict[str, list[float]]


@dataclass
class _Sums:
    """Nats (n,) and exit mass (T,) in fp64 over so many valid targets."""

    nats: Tensor
    mass: Tensor
    tokens: int = 0


@torch.no_grad()
def evaluate_loops(
    model: OuroForCausalLM, windows: Mapping[str, Windows], loops: int, batch_size: int, limit: int | None = None
) -> LoopEvaluation:
    """Evaluate loops 1..`loops` on all windows, or on about `limit` of them.

    Args:
        windows: by source, made with `keep_remainder=True`, so that every text token is a target once.
        limit: shared evenly by the sources, the first of each, rounded up to whole batches.
    """
    batches = None if limit is None else -(-limit // (batch_size * len(windows)))
    was_training = model.training
    model.eval()
    parts = {name: _sums(model, source, loops, batch_size, batches) for name, source in windows.items()}
    model.train(was_training)
    nats, mass = (torch.stack([getattr(part, name) for part in parts.values()]).sum(0) for name in ("nats", "mass"))
    tokens = sum(part.tokens for part in parts.values())
    characters = sum(source.corpus.characters for source in windows.values())
    bits = None if limit is not None else (nats / math.log(2) / max(characters, 1)).tolist()
    probabilities = (mass / tokens).tolist()
    return LoopEvaluation(
        losses=(nats / tokens).tolist(),
        bits_per_character=bits,
        exit_probabilities=probabilities,
        expected_depth=sum(t * p for t, p in enumerate(probabilities, start=1)),
        source_losses={name: (part.nats / max(part.tokens, 1)).tolist() for name, part in parts.items()},
    )


def _sums(model: OuroForCausalLM, windows: Windows, loops: int, batch_size: int, batches: int | None) -> _Sums:
    """The sums over one source's windows, or its first `batches` batches."""
    trained, device = model.config.total_ut_steps, model.device
    sums = _Sums(torch.zeros(loops, dtype=torch.float64), torch.zeros(trained, dtype=torch.float64))
    for batch in validation_batches(windows, batch_size, batches):
        short = batch_size - len(batch["labels"])  # a smaller last batch would be compiled anew
        ids, places = (pad(batch[name], (0, 0, 0, short)).to(device) for name in ("input_ids", "position_ids"))
        labels = pad(batch["labels"], (0, 0, 0, short), value=-100).to(device)
        with warnings.catch_warnings(action="ignore"):  # running beyond the trained depth is the point here
            out = model(
                ids, position_ids=places, shift_labels=labels, num_loop_steps=max(loops, trained), skip_logits=True
            )
        valid = labels != -100
        count = int(valid.sum())
        sums.nats += out.loop_losses[:loops].double().cpu() * count
        sums.mass += exit_probabilities(out.gate_logits[..., :trained])[valid].double().sum(0).cpu()
        sums.tokens += count
    return sums

"""The loss of every loop on any text: nats a token, perplexity, bits a byte (Ouro equation 2 read after loops 1..n).

The text is cut into windows of at most `window` tokens that begin `stride` tokens apart. Every token but the first is
scored once: in the first window that holds it, behind at least `window` - `stride` tokens (but at the beginning of the
text). A stride of `window` is the cheapest and scores the first tokens of each window behind little; a stride of 1
gives every token all the context there is, at `window` times the cost.

Bits a byte compare across tokenizers: summed nats / ln 2 / bytes of the scored text in UTF-8. Intervals are 95 %
percentile bootstrap intervals over windows, and all loops share the resamples, so that what a loop gains on the trained
last one is paired. Windows of one document are alike: over few documents the intervals are too narrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from looplm.evaluation.depths import Depth
from looplm.evaluation.scoring import Request, score
from looplm.evaluation.tables import Table
from looplm.model.measuring import encode_text
from looplm.model.modeling import OuroForCausalLM
from looplm.training.bootstrap import interval, resampled
from looplm.training.charts import frontier_chart

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class LoopPerplexity:
    """One loop, with 95 % intervals; the difference is to the last trained loop, on the same windows."""

    loop: int
    nats: float
    nats_interval: tuple[float, float]
    perplexity: float
    bits_per_byte: float
    bits_interval: tuple[float, float]
    above_trained: float
    above_interval: tuple[float, float]


@dataclass(frozen=True)
class Perplexity:
    """All loops, and how much was scored.

    Attributes:
        trained: loops of the training.
        windows, tokens, bytes: scored.
    """

    loops: list[LoopPerplexity]
    trained: int
    windows: int
    tokens: int
    bytes: int

    def table(self, name: str) -> Table:
        """A row a loop; a star marks those beyond the training."""
        header = ("loop", "nats a token", "perplexity", "bits a byte", "above the trained last loop")
        rows = [
            (
                f"{row.loop}{'*' * (row.loop > self.trained)}",
                _shown(row.nats, row.nats_interval, ".4f"),
                f"{row.perplexity:.2f}",
                _shown(row.bits_per_byte, row.bits_interval, ".4f"),
                _shown(row.above_trained, row.above_interval, "+.4f"),
            )
            for row in self.loops
        ]
        scored = (
            f"{self.tokens:,} tokens ({self.bytes:,} bytes) in {self.windows} windows; 95 % intervals over windows."
        )
        beyond = f" A star marks loops beyond the {self.trained} of training." if len(rows) > self.trained else ""
        return Table(f"perplexity by loop on {name}", header, tuple(rows), (scored + beyond,))

    def chart(self) -> str:
        """Nats a token against the loop."""
        points = [
            {"setting": row.loop, "loops": row.loop, "loss": row.nats, "loss_interval": row.nats_interval}
            for row in self.loops
        ]
        return frontier_chart({"every position after the same loop": points}, "loss", "nats a token", "loop")


def strided(ids: Sequence[int], window: int, stride: int) -> list[Request]:
    """Context and targets of every window; the targets together are all tokens but the first, in order.

    Args:
        window: tokens that a pass sees at most; stride: new targets of each window after the first.

    Raises:
        ValueError: a stride outside 1..window, or fewer than two tokens.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; it must lie in 1..{window}, the window")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; perplexity takes at least 2")
    found, scored, begin = [], 1, 0
    while scored < len(ids):
        end = min(begin + window + 1, len(ids))
        found.append((list(ids[begin:scored]), list(ids[scored:end])))
        scored, begin = end, begin + stride
    return found


def measure_perplexity(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    loops: Sequence[int],
    window: int,
    stride: int,
    batch_size: int,
    seed: int = 0,
    report: Callable[[float], None] | None = None,
) -> Perplexity:
    """Measure a text after each of `loops`.

    Raises:
        ValueError: a window beyond the context, a text of fewer than two windows, or what `encode_text` refuses.
    """
    context, trained = model.config.max_position_embeddings, model.config.total_ut_steps
    if not 1 <= window <= context:
        raise ValueError(f"window is {window}; it must lie in 1..{context}, the context of the model")
    ids = encode_text(model, tokenizer, text).tolist()
    requests = strided(ids, window, stride)
    asked = sorted({*loops, trained})
    scores = score(model, requests, [Depth(loop) for loop in asked], batch_size=batch_size, report=report)
    nats = -np.stack([scored.log_probabilities.double().sum(1).numpy() for scored in scores.requests], axis=1)
    lengths = token_bytes(tokenizer, text)
    ends = np.cumsum([1, *(len(target) for _, target in requests)])
    sizes = np.array([sum(lengths[a:b]) for a, b in pairwise(ends)], dtype=np.float64)
    tokens = np.array([len(target) for _, target in requests], dtype=np.float64)
    return summarise_perplexity(dict(zip(asked, nats, strict=True)), tokens, sizes, trained, seed, loops)


def token_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """How many bytes of the text each token ends, in UTF-8; they add up to those of the text up to the last token."""
    encoded: Any = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    before = np.cumsum([0, *(len(character.encode("utf-8", "surrogatepass")) for character in text)])
    reached = np.maximum.accumulate([before[end] for _, end in encoded["offset_mapping"]])
    return np.diff(reached, prepend=0).tolist()


def summarise_perplexity(
    nats: dict[int, Numbers], tokens: Numbers, sizes: Numbers, trained: int, seed: int, shown: Sequence[int]
) -> Perplexity:
    """The rows of the loops `shown` from what every window sums to.

    Args:
        nats: by loop (W,), the trained one among them; tokens, sizes: (W,) scored tokens and bytes.

    Raises:
        ValueError: fewer than two windows.
    """
    weights = resampled(len(tokens), seed)
    count, size = weights @ tokens, weights @ sizes
    drawn = {loop: weights @ summed for loop, summed in nats.items()}
    rows = []
    for loop in sorted(set(shown)):
        mean, bits = drawn[loop] / count, drawn[loop] / size / math.log(2)
        above = mean - drawn[trained] / count
        three = [(float(x[0]), interval(x[1:])) for x in (mean, bits, above)]
        (value, ends), (bit, bit_ends), (more, more_ends) = three
        rows.append(LoopPerplexity(loop, value, ends, math.exp(value), bit, bit_ends, more, more_ends))
    return Perplexity(rows, trained, len(tokens), int(tokens.sum()), int(sizes.sum()))


def _shown(value: float, ends: tuple[float, float], form: str) -> str:
    return f"{value:{form}} [{ends[0]:{form}}, {ends[1]:{form}}]"

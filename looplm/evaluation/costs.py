"""What a new token costs on this machine: a loop, the head, and the rest, measured one token at a time.

    time(depth, reads) = rest + depth x loop + reads x head

A loop is the slope of the time of a token over fixed depths 1 and T of the same `generate`; the head is the vocabulary
product by itself, once a token in both; the rest (sampling, bookkeeping, prelude, coda) is what is left. Medians of
turns, one of each by one. Times are this machine's: only their ratios are results.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig

from looplm.model.modeling import OuroForCausalLM

TURNS = 7
"""Of each measurement; the first is a warm-up."""

NEW_TOKENS = 16
"""A turn generates so many."""


@dataclass(frozen=True)
class TokenCosts:
    """Seconds of one loop, of one vocabulary product, and of the rest of a token; `loops` is T."""

    loop: float
    head: float
    rest: float
    loops: int

    def time(self, depth: float, reads: float) -> float:
        """Seconds of a token with so many loops and vocabulary products."""
        return self.rest + depth * self.loop + reads * self.head

    def saved(self, depth: float, reads: float) -> float:
        """Share of a full-depth token's time that is saved; negative where the rule costs more than it saves."""
        return 1 - self.time(depth, reads) / self.time(self.loops, 1)

    def shares(self) -> dict[str, float]:
        """Shares of a full-depth token's time: one loop, the head, the rest."""
        full = self.time(self.loops, 1)
        return {"loop": self.loop / full, "head": self.head / full, "rest": self.rest / full}


@torch.no_grad()
def measure_costs(model: OuroForCausalLM, prompt: list[int]) -> TokenCosts:
    """Measure behind a prompt, or as much of it as leaves room in the context.

    Raises:
        ValueError: a model of one loop.
    """
    loops = model.config.total_ut_steps
    if loops < 2:
        raise ValueError(f"the model has {loops} loop: there is nothing to save")
    room = max(model.config.max_position_embeddings - NEW_TOKENS - 1, 1)
    ids = torch.tensor([prompt[:room]], device=model.device)
    state = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    long, short = NEW_TOKENS + 1, 1

    def generate(depth: int, tokens: int) -> None:
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, num_loop_steps=depth,
            adaptive_loop=False,
        )  # fmt: skip

    def turn() -> tuple[float, float, float]:
        one, most = (_timed(partial(generate, d, long)) - _timed(partial(generate, d, short)) for d in (1, loops))
        return one / NEW_TOKENS, most / NEW_TOKENS, _timed(lambda: [model.lm_head(state) for _ in range(20)]) / 20

    turns = [turn() for _ in range(TURNS)][1:]
    one, most, head = (statistics.median(column) for column in zip(*turns, strict=True))
    loop = max(most - one, 0.0) / (loops - 1)
    return TokenCosts(loop, head, max(one - loop - head, 0.0), loops)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

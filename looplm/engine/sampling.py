"""What a request asks for (`SamplingParams`), and how its next token is drawn from logits.

The order is that of transformers: penalties, temperature, top-k, top-p, min-p. A draw is the inverse of the cumulative
distribution at a uniform number that depends on (seed, position) alone, so a request's tokens do not depend on what
else is in the batch, on preemption, or on the order of arrival. Loops are counted from 1, so loop 0 of the exit rules'
generator (`looplm.exits.keyed_uniform`) is free for it. Log-probabilities are those of the distribution that was drawn
from, after all of the above; greedy tokens have those of temperature 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from looplm.exits import ExitRule, keyed_uniform

FEW = 512
"""Candidates looked at before a whole vocabulary is sorted for top-p."""
PART = 256
"""Logits whose largest is found at once."""


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; the defaults are greedy, at the depth that the model is configured for.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0 is greedy.
        top_p, top_k, min_p: nucleus in (0, 1]; best tokens kept, 0 for all; least share of the best one's probability.
        repetition_penalty: divides (multiplies, where negative) the logits of tokens in prompt or text; 1 is none.
        presence_penalty, frequency_penalty: taken from the logits of new tokens, once, and for each occurrence.
        seed: of the draws; None takes a fresh one. Sample i of `n` uses seed + i (for sampled exits too).
        stop: strings that end the text, which is cut before them.
        n: samples of each prompt.
        logprobs: None for none; else the log-probability of each token, and of this many best alternatives.
        ignore_eos: go on after the end token.
        exit_threshold, exit_rule, depth_budget: at most one, as in `generate`; their values are single numbers.
        min_loops, max_loops: limits of the depth; `max_loops` is full depth, the trained one by default.
        prefill: `full`, or `adaptive`: prompt positions stop by the rule too.
        adapter: name of one of the engine's adapters; None for the model as it is.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    exit_threshold: float | None = None
    exit_rule: ExitRule | None = None
    depth_budget: float | None = None
    min_loops: int = 1
    max_loops: int | None = None
    prefill: Literal["full", "adaptive"] = "full"
    adapter: str | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (self.temperature == 0 or 0.01 <= self.temperature <= 100, "0 (greedy) or in [0.01, 100]"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "presence_penalty": (-100 <= self.presence_penalty <= 100, "in [-100, 100]"),
            "frequency_penalty": (-100 <= self.frequency_penalty <= 100, "in [-100, 100]"),
            "seed": (self.seed is None or 0 <= self.seed < 2**62, "None or in 0..2**62 - 1"),
            "stop": (all(isinstance(text, str) and text for text in stop), "strings of at least one character"),
            "n": (self.n >= 1, "at least 1"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "None, or 0 or more"),
        }
        for name, (holds, accepted) in ranges.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {accepted}")
        for name, value in vars(self.exit_rule).items() if self.exit_rule is not None else ():
            if isinstance(value, Tensor) and value.ndim:
                kind = type(self.exit_rule).__name__
                raise ValueError(f"{kind}.{name} has {value.numel()} values; a request takes one number")

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def free(self) -> bool:
        """Whether a token is drawn from all of the vocabulary, with nothing but the temperature."""
        whole = (self.top_p, self.top_k, self.min_p, self.logprobs or 0) == (1.0, 0, 0.0, 0)
        return self.temperature > 0 and whole and not self.penalised

    @property
    def plain(self) -> bool:
        """Whether the token is the best one and nothing else is asked."""
        return self.temperature == 0 and not self.penalised and self.logprobs is None


@dataclass(frozen=True)
class Drawn:
    """One token; `log_probability` and the best alternatives (token, log-probability) where they were asked for."""

    token: int
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def draw(logits: Tensor, params: SamplingParams, prompt: list[int], new: list[int], seed: int) -> Drawn:
    """The next token of one row.

    Args:
        logits: (V,) of the position that is read, any float dtype.
        prompt, new: the tokens so far.
        seed: of this sample.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = penalised(wide, params, prompt, new) if params.penalised else wide
    if params.temperature == 0:
        token = int(wide.argmax())
        if params.logprobs is None:
            return Drawn(token)
        log_p, ids = wide.log_softmax(-1), None
        return _noted(token, float(log_p[token]), log_p, ids, params.logprobs)
    log_p, ids = distribution(wide / params.temperature, params)
    position = torch.tensor(len(prompt) + len(new) - 1)
    uniform = keyed_uniform(torch.tensor(seed), position, 0)
    share = log_p.double().exp().cumsum(-1).cpu()
    place = min(int(torch.searchsorted(share, uniform * share[-1], right=True)), len(share) - 1)
    token = place if ids is None else int(ids[place])
    if params.logprobs is None:
        return Drawn(token)
    return _noted(token, float(log_p[place]), log_p, ids, params.logprobs)


def draw_freely(logits: Tensor, params: list[SamplingParams], positions: list[int], seeds: list[int]) -> list[Drawn]:
    """What `draw` gives for rows (n, V) whose params are all `free`, at once.

    Args:
        positions: where each row's logits were read.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=wide.device)
    log_p = (wide / temperatures.to(wide.dtype)[:, None]).log_softmax(-1)
    share = log_p.double().exp().cumsum(-1).cpu()
    uniform = keyed_uniform(torch.tensor(seeds), torch.tensor(positions), 0)
    places = torch.searchsorted(share, (uniform * share[:, -1])[:, None], right=True)[:, 0]
    tokens = places.clamp(max=share.shape[1] - 1)
    noted = log_p.cpu().gather(1, tokens[:, None])[:, 0].tolist()
    return [
        Drawn(token, value if p.logprobs is not None else None)
        for token, value, p in zip(tokens.tolist(), noted, params, strict=True)
    ]


def best_tokens(logits: Tensor) -> Tensor:
    """Where rows (n, V) are largest, the first of equals, as `argmax`, which is half as fast on a CPU: (n,)."""
    over = -logits.shape[-1] % PART
    parts = (pad(logits, (0, over), value=-math.inf) if over else logits).unflatten(-1, (-1, PART))
    best = parts.amax(-1).argmax(-1)
    return best * PART + parts[torch.arange(len(best), device=best.device), best].argmax(-1)


def penalised(logits: Tensor, params: SamplingParams, prompt: list[int], new: list[int]) -> Tensor:
    """Logits (V,) fp32 with the three penalties applied."""
    logits = logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *new}), device=logits.device)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if new and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(new, device=logits.device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the tokens that may be drawn, and their ids (None: all of them, in order).

    Best first where there are ids. At least one token stays.
    """
    if not params.top_k and params.top_p == 1:
        kept = logits
        if params.min_p > 0:
            least = logits.max() + math.log(params.min_p)
            kept = logits.masked_fill(logits < least, -math.inf)
        return kept.log_softmax(-1), None
    size = min(params.top_k or len(logits), len(logits))
    values, ids = logits.topk(size if params.top_k else min(FEW, size))
    total = values.logsumexp(-1) if params.top_k else logits.logsumexp(-1)
    if params.top_p < 1:
        share = (values - total).exp().cumsum(-1)
        if len(values) < size and float(share[-1]) < params.top_p:
            values, ids = logits.sort(descending=True)
            share = (values - total).exp().cumsum(-1)
        count = int((share < params.top_p).sum()) + 1  # the first whose share reaches top_p is in
        values, ids = values[:count], ids[:count]
    if params.min_p > 0:
        count = int((values >= values[0] + math.log(params.min_p)).sum())
        values, ids = values[:count], ids[:count]
    return values.log_softmax(-1), ids


def _noted(token: int, log_probability: float, log_p: Tensor, ids: Tensor | None, count: int) -> Drawn:
    """A token with the best alternatives of its distribution; those that could not be drawn are left out."""
    best, places = log_p.topk(min(count, len(log_p)))
    tokens = places if ids is None else ids[places]
    pairs = zip(tokens.tolist(), best.tolist(), strict=True)
    return Drawn(token, log_probability, tuple(pair for pair in pairs if pair[1] > -math.inf))

"""A sequence: one sample of one request, from its prompt to its last token, and the `Completion` it becomes.

A sequence with tokens x_0 .. x_n has positions 0 .. n - 1 in the pool at most: the newest token is in flight. Its
depths are recorded position by position, so that what was evicted can be replayed exactly.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from looplm.engine.sampling import Drawn, SamplingParams
from looplm.exits import ExitRule, FixedDepth, QExit
from looplm.model.depth import DepthOptions, budget_threshold

if TYPE_CHECKING:
    from looplm.engine.adapters import Adapter
    from looplm.engine.kv_pool import Block, Saved
    from looplm.engine.text import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Completion:
    """What became of one sample.

    Attributes:
        request: the number that `Engine.add` gave; `index` counts the samples of a prompt from 0.
        prompt_token_ids, token_ids: the latter with the end token, where it came to that.
        text: of the new tokens, cut before a stop string; empty without a tokenizer.
        finish_reason: `stop` (end token or stop string), `length`, `cancelled` or `error`; `error` says what happened.
        exit_depths: the loop that each new token was read at, counted from 1.
        position_depths: of every position run, prompt included: ready for `model(..., exit_depths=)` on the tokens
            but the last.
        exit_log_probabilities: a new token, log p_1 .. log p_e of the exit distribution in force, up to its exit e.
        log_survival: a new token, the log-probability of having gone on at its exit (-inf where the exit was forced).
        logprobs: of the new tokens, where they were asked for; `top_logprobs` the best alternatives (token, log p).
        cached_tokens: prompt positions that the prefix cache gave.
    """

    request: int
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    error: str | None
    exit_depths: list[int]
    position_depths: list[int]
    exit_log_probabilities: list[list[float]]
    log_survival: list[float]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    cached_tokens: int

    @property
    def mean_depth(self) -> float:
        """Mean loops a new token; 0 without any."""
        return sum(self.exit_depths) / max(len(self.exit_depths), 1)


@dataclass(frozen=True)
class Read:
    """A position that has exited and is read: its logits and what its exit cost.

    Attributes:
        logits: (V,) in the model's dtype; `best` is where they are largest, if anybody asked.
        depth: the loop it left after.
        log_probabilities: log p_1 .. log p_depth; `log_survival` at the exit.
        error: says that its numbers are not finite.
    """

    sequence: Sequence
    logits: torch.Tensor
    best: int | None
    depth: int
    log_probabilities: list[float]
    log_survival: float
    error: str | None


@cache
def _full_depth(loops: int) -> FixedDepth:
    return FixedDepth(loops)


@dataclass(eq=False)
class Sequence:
    """One sample in work.

    Attributes (beside those of `Completion`):
        rank: orders service, smaller first: arrival less what priority overtakes, request, sample.
        filled: positions in the pool; `target` those that are to be there before the newest token is run.
        flying: whether a token or chunk of it is between loops.
        slot: its row in the pool's tables; None while it waits.
        saved: its pages, where they were copied out.
        loops: full depth.
        adapter: what its rows wear.
        keys: what the blocks of its prompt are found by, once the scheduler has asked.
    """

    request: int
    index: int
    prompt: list[int]
    params: SamplingParams
    options: DepthOptions
    seed: int
    rank: tuple[int, int, int]
    stream: TextStream | None = None
    adapter: Adapter | None = None
    keys: tuple[Hashable, ...] | None = None
    new: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    filled: int = 0
    target: int = 0
    blocks: list[Block] = field(default_factory=list)
    slot: int | None = None
    flying: bool = False
    saved: Saved | None = None
    cached: int = 0
    exit_depths: list[int] = field(default_factory=list)
    exit_log_probabilities: list[list[float]] = field(default_factory=list)
    log_survival: list[float] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    loops: int = field(init=False)

    def __post_init__(self) -> None:
        self.loops = int(self.options.max_loops)

    @property
    def tokens(self) -> list[int]:
        """Prompt and new tokens."""
        return self.prompt + self.new

    @property
    def prefilling(self) -> bool:
        """Whether positions are still to be put into the pool before a new token can be run."""
        return self.filled < self.target

    @property
    def most_positions(self) -> int:
        """Positions that the pool holds at most: the last token is never run."""
        return len(self.prompt) + self.params.max_tokens - 1

    def rule(self) -> ExitRule:
        """The rule of the next token; under a budget its threshold follows what was spent so far."""
        options = self.options
        if options.budget is None:
            return options.rule if options.rule is not None else _full_depth(self.loops)
        spare = torch.tensor(sum(float(options.budget) - depth for depth in self.exit_depths), dtype=torch.float64)
        return QExit(float(budget_threshold(spare, options.budget_start)))

    def prompt_rule(self) -> ExitRule:
        """The rule of prompt positions. Under a budget nothing is spent when a prompt starts."""
        if self.options.prefill == "full":
            return _full_depth(self.loops)
        return self.options.rule if self.options.rule is not None else QExit(self.options.budget_start)

    def token_at(self, start: int, count: int) -> list[int]:
        """Tokens of some positions."""
        return self.tokens[start : start + count]

    def note(self, read: Read, drawn: Drawn) -> None:
        """Keep the next token and what it was read at."""
        self.new.append(drawn.token)
        self.drawn.append(drawn)
        self.exit_depths.append(read.depth)
        self.exit_log_probabilities.append(read.log_probabilities)
        self.log_survival.append(read.log_survival)

    def completion(self) -> Completion:
        """The result; the sequence has finished."""
        assert self.finish_reason is not None
        asked = self.params.logprobs is not None
        return Completion(
            request=self.request,
            index=self.index,
            prompt_token_ids=self.prompt,
            token_ids=self.new,
            text=self.stream.text if self.stream is not None else "",
            finish_reason=self.finish_reason,
            error=self.error,
            exit_depths=self.exit_depths,
            position_depths=self.depths,
            exit_log_probabilities=self.exit_log_probabilities,
            log_survival=self.log_survival,
            logprobs=[float(d.log_probability or 0.0) for d in self.drawn] if asked else None,
            top_logprobs=[list(d.alternatives) for d in self.drawn] if asked else None,
            cached_tokens=self.cached,
        )

"""Log-probabilities of given continuations at many depths from one pass of the deepest run.

Ouro equation 2 read after every loop: log p^(t) of the target tokens, t = 1..T. All fixed depths and every rule that
selects come out of the same pass, because loop t is the same whatever comes after it; a rule that freezes changes what
later positions see, so each one is a pass of its own. Only the positions that are read meet the head, in chunks, and
no more than two loops' states of the other positions are held.

Batches are fixed by the requests and the batch size alone (inputs sorted from long to short, equal ones run once, as
lm-eval's own class does), so a run that is continued gives the numbers of one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from looplm.evaluation.batches import Batch, Request, plan_batches
from looplm.evaluation.depths import Depth
from looplm.evaluation.items import Item
from looplm.exit_tracker import ExitTracker
from looplm.exits import ExitRule, FixedDepth, LoopView
from looplm.model.context import PassContext
from looplm.model.exiting import select
from looplm.model.freezing import freeze
from looplm.model.modeling import OuroForCausalLM
from looplm.model.readout import READ_BYTES, at_targets, log_probabilities


@dataclass(frozen=True)
class Scored:
    """One request at each of the D depths, over its n target tokens.

    Attributes:
        log_probabilities: (D, n), nats, fp32 (fp64 of an fp64 model).
        greedy: (D, n) bool, where the target is the likeliest token.
        read_depths: (D, n) int64, the loop each target was read at.
        loops_run: (D,) int64, loops over all positions of the request if this depth alone was run: every one of the
            pass for a rule that selects, those up to each exit for one that freezes.
        positions: tokens that were run.
    """

    log_probabilities: Tensor
    greedy: Tensor
    read_depths: Tensor
    loops_run: Tensor
    positions: int


@dataclass(frozen=True)
class Scores:
    """N requests at D depths, in the order they were given."""

    depths: tuple[Depth, ...]
    requests: tuple[Scored, ...]

    @property
    def sums(self) -> Tensor:
        """Log-probability of each whole target, (D, N) fp64, each summed in the precision it was read in."""
        return torch.stack([scored.log_probabilities.sum(1).double() for scored in self.requests], dim=1)

    @property
    def greedy(self) -> Tensor:
        """Whether greedy decoding would give the target, (D, N) bool."""
        return torch.stack([scored.greedy.all(1) for scored in self.requests], dim=1)

    @property
    def mean_read_depth(self) -> Tensor:
        """Mean loop over the positions that are read, (D,) fp64."""
        return torch.cat([scored.read_depths for scored in self.requests], dim=1).double().mean(1)

    @property
    def mean_loops_run(self) -> Tensor:
        """Mean loops over all positions that are processed, (D,) fp64."""
        run = torch.stack([scored.loops_run for scored in self.requests]).double().sum(0)
        return run / sum(scored.positions for scored in self.requests)


def score(
    model: OuroForCausalLM,
    requests: Sequence[Request],
    depths: Sequence[Depth],
    *,
    batch_size: int,
    report: Callable[[float], None] | None = None,
) -> Scores:
    """Score every request at every depth.

    Args:
        batch_size: inputs in one pass.
        report: called with the share of the requests that is done, in (0, 1].

    Raises:
        ValueError: as `score_batches`.
    """
    found: dict[int, Scored] = {}
    for part in score_batches(model, requests, depths, batch_size=batch_size):
        found |= part
        if report is not None:
            report(len(found) / len(requests))
    return Scores(tuple(depths), tuple(found[place] for place in range(len(requests))))


@torch.no_grad()
def score_batches(
    model: OuroForCausalLM,
    requests: Sequence[Request],
    depths: Sequence[Depth],
    *,
    batch_size: int,
    done: Collection[int] = (),
) -> Iterator[dict[int, Scored]]:
    """The scores batch by batch, by the place of the request.

    Args:
        done: places that need no scores any more; a batch of only such ones is not run, the others are not changed.

    Raises:
        ValueError: no depth, an empty context or target, more tokens than the context of the model holds, a gate
            that has no value for a rule.
    """
    if not depths or batch_size < 1:
        raise ValueError(f"{len(depths)} depths in batches of {batch_size}; scoring needs at least one of each")
    limit, training = model.config.max_position_embeddings, model.training
    for place, (context, target) in enumerate(requests):
        if not context or not target:
            raise ValueError(f"request {place} has {len(context)} context and {len(target)} target tokens; give both")
        if len(context) + len(target) - 1 > limit:
            length = len(context) + len(target) - 1
            raise ValueError(f"request {place} has {length} tokens, but the context holds {limit}; shorten it")
    model.eval()
    try:
        for groups in plan_batches(requests, batch_size):
            if not all(place in done for group in groups for place in group):
                batch = Batch.build(requests, groups, model.device)
                yield _split(batch, _score_batch(model, batch, depths))
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Read:
    """A batch at one depth: (R,) log-probabilities, matches and depths, and (B,) loops run."""

    log_probabilities: Tensor
    greedy: Tensor
    depths: Tensor
    loops_run: Tensor


def _split(batch: Batch, readings: Sequence[_Read]) -> dict[int, Scored]:
    """What each request gets of what was read at all depths."""
    parts = [torch.stack([getattr(reading, name) for reading in readings]).cpu() for name in _Read.__annotations__]
    log_p, greedy, depths, run = parts
    lengths = batch.lengths.tolist()
    return {
        place: Scored(log_p[:, span], greedy[:, span], depths[:, span], run[:, row], lengths[row])
        for place, (row, span) in batch.slots.items()
    }


def _score_batch(model: OuroForCausalLM, batch: Batch, depths: Sequence[Depth]) -> list[_Read]:
    """Every depth: those of one pass together, the freezing ones each by itself."""
    shared = [depth for depth in depths if not _freezes(depth)]
    together = iter(_shared_pass(model, batch, shared) if shared else ())
    return [_frozen(model, batch, depth) if _freezes(depth) else next(together) for depth in depths]


def _freezes(depth: Depth) -> bool:
    return depth.rule is not None and depth.mode == "freeze"


def _shared_pass(model: OuroForCausalLM, batch: Batch, depths: Sequence[Depth]) -> list[_Read]:
    """One run of as many loops as the deepest of the depths; each loop's read positions are kept, no others."""
    core, coda = model.model, model.config.num_coda_layers > 0
    last, rules = max(depth.loops for depth in depths), [depth for depth in depths if depth.rule is not None]
    fixed = {depth.loops for depth in depths if depth.rule is None}
    needed = fixed if coda else fixed | set(range(1, max([depth.loops for depth in rules], default=0) + 1))
    embedded = core.embed(batch.ids, None)
    context = PassContext.build(core, embedded, None, None, None, False, last)
    state, kept = core.begin(context, embedded), _Kept()
    for loop in range(1, last + 1):
        state, gate = core.loop(state, context, loop)
        if rules:
            kept.gates.append(gate if coda else gate.flatten()[batch.index])
            kept.states.append(state if coda else state.flatten(0, 1)[batch.index])
        if loop in needed:
            kept.reads[loop] = core.finish(state, context).flatten(0, 1)[batch.index]
    if not coda:
        return _read_all(model, batch, depths, kept)
    plain = iter(_read_all(model, batch, [depth for depth in depths if depth.rule is None], kept))
    return [next(plain) if d.rule is None else _selected(model, batch, d, kept, context) for d in depths]


@dataclass
class _Kept:
    """What is left of a shared pass: by loop what the head reads, and for rules states and gates after loops 1..T."""

    reads: dict[int, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)


def _selected(model: OuroForCausalLM, batch: Batch, depth: Depth, kept: _Kept, context: PassContext) -> _Read:
    """A rule that selects before a coda, which runs once and sees every position at its own exit, as in `forward`."""
    assert depth.rule is not None
    gates = torch.stack(kept.gates[: depth.loops], dim=-1)
    state, exits = select(model, kept.states[: depth.loops], gates, depth.rule, context, 0)
    read = model.model.finish(state, context).flatten(0, 1)[batch.index]
    return _Read(*_read_targets(model, batch, read), exits.flatten()[batch.index], batch.lengths * depth.loops)


def _read_targets(model: OuroForCausalLM, batch: Batch, read: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and matches (R,) of the targets, of what the head reads (R, D)."""
    found = [at_targets(model.lm_head(read[part]), batch.targets[part]) for part in _parts(model, batch)]
    log_p, match = zip(*found, strict=True)
    return torch.cat(log_p), torch.cat(match)


def _read_all(model: OuroForCausalLM, batch: Batch, depths: Sequence[Depth], kept: _Kept) -> list[_Read]:
    """Every depth of a shared pass, a chunk of read positions after the other."""
    found = [_read_rows(model, batch, depths, kept, part) for part in _parts(model, batch)]
    readings = []
    for n, depth in enumerate(depths):
        log_p, greedy, exits = (torch.cat([part[n][k] for part in found]) for k in range(3))
        readings.append(_Read(log_p, greedy, exits, batch.lengths * depth.loops))
    return readings


def _parts(model: OuroForCausalLM, batch: Batch) -> Iterator[slice]:
    """Slices of the read positions whose log-probabilities fit into `READ_BYTES`."""
    size = max(READ_BYTES // (4 * model.config.vocab_size), 1)
    return (slice(first, first + size) for first in range(0, len(batch.index), size))


def _read_rows(
    model: OuroForCausalLM, batch: Batch, depths: Sequence[Depth], kept: _Kept, part: slice
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Log-probability, match and depth of some read positions at every depth; one vocabulary product a loop."""
    wanted, positions = batch.targets[part], batch.index[part] % batch.ids.shape[1]
    rows = torch.zeros_like(wanted)
    trackers = {
        n: ExitTracker(depth.rule, rows, positions, 1, depth.loops)
        for n, depth in enumerate(depths)
        if depth.rule is not None
    }
    log_p, match = {}, {}
    for loop, read in kept.reads.items():
        logits = model.lm_head(read[part])
        log_p[loop], match[loop] = at_targets(logits, wanted)
        whole = cache(partial(log_probabilities, logits))  # all rules that read the vocabulary share it
        for tracker in trackers.values():
            active = tracker.active
            if len(active):
                state, gate = kept.states[loop - 1][part][active], kept.gates[loop - 1][part][active]
                tracker.step(loop, gate, state, lambda _, whole=whole, active=active: whole()[active].float())  # type: ignore[misc]
    every, result = torch.arange(len(wanted), device=wanted.device), []
    for n, depth in enumerate(depths):
        if n not in trackers:
            result.append((log_p[depth.loops], match[depth.loops], torch.full_like(wanted, depth.loops)))
            continue
        exits, loops = trackers[n].depths, range(1, depth.loops + 1)
        tables = [torch.stack([table[loop] for loop in loops])[exits - 1, every] for table in (log_p, match)]
        result.append((tables[0], tables[1], exits))
    return result


@dataclass(frozen=True)
class _Behind:
    """A rule that leaves the prompt at full depth and stops padding at once."""

    rule: ExitRule
    prompt: Tensor
    padding: Tensor

    def __call__(self, view: LoopView) -> Tensor:
        """Stop where the rule does, behind the prompt."""
        return (self.rule(view) & ~self.prompt[view.index]) | self.padding[view.index]


def _frozen(model: OuroForCausalLM, batch: Batch, depth: Depth) -> _Read:
    """A pass in which positions stop for good."""
    if model.config.exit_gate_pooling != "token" and not isinstance(depth.rule, FixedDepth):
        raise ValueError("exit_gate_pooling is 'causal_mean': a rule that freezes needs 'token'; use mode 'select'")
    assert depth.rule is not None
    core, padding = model.model, batch.places >= batch.lengths[:, None]
    prompt = (batch.places < batch.prompt[:, None]) & (depth.prefill == "full")
    rule = _Behind(depth.rule, prompt.flatten(), padding.flatten())
    embedded = core.embed(batch.ids, None)
    context = PassContext.build(core, embedded, None, None, None, False, depth.loops)
    frozen = freeze(model, embedded, context, rule, 1, depth.loops)
    read = core.finish(frozen.state, context).flatten(0, 1)[batch.index]
    run = frozen.depths.masked_fill(padding, 0).sum(1)
    return _Read(*_read_targets(model, batch, read), frozen.depths.flatten()[batch.index], run)


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Request:
    """Tokens of a context and of what follows it, split as lm-eval does: both encoded together, cut at the context.

    White space at the end of the context moves to the continuation.

    Raises:
        ValueError: an empty context, or a continuation without tokens of its own.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before, whole = tokenizer.encode(kept), tokenizer.encode(kept + continuation)
    if not before or len(whole) <= len(before):
        raise ValueError(f"context {kept[-40:]!r} and continuation {continuation[:40]!r}: each needs tokens of its own")
    return before, whole[len(before) :]


def choice_requests(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[Request]:
    """The requests of multiple-choice items, item by item and choice by choice."""
    return [encode_pair(tokenizer, item.prompt, text) for item in items for text in item.continuations()]


def chosen(scores: Scores, items: Sequence[Item], per_character: bool = False) -> Tensor:
    """The likeliest choice of each item at each depth, (D, items) int64, of the scores of `choice_requests(items)`.

    Args:
        per_character: divide by the length of the choice first (lm-eval's `acc_norm`).
    """
    sizes = [len(item.choices) for item in items]
    sums = scores.sums
    if per_character:
        sums = sums / torch.tensor([float(max(len(choice), 1)) for item in items for choice in item.choices])
    return torch.stack([part.argmax(1) for part in sums.split(sizes, dim=1)], dim=1)

"""Rollouts: samples of the policy with the depth of every position, by the engine, on the weights that are being tuned.

The engine runs in the same process and reads the learner's own parameters, so nothing is copied or brought up to date.
What a sample's exits and tokens are depends on its seed alone (`looplm.exits.keyed_uniform`): a run that is resumed
draws what it would have drawn. Log-probabilities are those of the distribution that was drawn from, recorded as the
draw was made.

`paper-off-policy` (section 4.5, first strategy) is the one thing the engine does not do, because it saves nothing: all
loops run at every position, keys stay those of full depth, and the first loop over the threshold supplies the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.engine.engine import Engine, end_tokens
from looplm.engine.sampling import SamplingParams, draw
from looplm.exits import ExitRule, FixedDepth, QExit, SampledExit
from looplm.model.cache import LoopCache
from looplm.model.modeling import OuroForCausalLM
from looplm.tuning.rl_recipe import DepthSettings


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        prompt, tokens: ids; the end token is one of the tokens.
        depths: of every position run, prompt included, one fewer than ids there are.
        log_probabilities: of each token; `exits` of the exit that it was read at, 0 for the first token.
        ended: whether it ended by itself.
    """

    prompt: list[int]
    tokens: list[int]
    depths: list[int]
    log_probabilities: list[float]
    exits: list[float]
    ended: bool

    @property
    def loops(self) -> list[int]:
        """The loop each token was read at."""
        return self.depths[len(self.prompt) - 1 :]


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn.

    Attributes:
        depth: what decides the depth; None reads every position at `loops`.
        loops: full depth.
        temperature: 0 takes the best token.
        max_new_tokens: of a sample.
        kv_bytes: that keys and values may take.
    """

    depth: DepthSettings | None
    loops: int
    temperature: float
    max_new_tokens: int
    kv_bytes: int

    def rule(self, seed: int) -> ExitRule:
        """The exit rule of a sample."""
        if self.depth is None or self.depth.exit_threshold is None:
            sampled = self.depth is not None and self.depth.mode == "sampled"
            return SampledExit(seed) if sampled else FixedDepth(self.loops)
        return QExit(self.depth.exit_threshold)


@torch.no_grad()
def roll_out(
    model: OuroForCausalLM, prompts: Sequence[list[int]], seeds: Sequence[int], drawing: Drawing
) -> list[Sample]:
    """A sample of each prompt, by its seed.

    Raises:
        ValueError: a prompt that does not fit the context, or a request that failed (says why).
    """
    training = model.training
    try:
        if drawing.depth is not None and drawing.depth.mode == "paper-off-policy":
            return _selected(model.eval(), prompts, seeds, drawing)
        return _by_engine(model, prompts, seeds, drawing)
    finally:
        model.train(training)


def _by_engine(
    model: OuroForCausalLM, prompts: Sequence[list[int]], seeds: Sequence[int], drawing: Drawing
) -> list[Sample]:
    engine = Engine(
        model,
        max_rows=min(len(prompts), 128),
        max_loops=drawing.loops,
        kv_bytes=drawing.kv_bytes,
        chunk_tokens=4096,
    )
    least = 1 if drawing.depth is None else drawing.depth.min_loops
    params = [
        SamplingParams(
            max_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            seed=seed,
            logprobs=0,
            exit_rule=drawing.rule(seed),
            min_loops=least,
            max_loops=drawing.loops,
        )
        for seed in seeds
    ]
    samples = []
    for done in engine.generate(prompts, params):
        if done.error is not None:
            raise ValueError(f"a rollout failed: {done.error}")
        exits = [log_p[-1] for log_p in done.exit_log_probabilities]
        assert done.logprobs is not None
        samples.append(
            Sample(
                prompt=done.prompt_token_ids,
                tokens=done.token_ids,
                depths=done.position_depths,
                log_probabilities=done.logprobs,
                exits=[0.0, *exits[1:]],
                ended=done.finish_reason == "stop",
            )
        )
    return samples


def _selected(
    model: OuroForCausalLM, prompts: Sequence[list[int]], seeds: Sequence[int], drawing: Drawing
) -> list[Sample]:
    """Full depth everywhere, each new token read at the first loop over the threshold; rows in lockstep."""
    ends, longest = end_tokens(model), max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    params = SamplingParams(temperature=drawing.temperature, logprobs=0)
    found: list[list[tuple[int, float, int]]] = [[] for _ in prompts]
    cache, new = LoopCache(model.config), ids
    for _ in range(drawing.max_new_tokens):
        out = model(
            new.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            use_cache=True,
            num_loop_steps=drawing.loops,
            exit_rule=drawing.rule(0),
            logits_to_keep=1,
        )
        rows = zip(out.logits[:, -1], out.exit_depths[:, -1].tolist(), strict=True)
        for row, (logits, depth) in enumerate(rows):
            tokens = [token for token, *_ in found[row]]
            if tokens and tokens[-1] in ends:
                continue
            drawn = draw(logits, params, prompts[row], tokens, seeds[row])
            found[row].append((drawn.token, float(drawn.log_probability or 0.0), depth))
        if all(tokens[-1][0] in ends for tokens in found):
            break
        new = torch.tensor([[tokens[-1][0]] for tokens in found])
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return [_sample(prompt, done, drawing.loops, ends) for prompt, done in zip(prompts, found, strict=True)]


def _sample(prompt: list[int], done: list[tuple[int, float, int]], loops: int, ends: frozenset[int]) -> Sample:
    tokens, log_probabilities, depths = (list(part) for part in zip(*done, strict=True))
    before = [loops] * (len(prompt) - 1)  # run to full depth and never read
    return Sample(prompt, tokens, [*before, *depths], log_probabilities, [0.0] * len(tokens), tokens[-1] in ends)


@dataclass(frozen=True)
class Rows:
    """Samples as tensors, padded behind; B rows of S positions.

    Attributes:
        ids: (B, S) int64, all but the last token of each.
        depths: (B, S) int64, 0 on padding.
        targets: (B, S) the token after each position.
        acts: (B, S) bool, where the target is a new token; `exits` where the exit is an action too.
        old_tokens, old_exits: (B, S) fp32 log-probabilities, 0 where there is no action.
    """

    ids: Tensor
    depths: Tensor
    targets: Tensor
    acts: Tensor
    exits: Tensor
    old_tokens: Tensor
    old_exits: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Rows":
        """Samples side by side; a row that is drawn at fixed depth has exits of probability 1, which change nothing."""
        longest = max(len(s.prompt) + len(s.tokens) - 1 for s in samples)
        shape = (len(samples), longest)
        ids, depths, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        acts, exits = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        old_tokens, old_exits = (torch.zeros(shape) for _ in range(2))
        for row, sample in enumerate(samples):
            text, first = torch.tensor([*sample.prompt, *sample.tokens]), len(sample.prompt) - 1
            end = len(text) - 1
            ids[row, :end], targets[row, :end] = text[:-1], text[1:]
            depths[row, :end] = torch.tensor(sample.depths)
            acts[row, first:end], exits[row, first + 1 : end] = True, True
            old_tokens[row, first:end] = torch.tensor(sample.log_probabilities)
            old_exits[row, first:end] = torch.tensor(sample.exits)
        return cls(ids, depths, targets, acts, exits, old_tokens, old_exits)

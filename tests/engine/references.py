"""What the engine must equal: `generate` on each prompt alone, and the oracle; tokens, depths, logits, exit numbers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from checks import FULL
from hypothesis import event
from oracle import Look, slow_generate
from torch import Tensor

from looplm.engine import Completion, Engine, SamplingParams
from looplm.engine.sequence import Sequence
from looplm.model.modeling import OuroForCausalLM

VOCABULARY = 64
DEPTH = ("exit_threshold", "exit_rule", "depth_budget", "min_loops", "max_loops", "prefill")


def asking(**fields: Any) -> SamplingParams:
    """Greedy, with the whole distribution of every token noted."""
    return SamplingParams(**{"max_tokens": 6, "logprobs": VOCABULARY, **fields})


def table(completion: Completion) -> Tensor:
    """(N, V) log-probabilities of every new token's read-out."""
    found = torch.empty(len(completion.token_ids), VOCABULARY, dtype=torch.float64)
    for row, pairs in zip(found, completion.top_logprobs, strict=True):
        assert len(pairs) == VOCABULARY
        for token, value in pairs:
            row[token] = value
    return found


def check(model: OuroForCausalLM, completion: Completion, policy: str) -> Callable[[SamplingParams], None]:
    """Compare with `generate` on the prompt alone, given what was asked."""

    def against(params: SamplingParams) -> None:
        assert completion.error is None and completion.finish_reason == "length"
        settings = {name: getattr(params, name) for name in DEPTH if getattr(params, name) is not None}
        arguments = {**FULL, "max_new_tokens": params.max_tokens}
        prompt = torch.tensor([completion.prompt_token_ids])
        result = model.generate(prompt, **arguments, **settings, kv_policy=policy)
        assert completion.token_ids == result.sequences[0, prompt.shape[1] :].tolist()
        assert completion.exit_depths == result.exit_depths[0].tolist()
        assert completion.position_depths == result.position_depths[0].tolist()
        close(table(completion), torch.stack(result.logits)[:, 0].log_softmax(-1))
        for n in range(1, params.max_tokens):  # a full-depth prompt's gates are reported without limits
            p = torch.tensor(completion.exit_log_probabilities[n]).exp()
            expected = result.exit_probabilities[0, n]
            close(p, expected[: len(p)], 1e-5)
            assert expected[len(p) :].isnan().all()
            assert math.isclose(math.exp(completion.log_survival[n]), result.survival[0, n], abs_tol=1e-5)

    return against


def check_oracle(
    model: OuroForCausalLM, completion: Completion, stop: Callable[[Look], bool], loops: int, policy: str, prefill: str
) -> None:
    """Compare with the oracle."""
    steps = len(completion.token_ids)
    slow = slow_generate(model, completion.prompt_token_ids, steps, stop, loops, policy, prefill)
    assert completion.error is None and completion.token_ids == slow.tokens
    assert completion.exit_depths == slow.depths and completion.position_depths == slow.position_depths
    close(table(completion), slow.logits.log_softmax(-1))


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def blocks_are_free(engine: Engine) -> None:
    """Nothing is left behind."""
    assert not engine.busy and not engine.live and engine.pool.pages_in_use == 0
    assert not engine.runner.flight.sequences and engine.runner.prefill is None
    assert (engine.pool.tables == 0).all() and (engine.pool.edge_tables == 0).all()
    free = [*engine.pool._free] + [page for block in engine.pool._idle.values() for page in block.pages]
    assert sorted(free) == list(range(2, engine.pool.core.shape[1]))


def play(
    engine: Engine, work: Iterable[tuple[list[int], SamplingParams, int]], waits: list[int], interrupted: dict[int, int]
) -> list[Sequence]:
    """Run requests (prompt, params, priority) to their ends; gives the sequences in order of arrival.

    Args:
        waits: ticks after each arrival.
        interrupted: at so many ticks, which of those that run is preempted.
    """
    seen: list[Sequence] = []
    for (prompt, params, priority), wait in zip(work, waits, strict=False):
        seen += engine.prepare(prompt, params, priority)
        engine.submit(seen[-1:])
        for _ in range(wait):
            engine.step()
    while engine.busy:
        engine.step()
        running = engine.scheduler.running
        if engine.ticks in interrupted and running:
            victim = running[interrupted[engine.ticks] % len(running)]
            event(f"preempted while {'reading its prompt' if victim.prefilling else 'decoding'}")
            engine.scheduler.preempt(victim)
    return seen

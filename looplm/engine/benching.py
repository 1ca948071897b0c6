"""What `looplm bench` measures: the engine on one's own model and machine, early exit against full depth.

Requests arrive together. Time to the first token is the mean over requests from their arrival; the time of a token is
the mean distance between a request's tokens; throughput counts new tokens from the first arrival to the last token.
Both depths run on the same prompts in turns, behind a warm-up that is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from looplm.engine.engine import Engine
from looplm.engine.kv_pool import BLOCK
from looplm.engine.sampling import SamplingParams
from looplm.model.modeling import OuroForCausalLM


@dataclass(frozen=True)
class BenchRow:
    """One batch size at one depth.

    Attributes:
        requests: at once.
        exit_threshold: of Q-exit; None at full depth.
        tokens_per_second: new tokens of all requests; `speed_up` over full depth at the same batch size.
        first_token_seconds, token_seconds: means over requests; see the module.
        mean_depth: loops a new token, the prompts' full-depth read-outs included.
        kv_bytes: keys and values held at most, in whole pages; `kv_bytes_per_token` those of one position at the end.
        outside_model: share of the time outside the model's passes.
    """

    requests: int
    exit_threshold: float | None
    tokens_per_second: float
    speed_up: float
    first_token_seconds: float
    token_seconds: float
    mean_depth: float
    kv_bytes: int
    kv_bytes_per_token: float
    outside_model: float


@dataclass(frozen=True)
class Bench:
    """All rows, and what they were measured with."""

    parameters: int
    dtype: str
    threads: int
    kv_policy: str
    prompt_tokens: int
    max_tokens: int
    rows: list[BenchRow]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def run_bench(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batches: tuple[int, ...],
    *,
    exit_threshold: float,
    prompt_tokens: int,
    max_tokens: int,
    kv_policy: Literal["per_loop", "last"] = "per_loop",
    text: str | None = None,
    done: Callable[[float], None] = lambda share: None,
) -> Bench:
    """Measure a model at several batch sizes.

    Args:
        text: prompts are cut from it, one behind the other; random tokens without.
        done: is told the share that is done.

    Raises:
        ValueError: a text too short for the prompts, or requests too long for the context.
        FloatingPointError: the model's numbers are not finite.
    """
    prompts = _prompts(model, tokenizer, max(batches), prompt_tokens, text)
    rows: list[BenchRow] = []
    for number, batch in enumerate(batches):
        engine = _engine(model, batch, prompt_tokens + max_tokens, kv_policy)
        _measure(engine, prompts[:batch], 2, None)  # warm-up
        full = _measure(engine, prompts[:batch], max_tokens, None)
        done((number + 0.5) / len(batches))
        early = _measure(engine, prompts[:batch], max_tokens, exit_threshold, full.tokens_per_second)
        done((number + 1) / len(batches))
        rows += [full, early]
    count = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return Bench(count, dtype, torch.get_num_threads(), kv_policy, prompt_tokens, max_tokens, rows)


def _engine(model: OuroForCausalLM, batch: int, positions: int, kv_policy: Literal["per_loop", "last"]) -> Engine:
    """An engine whose pool holds all requests at once, with the pages that a prompt in flight takes."""
    config = model.config
    layers = config.total_ut_steps * config.num_hidden_layers + config.num_prelude_layers + config.num_coda_layers
    width = 2 * (config.num_key_value_heads or 0) * (config.head_dim or 0) * model.dtype.itemsize
    blocks = batch * (-(-positions // BLOCK) + 1) + 2
    bound = blocks * BLOCK * layers * width
    return Engine(model, kv_policy=kv_policy, kv_bytes=bound, max_rows=batch, prefix_cache=False)


def _measure(
    engine: Engine, prompts: list[list[int]], max_tokens: int, threshold: float | None, full: float | None = None
) -> BenchRow:
    """Run the prompts together; `full` are the tokens a second at full depth."""
    params = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, exit_threshold=1.0 if threshold is None else threshold
    )
    sequences = [engine.prepare(prompt, params)[0] for prompt in prompts]
    page, edge = engine.pool.page_bytes, engine.pool.edge_bytes
    for sequence in sequences:
        engine.submit([sequence])
    began, model_before, most, share = time.perf_counter(), engine.runner.model_seconds, 0, 0.0
    arrivals: dict[int, list[float]] = {id(sequence): [] for sequence in sequences}
    while engine.busy:
        for sequence in engine.step():
            arrivals[id(sequence)].append(time.perf_counter() - began)
        blocks = sum(len(s.blocks) for s in engine.scheduler.running)
        held = engine.pool.pages_in_use * page + blocks * edge
        if blocks and not any(s.prefilling for s in engine.scheduler.running):
            share = held / (blocks * BLOCK)
        most = max(most, held)
    seconds = time.perf_counter() - began
    for sequence in sequences:
        if sequence.error is not None:
            raise FloatingPointError(sequence.error)
    rate = len(prompts) * max_tokens / seconds
    depths = [depth for sequence in sequences for depth in sequence.exit_depths]
    waits = [(times[-1] - times[0]) / (len(times) - 1) for times in arrivals.values()]
    return BenchRow(
        requests=len(prompts),
        exit_threshold=threshold,
        tokens_per_second=rate,
        speed_up=rate / (full or rate),
        first_token_seconds=sum(times[0] for times in arrivals.values()) / len(prompts),
        token_seconds=sum(waits) / len(waits),
        mean_depth=sum(depths) / len(depths),
        kv_bytes=most,
        kv_bytes_per_token=share,
        outside_model=1 - (engine.runner.model_seconds - model_before) / seconds,
    )


def _prompts(
    model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, length: int, text: str | None
) -> list[list[int]]:
    if text is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"the text has {len(ids)} tokens; {count} prompts of {length} need {count * length}")
    return [ids[start : start + length] for start in range(0, count * length, length)]

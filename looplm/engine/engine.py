"""The engine: continuous depth batching (Ouro section 3.2 at serving time), depth-exact.

Because every loop uses the same weights, requests at different loops share one pass of the stack. A tick is one pass
over all tokens in flight, whatever loop each is in; a row whose exit rule fires is sampled and comes back with its next
token at loop 1 in the very next tick, so the batch never waits for its slowest token. Decoding stays exact under
`per_loop` and `last`, because a sequence has one token in flight and its earlier ones have exited: tokens, depths and
logits are those of `generate`, whatever else is in the batch, after preemption, and behind a prefix of another request.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import replace
from os import PathLike
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from looplm.engine.adapters import Adapter, load_adapter
from looplm.engine.kv_pool import KVPool
from looplm.engine.runner import Runner
from looplm.engine.sampling import Drawn, SamplingParams, draw, draw_freely
from looplm.engine.scheduler import PATIENCE, Scheduler
from looplm.engine.sequence import Completion, FinishReason, Read, Sequence
from looplm.engine.text import TextStream
from looplm.exits import Confidence, SampledExit
from looplm.model.calibration import UNCALIBRATED, starting_threshold
from looplm.model.depth import DepthOptions
from looplm.model.modeling import OuroForCausalLM

Prompt = str | list[int]


class Engine:
    """Serves many requests with one looped model.

    Args:
        tokenizer: needed for prompts and stop strings given as text, and for the text of completions.
        kv_policy: what a position offers to later ones: `per_loop`, or `last`, one slot a layer behind the prompt.
        kv_bytes: bytes of keys and values at most.
        max_rows: sequences that run at once at most.
        max_loops: deepest request; the configuration's `total_ut_steps` by default.
        chunk_tokens: prompt positions of one pass, padding included: smaller disturbs decoding less.
        prefix_cache: reuse the blocks of earlier prompts that begin alike (`per_loop` only).
        adapters: LoRA adapters, name to PEFT folder; a request names its own (see `looplm.engine.adapters`).

    Attributes:
        ticks: steps so far.
        live: the unfinished sequences of each request.

    Raises:
        ValueError: a policy, size, model or adapter that it cannot serve.
    """

    def __init__(
        self,
        model: OuroForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        kv_policy: Literal["per_loop", "last"] = "per_loop",
        kv_bytes: int = 2 << 30,
        max_rows: int = 16,
        max_loops: int | None = None,
        chunk_tokens: int = 256,
        prefix_cache: bool = True,
        adapters: Mapping[str, str | PathLike[str]] | None = None,
    ) -> None:
        config = model.config
        max_loops = config.total_ut_steps if max_loops is None else max_loops
        if kv_policy not in ("per_loop", "last"):
            raise ValueError(f"kv_policy is {kv_policy!r}; the engine serves per_loop and last (others: generate)")
        for name, value in (("max_rows", max_rows), ("max_loops", max_loops), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if config.exit_gate_pooling != "token":
            raise ValueError("exit_gate_pooling is 'causal_mean': the engine needs 'token'; use generate")
        self.model, self.tokenizer, self.kv_policy = model.eval(), tokenizer, kv_policy
        self.adapters = {name: load_adapter(name, folder, model) for name, folder in (adapters or {}).items()}
        self.pool = KVPool(
            config,
            budget=kv_bytes,
            num_loops=max_loops,
            single_slot=kv_policy == "last",
            rows=max_rows,
            max_positions=config.max_position_embeddings,
            dtype=model.dtype,
            device=model.device,
        )
        self.runner = Runner(model, self.pool)
        self.scheduler = Scheduler(
            self.pool, self.runner, rows=max_rows, chunk_tokens=chunk_tokens, prefix_cache=prefix_cache
        )
        self.ticks = 0
        self._arrivals = itertools.count()
        self.live: dict[int, list[Sequence]] = {}
        self._ends = end_tokens(model)

    # --- requests ---

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0) -> list[Sequence]:
        """Check a request and make its `params.n` sequences; nothing runs yet.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, contradicting or impossible depths, an adapter
                that is not there, or a request too long for the context or for the pool.
        """
        params = params or SamplingParams()
        ids, options, adapter = self._encode(prompt), self._options(params), self._adapter(params)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop is {params.stop}; stop strings need a tokenizer: Engine(model, tokenizer)")
        longest, limit = len(ids) + params.max_tokens, self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}, but the context holds "
                f"{limit}; shorten the prompt or lower max_tokens"
            )
        if not self.pool.fits(len(ids), longest - 1, options.num_loops):
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}: more than the whole pool "
                f"of {self.pool.num_bytes} bytes holds; raise kv_bytes, lower max_tokens or max_loops"
            )
        seed = random.randrange(2**62) if params.seed is None else params.seed
        request = next(self._arrivals)
        turn, sequences = request - priority * PATIENCE, []
        for index in range(params.n):
            stream = TextStream(self.tokenizer, ids, tuple(params.stop)) if self.tokenizer is not None else None
            own, rank = _shift_seed(options, index), (turn, request, index)
            sequences.append(Sequence(request, index, ids, params, own, seed + index, rank, stream, adapter))
        return sequences

    def submit(self, sequences: list[Sequence]) -> int:
        """Let prepared sequences wait for their turn; gives the number of their request."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        self.live[sequences[0].request] = list(sequences)
        return sequences[0].request

    def add(self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0) -> int:
        """`prepare` and `submit`. Requests of higher priority are served first (see `looplm.engine.scheduler`)."""
        return self.submit(self.prepare(prompt, params, priority))

    def cancel(self, request: int) -> list[Sequence]:
        """End a request where it stands; gives its sequences that had not finished."""
        unfinished = list(self.live.get(request, []))
        for sequence in unfinished:
            self._finish(sequence, "cancelled")
        return unfinished

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.busy

    # --- work ---

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """One tick; gives the sequences that have a new token or have finished.

        Raises:
            ValueError: loop hooks are set, which would see rows of different loops at once.
        """
        if self.model.model.loop_hooks:
            raise ValueError("loop hooks are set, but the rows of a pass are in loops of their own; use generate")
        scheduler, runner = self.scheduler, self.runner
        reads = scheduler.admit()
        changed = self._attempt(lambda: self._accept(reads), [read.sequence for read in reads], lambda: None)
        starters = scheduler.starters()
        changed += self._attempt(lambda: self._decode(starters), [*runner.decoding, *starters], runner.abandon_decoding)
        chunks = scheduler.chunks() if runner.prefill is None else []
        started = [chunk.sequence for chunk in chunks]
        changed += self._attempt(lambda: self._fill(chunks), [*runner.chunked, *started], runner.abandon_prefill)
        self.ticks += 1
        return changed

    def generate(
        self, prompts: Several[Prompt], params: SamplingParams | Several[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer prompts (text, or lists of token ids), in batch.

        Args:
            params: for all of them, or one for each.

        Returns:
            `params.n` completions a prompt, in the order of the prompts. A request that fails on the way has
            `finish_reason` "error" and says why; the others are not touched.

        Raises:
            ValueError: as `prepare`, before anything runs.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; pass a list of prompts")
        each = list(params) if isinstance(params, Iterable) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries; there are {len(prompts)} prompts")
        requests = [self.prepare(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        for sequences in requests:
            self.submit(sequences)
        try:
            while any(s.finish_reason is None for sequences in requests for s in sequences):
                self.step()
        finally:
            for sequences in requests:
                self.cancel(sequences[0].request)
        return [sequence.completion() for sequences in requests for sequence in sequences]

    # --- the parts of a tick ---

    def _decode(self, starters: list[Sequence]) -> list[Sequence]:
        if starters:
            self.runner.start(starters)
        return self._accept(self.runner.decode())

    def _fill(self, chunks: list) -> list[Sequence]:
        if chunks:
            self.runner.start_prefill(chunks)
        sequences = self.runner.chunked
        reads = self.runner.fill()
        if self.runner.prefill is None:
            for sequence in sequences:
                self.scheduler.chunk_done(sequence)
            for read in reads:
                self.scheduler.prompt_read(read)
        return self._accept(reads)

    def _attempt(
        self, run: Callable[[], list[Sequence]], involved: list[Sequence], abandon: Callable[[], None]
    ) -> list[Sequence]:
        """A pass; where it fails (memory, a rule of the user's) its sequences end with the error, no other does."""
        try:
            return run()
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            abandon()
            failed = [s for s in involved if s.finish_reason is None]
            for sequence in failed:
                sequence.flying = False
                self._finish(sequence, "error", message)
            return failed

    def _accept(self, reads: list[Read]) -> list[Sequence]:
        """Sample the next tokens of sequences whose newest ones have exited; they may end there."""
        free = [read for read in reads if read.error is None and read.sequence.params.free]
        drawn: dict[int, Drawn] = {}
        if free:
            rows = [read.sequence for read in free]
            places = [len(s.prompt) + len(s.new) - 1 for s in rows]
            logits = torch.stack([read.logits for read in free])
            tokens = draw_freely(logits, [s.params for s in rows], places, [s.seed for s in rows])
            drawn = {id(s): token for s, token in zip(rows, tokens, strict=True)}
        return [self._take(read, drawn.get(id(read.sequence))) for read in reads]

    def _take(self, read: Read, drawn: Drawn | None) -> Sequence:
        """Note the next token of a sequence, or the error that ends it."""
        sequence, params = read.sequence, read.sequence.params
        if read.error is not None:
            self._finish(sequence, "error", read.error)
            return sequence
        if drawn is None and params.plain and read.best is not None:
            drawn = Drawn(read.best)
        drawn = drawn or draw(read.logits, params, sequence.prompt, sequence.new, sequence.seed)
        sequence.note(read, drawn)
        ended = drawn.token in self._ends and not params.ignore_eos
        stopped = sequence.stream is not None and sequence.stream.push(drawn.token)
        if ended or stopped:
            self._finish(sequence, "stop")
        elif len(sequence.new) == params.max_tokens:
            self._finish(sequence, "length")
        return sequence

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason, sequence.error = reason, error
        if sequence.stream is not None:
            sequence.stream.end()
        others = [s for s in self.live[sequence.request] if s is not sequence]
        if others:
            self.live[sequence.request] = others
        else:
            del self.live[sequence.request]

    # --- checks ---

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but the engine has no tokenizer: Engine(model, tokenizer)")
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids, most = [int(token) for token in prompt], self.model.config.vocab_size - 1
        if not ids:
            raise ValueError("the prompt is empty; give at least one token (the bos token, for instance)")
        if min(ids) < 0 or max(ids) > most:
            raise ValueError(f"the prompt spans token ids {min(ids)}..{max(ids)}; they must lie in 0..{most}")
        return ids

    def _options(self, params: SamplingParams) -> DepthOptions:
        budget = params.depth_budget
        options = DepthOptions.gather(
            self.model.config,
            exit_threshold=params.exit_threshold,
            exit_rule=params.exit_rule,
            depth_budget=budget,
            min_loops=params.min_loops,
            max_loops=params.max_loops,
            prefill=params.prefill,
            kv_policy=self.kv_policy,
            budget_start=UNCALIBRATED if budget is None else starting_threshold(self.model, budget),
        )
        if options.num_loops > self.pool.num_loops:
            raise ValueError(
                f"max_loops is {options.num_loops}; this engine was made for {self.pool.num_loops}: raise its max_loops"
            )
        if params.prefill == "adaptive" and isinstance(options.rule, Confidence) and self.model.config.num_coda_layers:
            raise ValueError(
                "Confidence reads the coda's output, which has no parallel form (it sees the exits of the positions "
                "before): use prefill='full'"
            )
        return options

    def _adapter(self, params: SamplingParams) -> Adapter | None:
        if params.adapter is None:
            return None
        if params.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"adapter is {params.adapter!r}; this engine was made with {known}: Engine(adapters=...)")
        return self.adapters[params.adapter]


def _shift_seed(options: DepthOptions, index: int) -> DepthOptions:
    """Samples of one request draw their exits independently."""
    if not isinstance(options.rule, SampledExit):
        return options
    return replace(options, rule=SampledExit(int(options.rule.seed) + index))


def end_tokens(model: OuroForCausalLM) -> frozenset[int]:
    """The end tokens of the generation configuration, else of the model's."""
    settings = model.generation_config
    ends = model.config.eos_token_id if settings is None else settings.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)

"""What `benchmarks/engine.py` measures with: models of a shape, windows of ticks, costs of a loop and of the head.

Throughput is that of a window of ticks in the middle of long answers, so that neither prompts nor the ragged end of a
batch are in it; the mean depth is that of the tokens that were read in the window. Time is the thread's own, so that
of other processes it takes only what they do to the memory.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from decode import plain_decode, shaped_model
from torch import Tensor

from looplm import Engine, OuroForCausalLM, SamplingParams
from looplm.engine.kv_pool import KVPool
from looplm.engine.paged_pass import PagedPass
from looplm.engine.runner import Note, Runner
from looplm.engine.sequence import Read
from looplm.exits import SampledExit

HAZARD = 0.4
"""Of every loop where exits are drawn: of 4 loops the mean is 2.2."""
PROMPT = 16


def gated_model(width: int, layers: int) -> OuroForCausalLM:
    """A model of a shape whose gate says HAZARD whatever it reads."""
    model: OuroForCausalLM = shaped_model(width, layers, max_position_embeddings=1024)
    with torch.no_grad():
        model.model.early_exit_gate.weight.zero_()
        model.model.early_exit_gate.bias.fill_(math.log(HAZARD / (1 - HAZARD)))
    return model


@dataclass(frozen=True)
class Window:
    """What a window of ticks gave: new tokens a second of all rows, their mean depth, time outside the passes."""

    rate: float
    depth: float
    outside: float


class Holding(Runner):
    """A runner whose exits wait for each other, to meet the head in one product.

    Args:
        ticks, rows: read when the first has waited so many ticks, when so many wait, or when nothing is in flight.
    """

    def __init__(self, model: OuroForCausalLM, pool: KVPool, ticks: float, rows: float) -> None:
        super().__init__(model, pool)
        self.ticks, self.rows, self.now = ticks, rows, 0
        self.held: list[tuple[int, Tensor, PagedPass, Tensor, list[Note]]] = []

    def decode(self) -> list[Read]:
        """A tick; what was held is read where it is time."""
        self.now += 1
        super().decode()
        count = sum(len(notes) for *_, notes in self.held)
        if not self.held or (self.flight.sequences and count < self.rows and self.now - self.held[0][0] < self.ticks):
            return []
        _, states, (context, *_), rows, notes = zip(*self.held, strict=True)
        self.held = []
        return super()._read(torch.cat(states), context, torch.cat(rows), list(chain(*notes)))

    def _read(self, state: Tensor, context: PagedPass, rows: Tensor, notes: list[Note]) -> list[Read]:
        self.held.append((self.now, state, context, rows, notes))
        return []


def serve(
    model: OuroForCausalLM,
    rows: int,
    ticks: int,
    *,
    drawn: bool = False,
    hold: tuple[float, float] | None = None,
    staggered: bool = False,
    in_step: bool = True,
) -> Window:
    """Run `rows` requests for a window of ticks.

    Args:
        drawn: exits are drawn with HAZARD; else all loops are run.
        hold: `ticks` and `rows` of `Holding`.
        staggered: the requests come in T groups, each when the one before is in another loop; else all at once.
        in_step: whether full-depth rows wait for each other once, as the scheduler lets them.
    """
    loops, prompts = model.config.total_ut_steps, torch.randint(3, model.config.vocab_size, (rows, PROMPT))
    engine = Engine(model, kv_bytes=512 << 20, max_rows=rows, prefix_cache=False)
    engine.pool.core.zero_()  # memory is slow when it is first written, which an engine at work no longer sees
    if hold is not None:
        engine.runner = engine.scheduler.runner = Holding(model, engine.pool, *hold)
    if not in_step:
        engine.scheduler.in_step = lambda: False  # type: ignore[method-assign]
    sequences = []
    for seed, prompt in enumerate(prompts.tolist()):
        rule = SampledExit(seed) if drawn else None
        sequences += engine.prepare(prompt, SamplingParams(max_tokens=500, exit_rule=rule, ignore_eos=True))
    groups = loops if staggered else 1
    for group in range(groups):
        for sequence in sequences[group::groups]:
            engine.submit([sequence])
        for _ in range(loops + 1):
            engine.step()
    while not all(sequence.new for sequence in sequences):
        engine.step()
    for _ in range(2 * loops):  # drawn exits mix
        engine.step()
    before, inside = [len(sequence.new) for sequence in sequences], engine.runner.model_seconds
    began, watched = time.thread_time(), time.perf_counter()
    for _ in range(ticks):
        engine.step()
    seconds, watched = time.thread_time() - began, time.perf_counter() - watched
    depths = [d for s, start in zip(sequences, before, strict=True) for d in s.exit_depths[start:]]
    outside = 1 - (engine.runner.model_seconds - inside) / watched
    return Window(len(depths) / seconds, sum(depths) / len(depths), outside)


def plain_seconds(model: OuroForCausalLM, rows: int, tokens: int) -> float:
    """Seconds a step of the plain implementation: a long run less a run of one token."""
    ids, seconds = torch.randint(3, model.config.vocab_size, (rows, PROMPT)), []
    for count in (1, tokens + 1):
        seconds.append(best(partial(plain_decode, model, ids, count), 1))
    return (seconds[1] - seconds[0]) / tokens


def head_seconds(model: OuroForCausalLM, rows: int) -> float:
    """The read-out of some rows (product, fp32, argmax), its weight out of the caches, as a loop leaves it."""
    state, other = torch.randn(rows, 1, model.config.hidden_size).bfloat16(), torch.ones(64 << 20)
    with torch.no_grad():
        return best(lambda: model.lm_head(state).float().argmax(-1), 5, before=lambda: other.add_(1.0))


def read_bandwidth() -> float:
    """Bytes a second that a thread reads: the better of a sum and of a bf16 matrix-vector product, 512 MiB each."""
    numbers, matrix, vector = torch.ones(128 << 20), torch.ones(64 << 10, 4 << 10).bfloat16(), torch.ones(4 << 10)
    vector = vector.bfloat16()
    return max(numbers.nbytes / best(numbers.sum, 5), matrix.nbytes / best(lambda: torch.mv(matrix, vector), 5))


def best(run: Callable[[], object], times: int, before: Callable[[], object] = lambda: None) -> float:
    """Fewest seconds of several runs."""
    seconds = []
    for _ in range(times):
        before()
        began = time.thread_time()
        run()
        seconds.append(time.thread_time() - began)
    return min(seconds)


def bytes_a_token(model: OuroForCausalLM) -> int:
    """Weights read for a token at batch 1: every layer once a loop, the head once."""
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    return model.config.total_ut_steps * layers + model.lm_head.weight.nbytes

"""The engine's numbers, with their floors and aims: the table of docs/performance.md, in one run.

    python benchmarks/engine.py                  # 1024 x 12 (250M parameters) and 512 x 8, about ten minutes
    python benchmarks/engine.py --share-head     # also: exits that wait for each other to share a product with the head

bf16, 4 loops, vocabulary 49,152, random weights, one thread. What is compared takes turns in one process, and each
figure is its best turn. `plain` is the cached implementation of `benchmarks/decode.py`: every loop, one projection at a
time, a cache that concatenates. Where exits are drawn, every loop stops with probability 0.4, so the mean depth is 2.2;
the ideal over full depth is (T c_loop + c_head) / (m (c_loop + c_head)), because the head is streamed at nearly every
tick, with m and both costs measured in the run. Where rows wait until all agree, a new token starts when the deepest
row of the token before is through, and the head reads all rows at once.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from serving import PROMPT, Window, bytes_a_token, gated_model, head_seconds, plain_seconds, read_bandwidth, serve
from start import first_token

from looplm import Engine, OuroForCausalLM, SamplingParams
from looplm.engine.kv_pool import BLOCK
from looplm.files import write_json

SHAPES = {"250M": (1024, 12), "75M": (512, 8)}
ROWS = 16
NEVER = float("inf")


@dataclass(frozen=True)
class Number:
    """A row of the table; `value` True is `holds`, `less` is better. Without `floor` it is told, not judged."""

    shape: str
    what: str
    value: float
    unit: str = "x"
    floor: float | None = None
    aim: float | None = None
    less: bool = False

    @property
    def verdict(self) -> str:
        """What is reached: `aim`, `floor`, or `neither`."""
        if self.floor is None or self.aim is None:
            return ""
        sign = -1 if self.less else 1
        reached = [name for name in ("aim", "floor") if sign * self.value >= sign * getattr(self, name)]
        return reached[0] if reached else "neither"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=10, help="full-depth tokens of a row in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--share-head", action="store_true", help="also: exits that wait to share the head")
    parser.add_argument("--json", default="runs/benchmark-engine.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, numbers = Console(stderr=True), []
    for shape in options.shapes:
        model = gated_model(*SHAPES[shape])
        parts: dict[str, Callable[[], list[Number]]] = {
            "full depth and drawn exits": partial(throughput, model, shape, options.turns, options.tokens),
            "sharing the head": partial(share_head, model, shape, options.turns, options.tokens),
        }
        if not options.share_head:
            del parts["sharing the head"]
        if shape == options.shapes[-1]:
            parts |= {"memory": partial(memory, model, shape), "waiting requests": partial(waiting, model, shape)}
        for name, measure in parts.items():
            console.print(f"{shape}: {name} ...")
            numbers += measure()
    console.print("start to first token ...")
    numbers.append(
        Number("135M", "seconds from start to first token", min(first_token(options.turns)), "s", 20, 5, True)
    )
    console.print(f"written: {options.json}")
    write_json(options.json, [{**asdict(number), "verdict": number.verdict} for number in numbers])
    Console().print(_table(numbers))


def throughput(model: OuroForCausalLM, shape: str, turns: int, tokens: int) -> list[Number]:
    """Full depth against plain and against memory; drawn exits against the ideal and against lockstep."""
    loops, seconds, windows = model.config.total_ut_steps, dict[int, float](), dict[str, Window]()
    ticks, read = loops * tokens, 0.0
    for _ in range(turns):
        for rows in (1, 8, ROWS):
            plain = plain_seconds(model, rows, tokens)
            seconds[rows] = min(plain, seconds.get(rows, plain))
            _keep(windows, f"full {rows}", serve(model, rows, ticks))
        _keep(windows, "drawn", serve(model, ROWS, ticks, drawn=True))
        _keep(windows, "lockstep", serve(model, ROWS, ticks, drawn=True, hold=(NEVER, NEVER)))
        read = max(read, read_bandwidth())
    found = [
        Number(
            shape, f"full depth / plain, {rows} rows", windows[f"full {rows}"].rate * seconds[rows] / rows, "x", *goal
        )
        for rows, goal in {1: (2.0, 2.6), 8: (1.7, 2.2), ROWS: (1.4, 1.8)}.items()
    ]
    full, drawn, lockstep = windows[f"full {ROWS}"], windows["drawn"], windows["lockstep"]
    head = head_seconds(model, ROWS)
    loop, part = (ROWS / full.rate - head) / loops, head_seconds(model, round(ROWS / drawn.depth))
    possible = (loops * loop + head) / (drawn.depth * (loop + part))
    streamed = bytes_a_token(model) * windows["full 1"].rate
    return [
        *found,
        Number(shape, "weights streamed / read bandwidth, 1 row", streamed / read, "x", 0.60, 0.85),
        Number(shape, f"mean depth of drawn exits, {ROWS} rows", drawn.depth, ""),
        Number(shape, "drawn exits / full depth", drawn.rate / full.rate),
        Number(shape, "drawn exits / ideal", drawn.rate / full.rate / possible, "x", 0.90, 0.97),
        Number(shape, "drawn exits / waiting until all agree", drawn.rate / lockstep.rate, "x", 1.2, 1.5),
        Number(shape, f"time outside passes, full depth, {ROWS} rows", full.outside, "%", 0.05, 0.02, True),
        Number(shape, f"time outside passes, drawn exits, {ROWS} rows", drawn.outside, "%", 0.05, 0.02, True),
        Number(shape, "cost of the head / of a loop", head / loop),
    ]


def share_head(model: OuroForCausalLM, shape: str, turns: int, tokens: int) -> list[Number]:
    """Throughput where rows wait for each other to share a product with the head, over that where none waits."""
    ticks, windows = model.config.total_ut_steps * tokens, dict[str, Window]()
    drawn: dict[str, dict[str, Any]] = {
        "at once": {},
        "exits held a tick": {"hold": (1, NEVER)},
        "exits held two ticks, or until 8 wait": {"hold": (2, ROWS // 2)},
    }
    kinds: dict[str, dict[str, dict[str, Any]]] = {
        f"drawn exits, {ROWS} rows": {way: {"drawn": True, **fields} for way, fields in drawn.items()},
        "drawn exits, 4 rows": {way: {"drawn": True, "rows": 4, **fields} for way, fields in drawn.items()},
        f"full depth, {ROWS} rows": {
            "at once": {"staggered": True, "in_step": False},
            "newcomers wait until all start": {"staggered": True},
        },
    }
    for _ in range(turns):
        for kind, ways in kinds.items():
            for way, fields in ways.items():
                _keep(windows, kind + way, serve(model, **{"rows": ROWS, "ticks": ticks, **fields}))
    return [
        Number(shape, f"{kind}: {way}", windows[kind + way].rate / windows[f"{kind}at once"].rate)
        for kind, ways in kinds.items()
        for way in list(ways)[1:]
    ]


def memory(model: OuroForCausalLM, shape: str) -> list[Number]:
    """Bytes that 32 new positions take, `last` over `per_loop`."""
    grown = {}
    for policy in ("per_loop", "last"):
        engine = Engine(model, kv_policy=policy, kv_bytes=1 << 28, max_rows=1)
        [sequence] = engine.prepare(list(range(3, 3 + PROMPT)), SamplingParams(max_tokens=80, ignore_eos=True))
        engine.submit([sequence])
        held = []
        for filled in (PROMPT + 4, PROMPT + 4 + 2 * BLOCK):
            while sequence.filled < filled:
                engine.step()
            held.append(engine.pool.pages_in_use * engine.pool.page_bytes)
        grown[policy] = (held[1] - held[0]) / (2 * BLOCK)
    return [
        Number(
            shape, "bytes of a new token, last / per_loop", grown["last"] / grown["per_loop"], "x", 1 / 4, 1 / 4, True
        )
    ]


def waiting(model: OuroForCausalLM, shape: str) -> list[Number]:
    """64 requests at once and pages for 8: all end, first tokens come in the order of arrival, no page is left."""
    positions, loops = PROMPT + 12, model.config.total_ut_steps
    page = model.config.num_hidden_layers * BLOCK * 2 * model.config.hidden_size * 2
    budget = (8 * loops * -(-positions // BLOCK) + 2) * page
    engine, first, sequences = Engine(model, kv_bytes=budget, max_rows=ROWS, prefix_cache=False), [], []
    for prompt in torch.randint(3, model.config.vocab_size, (64, PROMPT)).tolist():
        sequences += engine.prepare(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        engine.submit(sequences[-1:])
    while engine.busy:
        first += sorted(s.request for s in engine.step() if len(s.new) == 1)
    holds = all(s.finish_reason == "length" for s in sequences) and engine.pool.pages_in_use == 0
    holds = holds and first == [s.request for s in sequences]
    return [Number(shape, "64 requests, a pool for 8: all end, in order, no block left", holds, "", True, True)]


def _keep(windows: dict[str, Window], name: str, window: Window) -> None:
    """The faster one stays."""
    if name not in windows or window.rate > windows[name].rate:
        windows[name] = window


def _table(numbers: list[Number]) -> Table:
    table = Table("Shape", "What", "Measured", "Floor", "Aim", "Reached")
    for column in table.columns[2:5]:
        column.justify = "right"
    for number in numbers:
        cells = (_shown(value, number.unit) for value in (number.value, number.floor, number.aim))
        table.add_row(number.shape, number.what, *cells, number.verdict)
    return table


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "holds" if value else "does not hold"
    return f"{value:.1%}" if unit == "%" else f"{value:.2f}{'x' if unit == 'x' else f' {unit}'.rstrip()}"


if __name__ == "__main__":
    main()

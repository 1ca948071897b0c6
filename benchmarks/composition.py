"""What the company of other rows changes: greedy answers of 16 prompts alone and together, in bf16 and in fp32.

    python benchmarks/composition.py runs/demo/model

Products over one row and over sixteen are summed in another order, so in bf16 nearly equal logits and gates close to
the threshold may fall differently, and from there on two answers go their own ways. Told are the share of all tokens
and exits that differ in the end, and, at positions whose past is still the same, the share of tokens and of exits that
are the first to differ, and the largest difference of a logit (beside the spread of the logits).
"""

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from looplm import Engine, OuroForCausalLM, SamplingParams
from looplm.engine.sequence import Read, Sequence
from looplm.files import write_json
from looplm.model.loading import load_model

PROMPTS = [
    "The state of the Union",
    "Fellow citizens,",
    "I have the honour to",
    "In the year that has passed, our trade with other nations",
    "Peace",
    "The Congress of the United States",
    "Our army and our navy are",
    "It is my duty to report that the public debt",
    "The people of this country",
    "Once upon a time there was",
    "What is the capital of France?",
    "There are three things that",
    "We must",
    "The law says that every man, woman and child",
    "For many years the river",
    "Money is",
]


class Recording(Engine):
    """An engine that keeps the logits of every token that it reads."""

    def __init__(self, model: OuroForCausalLM, rows: int) -> None:
        super().__init__(model, max_rows=rows, kv_bytes=1 << 28, prefix_cache=False)
        self.logits: dict[Sequence, list[Tensor]] = {}

    def _accept(self, reads: list[Read]) -> list[Sequence]:
        for read in reads:
            self.logits.setdefault(read.sequence, []).append(read.logits.float())
        return super()._accept(reads)


@dataclass(frozen=True)
class Answer:
    """Tokens and depths (N,) of one prompt, and logits (N, V)."""

    tokens: Tensor
    depths: Tensor
    logits: Tensor


def main() -> None:
    """Answer alone and together, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder with a trained model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--exit-threshold", type=float, default=0.5)
    parser.add_argument("--json", help="write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer = load_model(options.model, dtype)
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
        for threshold in (1.0, options.exit_threshold):
            params = SamplingParams(max_tokens=options.tokens, exit_threshold=threshold, ignore_eos=True)
            alone = [answer for prompt in prompts for answer in answers(model, [prompt], params)]
            found = compare(alone, answers(model, prompts, params))
            rows.append({"dtype": str(dtype).removeprefix("torch."), "exit_threshold": threshold, **found})
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if options.json:
        write_json(options.json, rows)


def answers(model: OuroForCausalLM, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
    """What the prompts get when they are answered together."""
    engine = Recording(model, len(prompts))
    sequences = [engine.prepare(prompt, params)[0] for prompt in prompts]
    for sequence in sequences:
        engine.submit([sequence])
    while engine.busy:
        engine.step()
    return [Answer(torch.tensor(s.new), torch.tensor(s.exit_depths), torch.stack(engine.logits[s])) for s in sequences]


def compare(first: list[Answer], second: list[Answer]) -> dict[str, float]:
    """Shares of what differs, and the largest difference of a logit, of pairs of answers of one length."""
    tokens = exits = new_tokens = new_exits = compared = total = 0
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        other_token, other_exit = a.tokens != b.tokens, a.depths != b.depths
        total, tokens, exits = total + len(a.tokens), tokens + int(other_token.sum()), exits + int(other_exit.sum())
        parted = (other_token | other_exit).nonzero()[:, 0].tolist()
        count = parted[0] + 1 if parted else len(a.tokens)
        compared += count
        new_tokens, new_exits = new_tokens + int(other_token[:count].sum()), new_exits + int(other_exit[:count].sum())
        alike = ~other_exit[:count]
        if bool(alike.any()):
            largest = max(largest, float((a.logits - b.logits)[:count][alike].abs().max()))
    return {
        "tokens_that_differ": tokens / total,
        "exits_that_differ": exits / total,
        "positions_with_the_same_past": compared,
        "first_tokens_to_differ": new_tokens / compared,
        "first_exits_to_differ": new_exits / compared,
        "largest_logit_difference": largest,
        "spread_of_the_logits": float(torch.cat([a.logits for a in first]).std()),
    }


if __name__ == "__main__":
    main()

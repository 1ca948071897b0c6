"""What a sweep over all depths costs: loops 1..8 from one pass, against its deepest run alone and each depth by itself.

    python benchmarks/sweep.py                        # a random model of 8 layers, width 512, 49,152 tokens
    python benchmarks/sweep.py --model FOLDER         # a model of one's own

Two kinds of requests. Multiple choice: contexts of 96 to 160 tokens and targets of 1 to 4, and only the targets meet
the head. Texts: every token is read, so that eight vocabulary products a position are paid instead of one. Text that is
generated has no sweep: each depth writes its own. The three ways take turns; reported are medians of ratios within a
round of processor time, and beside them what the multiplications say:

    sweep / deepest alone = (prelude + T loops + T codas + T r heads) / (prelude + T loops + coda + r heads)

with r the share of the positions that is read. A coda is run over all positions for each loop that is read.
"""

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Sequence

import torch

from looplm import OuroConfig, OuroForCausalLM
from looplm.evaluation.depths import Depth
from looplm.evaluation.scoring import Request, score
from looplm.model.loading import load_model
from looplm.training.planning import token_flops

LOOPS = 8


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model folder")
    parser.add_argument("--coda", type=int, default=0, help="coda layers of the random model, run at every loop read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load_model(options.model)[0] if options.model else random_model(options.coda)
    print(f"{'work':>18}{'sweep / deepest alone':>24}{'by count':>12}{'each alone / sweep':>22}")
    vocabulary = model.config.vocab_size
    choices = [draw(96, 160, 1, 4, n, vocabulary) for n in range(options.requests)]
    texts = [draw(1, 1, 127, 127, n, vocabulary) for n in range(options.requests)]
    for name, requests in (("multiple choice", choices), ("every token read", texts)):
        whole, apart = ratios(model, requests, options.rounds)
        print(f"{name:>18}{whole:>23.2f}x{counted(model.config, requests):>11.2f}x{apart:>21.2f}x", flush=True)


def random_model(coda: int) -> OuroForCausalLM:
    """A model of random weights in fp32."""
    torch.manual_seed(0)
    config = OuroConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_coda_layers=coda,
    )
    return OuroForCausalLM(config).eval()


def draw(least: int, most: int, shortest: int, longest: int, seed: int, vocabulary: int) -> Request:
    """A context and a target of random tokens."""
    chance = random.Random(seed)
    lengths = chance.randint(least, most), chance.randint(shortest, longest)
    context, target = ([chance.randrange(3, vocabulary) for _ in range(length)] for length in lengths)
    return context, target


def ratios(model: OuroForCausalLM, requests: Sequence[Request], rounds: int) -> tuple[float, float]:
    """Medians of sweep / deepest alone and of the sum of all depths alone / sweep."""
    every = [Depth(loop) for loop in range(1, LOOPS + 1)]
    seconds(model, requests[:2], every)
    whole, apart = [], []
    for _ in range(rounds):
        sweep = seconds(model, requests, every)
        alone = [seconds(model, requests, [depth]) for depth in every]
        whole.append(sweep / alone[-1])
        apart.append(sum(alone) / sweep)
    return statistics.median(whole), statistics.median(apart)


def counted(config: OuroConfig, requests: Sequence[Request]) -> float:
    """Sweep over its deepest run by the FLOPs of their multiplications, of inputs of this mean length."""
    tokens = sum(len(context) + len(target) - 1 for context, target in requests)
    read, keys = sum(len(target) for _, target in requests) / tokens, (tokens / len(requests) + 1) / 2
    head = 2 * config.vocab_size * config.hidden_size
    sweep, alone = (token_flops(config, LOOPS, reads, keys) - (1 - read) * reads * head for reads in (LOOPS, 1))
    return sweep / alone


def seconds(model: OuroForCausalLM, requests: Sequence[Request], depths: Sequence[Depth]) -> float:
    """Processor time of scoring the requests."""
    start = time.process_time()
    score(model, requests, depths, batch_size=8)
    return time.process_time() - start


if __name__ == "__main__":
    main()

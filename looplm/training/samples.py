"""Text that a trained model writes at several depths, for the screen and for the report.

Thresholds of the gate are found that give about all, three quarters and half of the loops a token; every prompt is
continued at each with early exit, so the loops after a token's exit are not run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from looplm.data.pipeline import IGNORED_LABEL, Windows, validation_batches
from looplm.display import depth_legend, depth_plain, depth_text
from looplm.exits import exit_cdf
from looplm.model.modeling import OuroForCausalLM
from looplm.model.text import continue_text
from looplm.training.run import PreparedData

PARTS = (1.0, 0.75, 0.5)
"""Mean depths aimed at, as parts of T."""

MAX_NEW_TOKENS = 70
PROMPT_TOKENS = 12
MOST_PROMPTS = 3


@dataclass(frozen=True)
class ThresholdChoice:
    """A threshold, and the mean depth that it was chosen for."""

    target_depth: float
    threshold: float


@torch.no_grad()
def choose_thresholds(model: OuroForCausalLM, data: PreparedData, length: int) -> list[ThresholdChoice]:
    """For each target depth the Q-exit threshold whose mean depth on validation text comes nearest.

    Every position's depth at threshold q is 1 + the number of loops t < T with CDF(t) < q, so the mean depth at q is
    1 + sum_t P(CDF(t) < q): a step function that is searched in steps of 0.005.
    """
    first = next(iter(data.sources.values())).validation
    batch = next(validation_batches(Windows(first, length, keep_remainder=True), 32, 1))
    out = model(batch["input_ids"].to(model.device), skip_logits=True)
    cdf = exit_cdf(out.gate_logits)[..., :-1].cpu()[batch["labels"] != IGNORED_LABEL].double()
    candidates = torch.cat((torch.linspace(0.005, 0.995, 199, dtype=torch.float64), torch.ones(1).double()))
    depths = torch.stack([1 + (cdf < q).double().sum(-1).mean() for q in candidates])
    targets = [part * model.config.total_ut_steps for part in PARTS]
    return [ThresholdChoice(target, float(candidates[int((depths - target).abs().argmin())])) for target in targets]


def held_out_prompts(data: PreparedData) -> list[str]:
    """How a held-out document of each source begins, or its conversation up to the first answer; the first sources."""
    return list(islice(_beginnings(data), MOST_PROMPTS))


def _beginnings(data: PreparedData) -> Iterator[str]:
    for source in data.sources.values():
        corpus = source.validation
        begin, end = int(corpus.offsets[0]) + 1, int(corpus.offsets[1])
        learnt = None if corpus.learnt is None else corpus.learnt[begin:end]
        length = PROMPT_TOKENS if learnt is None else int(learnt.argmax())
        text = str(data.tokenizer.decode(corpus.tokens[begin:end][:length].tolist()))
        if text.strip():
            yield text


def write_samples(
    model: OuroForCausalLM, data: PreparedData, length: int, prompts: Sequence[str], console: Console
) -> list[dict[str, Any]]:
    """Continue the prompts at each threshold, show them, and return the report's `generations`.

    Prompts that leave no room in the context are passed over; a gate that pools over positions cannot exit early while
    it writes, and gives none.

    Args:
        length: of the validation windows that thresholds are found on.
    """
    if model.config.exit_gate_pooling != "token":
        return []
    model.eval()
    for module in model.modules():  # single tokens are not worth a compiled graph of their own
        module._compiled_call_impl = None
    room = model.config.max_position_embeddings - MAX_NEW_TOKENS
    fitting = [p for p in prompts if len(data.tokenizer(p, add_special_tokens=False)["input_ids"]) <= room]
    return [_generate(model, data, choice, fitting, console) for choice in choose_thresholds(model, data, length)]


def say(console: Console, *parts: str | Text) -> None:
    """Print as it is: text may hold brackets and colons, a path must not be broken."""
    console.print(*parts, sep="", markup=False, emoji=False, highlight=False, soft_wrap=True)


def _generate(
    model: OuroForCausalLM, data: PreparedData, choice: ThresholdChoice, prompts: Sequence[str], console: Console
) -> dict[str, Any]:
    """Continue the prompts at one threshold, show them, and return the report's entry."""
    loops = model.config.total_ut_steps
    texts = [
        continue_text(
            model,
            data.tokenizer,
            prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            exit_threshold=choice.threshold,
            temperature=0.7,
            top_p=0.9,
            seed=index,
        )
        for index, prompt in enumerate(prompts)
    ]
    count = sum(len(text.tokens) for text in texts)
    mean = sum(text.mean_depth * len(text.tokens) for text in texts) / max(count, 1)
    say(console, f"\nthreshold {choice.threshold:.3f}: {mean:.2f} loops a token")
    if console.color_system is not None:
        console.print(depth_legend(loops))
    for text in texts:
        shown = depth_plain(text.tokens) if console.color_system is None else depth_text(text.tokens, loops)
        say(console, Text(text.prompt, "bold"), shown)
    return {
        "target_depth": choice.target_depth,
        "threshold": choice.threshold,
        "mean_depth": mean,
        "prompts": [
            {
                "prompt": text.prompt,
                "tokens": [{"text": piece, "depth": depth} for piece, depth in text.tokens],
                "mean_depth": text.mean_depth,
            }
            for text in texts
        ],
    }

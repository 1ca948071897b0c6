"""How right a model is on held-out problems, and how deep it goes for it.

Greedy tokens; exits as the mode that is measured has them. Outcomes are kept problem by problem, so that two models, or
two depths of one, can be compared on the same problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from looplm.model.modeling import OuroForCausalLM
from looplm.tuning.problems import Problem
from looplm.tuning.rewards import Rewards
from looplm.tuning.rollouts import Drawing, roll_out

_ROWS = 256
"""Problems answered at once."""


@dataclass(frozen=True)
class HeldOut:
    """What became of held-out problems.

    Attributes:
        outcome: mean outcome; of problems that could not be scored: 0.
        mean_depth: loops a generated token was read at.
        length: tokens an answer.
        outcomes, depths: problem by problem; `depths` are the means of their tokens.
    """

    outcome: float
    mean_depth: float
    length: float
    outcomes: list[float]
    depths: list[float]


def prompt_ids(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a model is given: ids as they are, text as it is, a conversation in the chat template."""
    prompt = problem.prompt
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=False)
    if isinstance(prompt[0], int):
        return list(prompt)
    messages = prompt
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(cast("Any", encoded)["input_ids"])


def measure_held_out(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rewards: Rewards,
    drawing: Drawing,
) -> HeldOut:
    """Answer and score problems; sampled exits have the problem's number as their seed."""
    outcomes, depths, lengths = [], [], []
    for start in range(0, len(problems), _ROWS):
        part = problems[start : start + _ROWS]
        prompts = [prompt_ids(problem, tokenizer) for problem in part]
        samples = roll_out(model, prompts, range(start, start + len(part)), drawing)
        texts = tokenizer.batch_decode([s.tokens for s in samples], skip_special_tokens=True)
        found = rewards(part, texts, [s.tokens for s in samples]).outcomes
        outcomes += [value if value == value else 0.0 for value in found]
        depths += [sum(s.loops) / len(s.loops) for s in samples]
        lengths += [len(s.loops) for s in samples]
    total = sum(lengths)
    loops = sum(depth * length for depth, length in zip(depths, lengths, strict=True))
    return HeldOut(sum(outcomes) / len(outcomes), loops / total, total / len(lengths), outcomes, depths)

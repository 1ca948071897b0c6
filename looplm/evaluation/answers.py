"""Two-choice questions, what every loop answers, and the state it answers from: what the faithfulness study reads.

An answer is the choice whose first token has the higher logit at the last position of the prompt, after every loop
(Ouro section 7.2 asks for one word, "True" or "False"). All questions of a study have the same two choices, so that a
probe's label is a meaning and not a place. Questions are token ids; `encode` makes them of text, `load_questions` of a
file of multiple-choice items or of question pairs.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from looplm.evaluation.items import Item, json_lines, load_choices
from looplm.evaluation.scoring import choice_requests
from looplm.model.modeling import OuroForCausalLM
from looplm.model.readout import run_loops

PAIR_COLUMNS = ("question1", "question2", "is_duplicate")
"""Of a file of question pairs, as Quora's is published."""
PAIR_PROMPT = (
    "Question 1: {question1}\nQuestion 2: {question2}\nDo the two questions have the same intent? Answer True or False."
    "\nAnswer:"
)
"""The paper asks Ouro whether two questions have the same intent, True or False; the wording is ours."""
PAIR_CHOICES = ("False", "True")
BATCH_TOKENS = 4096
"""Tokens of one pass, padding included."""


@dataclass(frozen=True)
class TwoChoice:
    """A question of which the model answers one of two tokens.

    Attributes:
        prompt: token ids, at least one.
        choices: the ids of the two answers; an answer is False for the first and True for the second.
        answer: the right one, where it is known.
    """

    prompt: tuple[int, ...]
    choices: tuple[int, int]
    answer: bool | None = None


@dataclass(frozen=True)
class Answers:
    """N questions through T loops of L layers; everything at the last position of the prompt.

    Attributes:
        margins: (N, T), logit of the second choice less that of the first.
        layers: (N, T, L, D) fp32 on the CPU, the state after every layer of every loop, before the loop's norm.
        states: (N, T, D) in the model's dtype, the state after every loop, as the next one gets it.
    """

    margins: Tensor
    layers: Tensor
    states: Tensor

    @property
    def given(self) -> Tensor:
        """(N, T) bool, whether the answer is the second choice; a tie is the first."""
        return self.margins > 0


def load_questions(path: str | Path) -> list[Item]:
    """Two-choice items of a file: question pairs (CSV, TSV or JSON lines) or multiple choice (see `items`).

    Raises:
        ValueError: no such file, a line that cannot be read (with its number), or an item of more than two choices.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}; give JSON lines of multiple choice, or a table of question pairs")
    if path.suffix in (".csv", ".tsv"):
        return list(_pairs(path, _table(path)))
    if path.suffix == ".jsonl" and _first_has_pair(path):
        return list(_pairs(path, json_lines(path)))
    items = load_choices(path)
    for item in items:
        if len(item.choices) != 2:
            raise ValueError(f"{path}: item {item.id} has {len(item.choices)} choices; this study takes two of them")
    return items


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = reader.fieldnames or []
        missing = [name for name in PAIR_COLUMNS if name not in names]
        if missing:
            raise ValueError(
                f"{path} line 1 has no column {missing[0]!r} (it has {', '.join(names) or 'none'}); "
                f"a table of question pairs needs {', '.join(PAIR_COLUMNS)}"
            )
        for row in reader:
            yield reader.line_num, row


def _first_has_pair(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        return PAIR_COLUMNS[0] in json.loads(line)
    except (json.JSONDecodeError, TypeError):
        return False  # `load_choices` says what is wrong


def _pairs(path: Path, rows: Iterator[tuple[int, Any]]) -> Iterator[Item]:
    """The prompt of each question pair."""
    count = 0
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is no JSON object")
        questions = [row.get(name) for name in PAIR_COLUMNS[:2]]
        answer = str(row.get("is_duplicate")).strip()
        for name, question in zip(PAIR_COLUMNS, questions, strict=False):
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"{path} line {number} has no text {name!r}")
        if answer not in ("0", "1"):
            raise ValueError(f"{path} line {number}: is_duplicate is {answer!r}; it must be 0 or 1")
        count += 1
        first, second = (str(question).strip() for question in questions)
        prompt = PAIR_PROMPT.format(question1=first, question2=second)
        yield Item(str(row.get("id") or number), prompt, PAIR_CHOICES, int(answer))
    if not count:
        raise ValueError(f"{path} has no question pairs")


def encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[TwoChoice]:
    """Items as token ids; the choices may stand in either order, the first item's is kept.

    Raises:
        ValueError: no items, items with other choices than the first one's, choices that begin with the same token.
    """
    if not items:
        raise ValueError("no items; give at least one question of two choices")
    names, found = items[0].choices, []
    requests = choice_requests(tokenizer, items)
    for item, first, second in zip(items, requests[::2], requests[1::2], strict=True):
        if sorted(item.choices) != sorted(names):
            raise ValueError(
                f"item {item.id} has the choices {item.choices!r}, the first item {names!r}; "
                "all questions of this study need the same two"
            )
        turned = item.choices != names
        ids = (second[1][0], first[1][0]) if turned else (first[1][0], second[1][0])
        if ids[0] == ids[1]:
            raise ValueError(f"item {item.id}: the choices {item.choices!r} begin with the same token; use other words")
        found.append(TwoChoice(tuple(first[0]), ids, bool(item.answer) != turned))
    return found


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """The places of inputs of these lengths in passes of at most `BATCH_TOKENS`, padding included, short ones first."""
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if found and (len(found[-1]) + 1) * lengths[place] <= BATCH_TOKENS:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, S), padded on the right where a causal model never looks, and the last place of each row (B,)."""
    width = max(map(len, prompts))
    rows = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    return torch.tensor(rows), torch.tensor([len(prompt) - 1 for prompt in prompts])


def margins_of(reads: Sequence[Tensor], head: Tensor, last: Tensor, questions: Sequence[TwoChoice]) -> Tensor:
    """(B, T), logit of the second choice less that of the first at the last place of each row.

    Args:
        reads: T tensors (B, S, D), what the head reads.
        head: (V, D).
    """
    every = torch.arange(len(last), device=head.device)
    first, second = (torch.tensor([question.choices[n] for question in questions]) for n in (0, 1))
    wide = torch.float64 if head.dtype == torch.float64 else torch.float32
    direction = head[second].to(wide) - head[first].to(wide)
    return torch.stack([(read[every, last].to(wide) * direction).sum(-1) for read in reads], dim=1)


@torch.no_grad()
def read_answers(
    model: OuroForCausalLM,
    questions: Sequence[TwoChoice],
    loops: int,
    report: Callable[[float], None] = lambda share: None,
) -> Answers:
    """Run every question through all loops and keep what it answers and from which states.

    Raises:
        ValueError: as `run_loops`.
        FloatingPointError: states that are not finite.
    """
    count, layers = len(questions), model.config.num_hidden_layers
    width, done = model.config.hidden_size, 0
    margins = torch.empty(count, loops)
    kept = torch.empty(count, loops, layers, width)
    states = torch.empty(count, loops, width, dtype=model.dtype)
    for places in batches([len(question.prompt) for question in questions]):
        chosen = [questions[place] for place in places]
        ids, last = padded([question.prompt for question in chosen])
        every = torch.arange(len(places))
        with _layers_kept(model, every, last) as seen, beyond_training():
            run = run_loops(model, ids, loops, "a question")
        margins[places] = margins_of(run.reads, model.lm_head.weight, last, chosen).float().cpu()
        kept[places] = torch.stack(seen, dim=1).unflatten(1, (loops, layers))
        states[places] = torch.stack([state[every, last] for state in run.states], dim=1).cpu()
        done += len(places)
        report(done / count)
    if not bool(torch.isfinite(kept).all() and torch.isfinite(margins).all()):
        raise FloatingPointError("the states of a question are not finite; check the weights")
    return Answers(margins, kept, states)


@contextmanager
def _layers_kept(model: OuroForCausalLM, rows: Tensor, last: Tensor) -> Iterator[list[Tensor]]:
    """A list that fills with the states (B, D) at the last places, layer by layer and loop by loop."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output[rows, last].float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def beyond_training() -> Iterator[None]:
    """Let loops beyond the trained depth run without a warning: the tables mark them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="running .* loops, but the model was trained with")
        yield

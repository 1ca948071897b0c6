"""The safety study (Ouro section 7.1): how often a model does harm when asked to, by the number of loops it runs.

Every prompt is completed greedily at every fixed depth, beyond the trained one too; a judge says which completions are
harmful (the paper: share of grade 5, falling with loops, also beyond the trained four). Rates carry Wilson's intervals:
0 of 330 is compatible with 1.2 %.

Completions and verdicts are kept in the user's folder as they come, under digests of everything that they depend on.
Whatever stops a run, the same command goes on behind it; another judge gets the same completions. They hold what
the model was asked and what it said: keep that folder to yourself. The result file holds numbers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from looplm.evaluation.answers import beyond_training
from looplm.evaluation.intervals import Share, share
from looplm.evaluation.judges import Judge, JudgeUnavailable, Verdict
from looplm.evaluation.planes import Plane, planes, prompt_states
from looplm.evaluation.prompts import Prompt
from looplm.evaluation.recipe import digest
from looplm.model.modeling import OuroForCausalLM
from looplm.training.tracking import MetricsLog

Report = Callable[[float], None]
BATCH = 8
"""Prompts completed at once."""
Completed = dict[tuple[int, int], str]
"""Completions by the place of the prompt and the number of loops."""


@dataclass(frozen=True)
class Rate:
    """Completions with one number of loops.

    Attributes:
        harmful: of those that the judge could sort.
        unread: completions on which the judge's reply held no grade; they count nowhere else.
        empty: completions without a word; they count as harmless.
    """

    loops: int
    harmful: Share
    unread: int
    empty: int


@dataclass(frozen=True)
class Safety:
    """What the study found.

    Attributes:
        judge: its name; measures: what the rates are shares of.
        trained_loops: of the configuration.
        prompts, benign: harmful prompts, which are completed, and benign ones, which are only shown in the planes.
        rates: by loops; planes: by loop.
        kinds: whether each point of a plane is a harmful prompt.
    """

    judge: str
    measures: str
    trained_loops: int
    prompts: int
    benign: int
    rates: list[Rate]
    planes: list[Plane]
    kinds: list[bool]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; no prompt and no completion is among them."""
        return asdict(self)


def study(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    judge: Judge,
    loops: Sequence[int],
    folder: Path,
    *,
    model_key: str,
    max_new_tokens: int = 128,
    chat: bool = True,
    report: Callable[[str, float], None] = lambda phase, share: None,
) -> Safety:
    """Complete harmful prompts at every depth, have them judged, and see where the states put both kinds.

    Args:
        loops: fixed depths.
        folder: that keeps `completions.jsonl` and `verdicts.jsonl`.
        model_key: what tells this model from others, its fingerprint.
        chat: wrap prompts in the tokenizer's chat template, where it has one.
        report: called with the phase and the share of it that is done.

    Raises:
        ValueError: a prompt that leaves no room. JudgeUnavailable: see `judge_all`.
    """
    kinds = [True] * len(harmful) + [False] * len(benign)
    ids = encode_prompts(model, tokenizer, [*harmful, *benign], max_new_tokens, chat)
    states = prompt_states(model, ids, max(loops), lambda part: report("states", part))
    completed = complete(
        model,
        tokenizer,
        ids[: len(harmful)],
        loops,
        folder / "completions.jsonl",
        model_key=model_key,
        max_new_tokens=max_new_tokens,
        report=lambda part: report("completions", part),
    )
    path = folder / "verdicts.jsonl"
    verdicts = judge_all(judge, harmful, completed, path, lambda part: report("verdicts", part))
    return Safety(
        judge.name,
        judge.measures,
        model.config.total_ut_steps,
        len(harmful),
        len(benign),
        rates(completed, verdicts),
        planes(states, kinds),
        kinds,
    )


def encode_prompts(
    model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], room: int, chat: bool
) -> list[list[int]]:
    """Token ids of each prompt, in the model's chat template where `chat` and where it has one.

    Args:
        room: tokens that are to come.

    Raises:
        ValueError: a prompt that leaves no room in the context.
    """
    found, limit = [], model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, start=1):
        text = prompt.text
        if chat and tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) + room > limit or not ids:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens and {room} are to come, but the context holds {limit}; "
                "lower max-new-tokens or leave the prompt out"
            )
        found.append(ids)
    return found


def complete(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    loops: Sequence[int],
    path: Path,
    *,
    model_key: str,
    max_new_tokens: int,
    report: Report = lambda share: None,
) -> Completed:
    """Greedy completions at every depth, read from `path` where they are, else made batch by batch and added to it.

    Batches of `BATCH` rows depend on the prompts alone, so a run that was stopped gives what one without a stop gives.

    Args:
        prompts: token ids. path: of a JSON Lines file.
        model_key: what tells this model from others, its fingerprint.
    """

    def key(place: int, number: int) -> str:
        return digest([model_key, str(model.dtype), list(prompts[place]), number, max_new_tokens])

    known = {record["key"]: record["text"] for record in _records(path)}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    plan = [(n, order[first : first + BATCH]) for n in loops for first in range(0, len(order), BATCH)]
    found: Completed = {}
    with MetricsLog(path) as log:
        for done, (number, places) in enumerate(plan, start=1):
            keys = [key(place, number) for place in places]
            if not all(name in known for name in keys):
                texts = _generate(model, tokenizer, [prompts[place] for place in places], number, max_new_tokens)
                for name, text in zip(keys, texts, strict=True):
                    if name not in known:
                        known[name] = text
                        log.write({"key": name, "loops": number, "text": text})
            found |= {(place, number): known[name] for place, name in zip(places, keys, strict=True)}
            report(done / len(plan))
    return found


def _generate(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    loops: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of prompts padded on the left."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with beyond_training():
        new = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            num_loop_steps=loops,
            adaptive_loop=False,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
    return [str(text) for text in tokenizer.batch_decode(new[:, width:], skip_special_tokens=True)]


def judge_all(
    judge: Judge, prompts: Sequence[Prompt], completed: Completed, path: Path, report: Report = lambda share: None
) -> dict[tuple[int, int], Verdict]:
    """A verdict on every completion, read from `path` where it is, else asked for and added to it one by one.

    Raises:
        JudgeUnavailable: the judge has stopped answering; the message says how much is kept.
    """
    known = {record["key"]: Verdict(record["harmful"], record["grade"]) for record in _records(path)}
    found: dict[tuple[int, int], Verdict] = {}
    try:
        with MetricsLog(path) as log:
            for done, (place, text) in enumerate(completed.items(), start=1):
                prompt = prompts[place[0]].text
                key = digest([judge.name, prompt, text])
                if key not in known:
                    known[key] = judge(prompt, text)
                    log.write({"key": key, **asdict(known[key])})
                found[place] = known[key]
                report(done / len(completed))
    except JudgeUnavailable as error:
        raise JudgeUnavailable(
            f"{error}; {len(completed)} completions and {len(found)} verdicts are kept in {path.parent}: "
            "the same command goes on from there"
        ) from None
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; one that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]


def rates(completed: Completed, verdicts: dict[tuple[int, int], Verdict]) -> list[Rate]:
    """The rate of every depth."""
    found = []
    for loops in sorted({number for _, number in completed}):
        here = [place for place in completed if place[1] == loops]
        said = [verdicts[place].harmful for place in here]
        empty = sum(not completed[place].strip() for place in here)
        found.append(Rate(loops, share(said.count(True), len(said) - said.count(None)), said.count(None), empty))
    return found

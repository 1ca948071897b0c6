"""Environments: problems with verifiable answers, shared out to training and test, and the score of a completion.

Three kinds: families of reasoning-gym, records of any source that `looplm train` reads, and the lab's tasks as token
ids. No prompt is on both sides. For text the side is a function of the text alone (`looplm.data.splitting`), so it does
not change with the order or with what else is there; a conversation that is held out in `looplm sft` is held out here.
The lab shares out its items itself, by their canonical form. Loads no torch.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from looplm.data.chat import ASSISTANT, Document, check_conversation
from looplm.data.gym import open_family
from looplm.data.settings import LocationSettings, SourceSettings
from looplm.data.sources import Record, check_text, names_of, open_source
from looplm.data.splitting import content_number
from looplm.lab.tasks import Batch, Split, Task, make_task
from looplm.tuning.problems import EnvironmentSettings, Problem, ProblemSource, Prompt, Score
from looplm.tuning.scorers import UnparseableError, open_gym, open_stated, open_tokens

_CHECKED = 32
"""Problems whose own answer must score 1 before a family is used."""


@dataclass(frozen=True)
class Environment:
    """Problems and their own score.

    Attributes:
        name: what a report calls it.
        train, test: problems in the order they were made or read; no prompt is in both.
        open_score: opens its own score, where that is to run.
        isolated: whether scoring runs other people's code on what a model has written, which may hang.
        counts: problems read, and those left out, by reason.
    """

    name: str
    train: list[Problem]
    test: list[Problem]
    open_score: Callable[[], Score]
    isolated: bool
    counts: dict[str, int]

    @cached_property
    def _score(self) -> Score:
        return self.open_score()

    def score(self, problem: Problem, text: str, token_ids: Sequence[int]) -> float:
        """The environment's own reward of a completion, 0 to 1, in this process; 0 for one that cannot be read.

        Args:
            problem: one of this environment's.
            text: the completion without special tokens.
            token_ids: its tokens.
        """
        try:
            return self._score(problem, text, token_ids)
        except UnparseableError:
            return 0.0


class _Found(NamedTuple):
    """A problem before it is shared out."""

    problem: Problem
    held_out: bool


def open_environment(settings: EnvironmentSettings) -> Environment:
    """Make or read the problems of an environment and share them out.

    Raises:
        ValueError: an unknown family, task or option, a missing package, file or field, a family whose own answers do
            not score 1, or too few problems for both sides.
    """
    score: Callable[[], Score]
    if settings.reasoning_gym is not None:
        found, score = _of_gym(settings), partial(open_gym, settings.reasoning_gym, settings.options)
    elif settings.source is not None:
        found, score = _of_source(settings.source, settings), open_stated
    else:
        found, score = _of_lab(settings), open_tokens
    train, test, counts = _shared_out(found)
    for side, problems in (("training", train), ("test", test)):
        if not problems:
            raise ValueError(
                f"environment {settings.name}: {len(train) + len(test)} different problems, none of them for {side}; "
                f"give more problems, or another held_out_every than {settings.held_out_every}"
            )
    return Environment(settings.name, train, test, score, settings.reasoning_gym is not None, counts)


def _shared_out(found: Iterable[_Found]) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """Both sides without repetitions; a prompt with two answers is left out, and one held out anywhere is held out."""
    problems: dict[str, Problem] = {}
    held_out, ambiguous, counts = set[str](), set[str](), Counter[str](read=0)
    for problem, is_held_out in found:
        counts["read"] += 1
        key = json.dumps(problem.prompt)
        if is_held_out:
            held_out.add(key)
        first = problems.setdefault(key, problem)
        if first is not problem:
            counts["left out: repeated"] += 1
            if first.answer != problem.answer:
                ambiguous.add(key)
    if ambiguous:
        counts["left out: several answers to one prompt"] = len(ambiguous)
    sides: dict[bool, list[Problem]] = {False: [], True: []}
    for key, problem in problems.items():
        if key not in ambiguous:
            sides[key in held_out].append(problem)
    return sides[False], sides[True], dict(counts)


def _of_gym(settings: EnvironmentSettings) -> Iterator[_Found]:
    assert settings.reasoning_gym is not None
    data = open_family(settings.reasoning_gym, settings.size, settings.seed, settings.options)
    for place in range(len(data)):
        try:
            entry = data[place]
            own = data.score_answer(answer=entry["answer"], entry=entry) if place < _CHECKED else 1.0
        except Exception as error:  # whatever a family raises over its options
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"environment {settings.name}: problem {place} cannot be made: {reason}") from None
        question, answer = entry["question"], entry["answer"]
        if own != 1.0:
            raise ValueError(
                f"environment {settings.name}: its own answer {answer!r} to problem {place} does not score 1, so no "
                "reward of it can be trusted; choose another family or other options"
            )
        problem = Problem(_prompt(question, settings, "question"), answer, entry)
        yield _Found(problem, content_number(question) % settings.held_out_every == 0)


def _of_lab(settings: EnvironmentSettings) -> Iterator[_Found]:
    assert settings.lab is not None
    task = make_task(settings.lab, **settings.options)
    test = settings.size // settings.held_out_every
    sizes: dict[Split, int] = {"train": settings.size - test, "test": test}
    for split, size in sizes.items():
        if size:
            batch = task.batch(settings.seed, 0, size, split)
            yield from (_Found(_lab_problem(task, batch, row), split == "test") for row in range(size))


def _lab_problem(task: Task, batch: Batch, row: int) -> Problem:
    """Row `row` of a batch: the tokens before its first graded target, and the graded targets."""
    graded = batch["answer"][row]
    answer = batch["targets"][row][graded]
    return Problem(
        prompt=batch["tokens"][row][: int(np.flatnonzero(graded)[0]) + 1].tolist(),
        answer=task.text(answer),
        entry={"difficulty": int(batch["difficulty"][row])},
        answer_tokens=answer.tolist(),
    )


def _of_source(source: ProblemSource, settings: EnvironmentSettings) -> Iterator[_Found]:
    where = {name: getattr(source, name) for name in LocationSettings.model_fields}
    for record in open_source(settings.name, SourceSettings(**where)).records():
        document, prompt, answer = _question(record, source)
        problem = Problem(_prompt(prompt, settings, record.where), answer, record.fields)
        yield _Found(problem, content_number(document) % settings.held_out_every == 0)


def _question(record: Record, source: ProblemSource) -> tuple[Document, Document, str]:
    """What decides the side, the prompt, and the answer of a record; a conversation may end with its answer."""
    asked, where = _field(record, source.prompt_field), f"{record.where}, field {source.prompt_field!r}"
    document: Document
    prompt: Document
    said = None
    if isinstance(asked, list):
        document = prompt = check_conversation(asked, where, answered=False)
        for message in document:
            check_text(message["content"], where)
        if document and document[-1]["role"] == ASSISTANT:
            prompt, said = document[:-1], document[-1]["content"]
    else:
        document = prompt = check_text(asked, where)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"{where}: the prompt is empty; leave the record out")
    if source.answer_field is None:
        if said is None:
            raise ValueError(f"{where}: does not end with an answer; name its field as answer_field: {_fields(record)}")
        return document, prompt, said
    answer = _field(record, source.answer_field)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(
            f"{record.where}, field {source.answer_field!r}: {answer!r} is no answer; text or a number is needed"
        )
    return document, prompt, str(answer)


def _field(record: Record, path: str) -> Any:
    """A field of a record; dots reach into nested ones."""
    value: Any = record.fields
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{record.where}: no field {path!r}; {_fields(record)}")
        value = value[name]
    return value


def _fields(record: Record) -> str:
    nested = [f"{name}.{below}" for name, value in record.fields.items() if isinstance(value, dict) for below in value]
    return f"fields are {names_of([*record.fields, *nested])}"


def _prompt(asked: Document, settings: EnvironmentSettings, where: str) -> Prompt:
    """The question as the model gets it."""
    after = "" if settings.suffix is None else f"\n{settings.suffix}"
    if isinstance(asked, str):
        if settings.raw:
            return asked + after
        messages = [{"role": "user", "content": asked}]
    elif settings.raw:
        raise ValueError(f"{where}: a list of messages, and raw is for text; drop raw, the chat template writes them")
    else:
        messages = [{"role": message["role"], "content": message["content"]} for message in asked]
    messages[-1]["content"] += after
    if settings.system is not None:
        if messages[0]["role"] == "system":
            raise ValueError(f"{where}: has a system message of its own; drop system")
        messages.insert(0, {"role": "system", "content": settings.system})
    return messages

"""Items of a task: multiple choice or question and answer, from JSON lines or from a BIG-bench task.json.

A JSON line of multiple choice has `question` (or `prompt`), `choices` (a list of texts) and `answer` (the place of the
right one, counted from 0, or its text); one of question and answer has `question` (or `prompt`) and `answer` (a text,
or a list of texts that are all right). Both may have `id` and `category` (or `subject`). A file holds one kind.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISSING = object()


@dataclass(frozen=True)
class Item:
    """A multiple-choice item; each choice is scored as the continuation " " + choice of the prompt.

    Attributes:
        id: its name within the file.
        prompt: the text before the choice, without white space at its end.
        choices: at least two texts.
        answer: place of the right choice, counted from 0.
        category: what gains are grouped by, where the file says.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    category: str | None = None

    def continuations(self) -> list[str]:
        """What is scored behind the prompt, a text a choice."""
        return [f" {choice}" for choice in self.choices]


@dataclass(frozen=True)
class Question:
    """A question with a free answer.

    Attributes:
        id, prompt, category: as in `Item`.
        answers: the texts that are right, at least one.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    category: str | None = None


def load_items(path: str | Path) -> list[Item] | list[Question]:
    """The items of a JSON Lines file, or of a BIG-bench task.json (told apart by their suffix).

    Raises:
        ValueError: no such file, no items, a line that is not as described above (with its number), two kinds in one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}; give JSON lines (.jsonl) or a BIG-bench task.json")
    if path.suffix == ".json":
        return load_bigbench(path)
    items = [_record(record, f"{path} line {number}", str(number)) for number, record in json_lines(path)]
    return _one_kind(items, str(path))


def items_of(rows: Iterable[Mapping[str, Any]], name: str) -> list[Item] | list[Question]:
    """The items of rows with the fields of a JSON line. Raises ValueError as `load_items`."""
    return _one_kind([_record(row, f"{name} row {n}", str(n)) for n, row in enumerate(rows, start=1)], name)


def load_choices(path: str | Path) -> list[Item]:
    """As `load_items`, for what needs choices. Raises ValueError where the file asks for free answers."""
    items = load_items(path)
    chosen = [item for item in items if isinstance(item, Item)]
    if len(chosen) < len(items):
        raise ValueError(f"{path} has free answers; this needs multiple choice: a list 'choices' on every line")
    return chosen


def load_bigbench(path: str | Path) -> list[Item] | list[Question]:
    """The examples of a BIG-bench JSON task: `target_scores` make choices, `target` a free answer.

    The prompt is laid out as BIG-bench does: `task_prefix`, `example_input_prefix` ("\\nQ: "), the input, the choices
    where `append_choices_to_input` (true) says so, each behind `choice_prefix` ("\\n  choice: "), and
    `example_output_prefix` ("\\nA: ").

    Raises:
        ValueError: not such a file, or an example whose best choice is not one alone.
    """
    path = Path(path)
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(task, dict) or not isinstance(task.get("examples"), list) or not task["examples"]:
        raise ValueError(f"{path} is no BIG-bench task: it has no list 'examples' with at least one example")
    name = str(task.get("name") or path.parent.name)
    examples = enumerate(task["examples"], start=1)
    return _one_kind([_example(e, task, f"{path} example {n}", f"{name}-{n}") for n, e in examples], str(path))


def _example(example: Any, task: dict[str, Any], where: str, name: str) -> Item | Question:
    if not isinstance(example, dict) or not isinstance(example.get("input"), str):
        raise ValueError(f"{where} has no text 'input'")
    category = example.get("comment") if isinstance(example.get("comment"), str) else None
    scores = example.get("target_scores")
    choices = tuple(str(choice) for choice in scores) if isinstance(scores, dict) else ()
    listed = ""
    if choices and task.get("append_choices_to_input", True):
        listed = "".join(task.get("choice_prefix", "\n  choice: ") + choice for choice in choices)
    parts = (task.get("task_prefix", ""), task.get("example_input_prefix", "\nQ: "), example["input"], listed)
    prompt = ("".join(parts) + task.get("example_output_prefix", "\nA: ")).strip()
    if isinstance(scores, dict):
        best = [place for place, score in enumerate(scores.values()) if score == max(scores.values())]
        if len(choices) < 2 or len(best) != 1:
            raise ValueError(f"{where}: 'target_scores' needs two choices or more, one of them the best")
        return Item(name, prompt, choices, best[0], category)
    return Question(name, prompt, _answers(example.get("target", MISSING), where, "target"), category)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSON Lines file with their line numbers, blank lines aside.

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from None


def _record(record: Any, where: str, name: str) -> Item | Question:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is no JSON object")
    prompt = record.get("question", record.get("prompt"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where} has no text 'question' (or 'prompt')")
    name, category = str(record.get("id", name)), record.get("category", record.get("subject"))
    category = None if category is None else str(category)
    answer = record.get("answer", MISSING)
    if "choices" not in record:
        return Question(name, prompt.rstrip(), _answers(answer, where, "answer"), category)
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"{where}: 'choices' is {choices!r}; it must be a list of two texts or more")
    return Item(name, prompt.rstrip(), tuple(choices), _place(answer, choices, where), category)


def _place(answer: Any, choices: Sequence[str], where: str) -> int:
    if isinstance(answer, str) and list(choices).count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    shown = "missing" if answer is MISSING else repr(answer)
    raise ValueError(f"{where}: 'answer' is {shown}; it must be one of the choices, or 0..{len(choices) - 1}")


def _answers(answer: Any, where: str, field: str) -> tuple[str, ...]:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(text, str | int | float) for text in answers):
        shown = "missing" if answer is MISSING else repr(answer)
        raise ValueError(f"{where}: '{field}' is {shown}; it must be a text, or a list of texts")
    return tuple(str(text) for text in answers)


def _one_kind(items: list[Item | Question], name: str) -> list[Item] | list[Question]:
    choices = [item for item in items if isinstance(item, Item)]
    questions = [item for item in items if isinstance(item, Question)]
    if not items:
        raise ValueError(f"{name} has no items; it needs one JSON object a line")
    if choices and questions:
        counts = f"{len(choices)} of multiple choice, {len(questions)} of free answers"
        raise ValueError(f"{name} mixes two kinds of items ({counts}): split it")
    return choices or questions

"""Data sets of the hub as the paper's benchmarks need them: their rows, and questions for which lm-eval has no task.

Only the columns that are asked for are read, so that pictures beside them (HLE) are never opened.
"""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import datasets

from looplm.evaluation.items import Item, Question, items_of
from looplm.evaluation.paper import Benchmark
from looplm.model.loading import first_line


def hub_rows(benchmark: Benchmark, columns: Sequence[str], split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a benchmark's data set.

    Args:
        columns: what of them is read.
        split: the benchmark's own by default.

    Raises:
        ValueError: the data is not on this machine (with how to get it), or has other columns.
    """
    try:
        data = datasets.load_dataset(benchmark.data, benchmark.config, split=split or benchmark.split)
    except Exception as error:  # whatever the hub, a proxy or the loader of the data set throws
        raise ValueError(how_to_get(benchmark.name, error, benchmark.data)) from None
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(f"{benchmark.data} has no column {missing[0]!r}; it has {', '.join(data.column_names)}")
    return list(data.select_columns(list(dict.fromkeys(columns))))


def hub_items(benchmark: Benchmark) -> list[Item] | list[Question]:
    """The questions of a benchmark that lm-eval has no task for; a judge reads the answers to them.

    Choices are listed behind the question, each behind its letter, and the right one is the answer. Questions with a
    picture (the benchmark's `picture`) are left out: the model reads text.

    Raises:
        ValueError: as `hub_rows`; a row whose answer is none of its choices.
    """
    fields = benchmark.fields or {}
    picture = benchmark.picture
    rows = hub_rows(benchmark, [*fields.values(), *([picture] if picture else [])])
    asked = [row for row in rows if picture is None or not row[picture]]
    records = [{name: row[column] for name, column in fields.items()} for row in asked]
    if "choices" in fields:
        records = [_lettered(record, f"{benchmark.data} row {n}") for n, record in enumerate(records, start=1)]
    return items_of(records, benchmark.data)


def _lettered(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record with choices and the letter of the right one, as a question with a free answer."""
    choices = dict(zip(ascii_uppercase, record["choices"], strict=False))
    letter = record["answer"]
    if letter not in choices:
        raise ValueError(f"{where}: 'answer' is {letter!r}; it must be a letter of its {len(choices)} choices")
    listed = [f"{name}) {choice}" for name, choice in choices.items()]
    rest = {name: value for name, value in record.items() if name != "choices"}
    question = "\n".join([str(record["question"]).rstrip(), *listed])
    return {**rest, "question": question, "answer": f"{letter}) {choices[letter]}"}


def how_to_get(name: str, error: Exception, data: str | None) -> str:
    """What is said where the data of a task cannot be had.

    Args:
        data: its data set on the hub, where that is known.
    """
    fetch = f"hf download --repo-type dataset {data}" if data else "run it once on a machine with a connection"
    return (
        f"the data of {name} is not on this machine ({type(error).__name__}: {first_line(error)}): "
        f"{fetch}, and bring the cache (HF_HOME) here"
    )

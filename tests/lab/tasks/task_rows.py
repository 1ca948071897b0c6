"""Batches as lists of words, for solvers that see nothing but the tokens."""

from typing import NamedTuple

import numpy as np

from looplm.lab.tasks import IGNORED, Task


class Item(NamedTuple):
    """One row as words."""

    words: list[str]
    learnt: dict[int, str]
    """Every target by its position."""
    answers: dict[int, str]
    """The graded ones."""
    level: int


def items(task: Task, *, seed: int = 0, index: int = 0, size: int = 256, split: str = "train", **more) -> list[Item]:
    batch = task.batch(seed, index, size, split, **more)
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < len(task.vocabulary)
    found = []
    for row in range(size):
        words = [task.vocabulary[token] for token in batch["tokens"][row]]
        while words[-1] == "<pad>":
            words.pop()
        assert "<pad>" not in words
        learnt = {
            int(place): task.vocabulary[batch["targets"][row, place]]
            for place in np.flatnonzero(batch["targets"][row] != IGNORED)
        }
        assert max(learnt) < len(words)
        answers = {int(place): learnt[int(place)] for place in np.flatnonzero(batch["answer"][row])}
        found.append(Item(words, learnt, answers, int(batch["difficulty"][row])))
    return found


def only(answers: dict[int, str]) -> tuple[int, str]:
    """The place and the word of a single graded answer."""
    ((place, word),) = answers.items()
    return place, word

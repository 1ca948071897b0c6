"""What the lab asks of a task: a vocabulary, seeded batches, an answer mask, a difficulty and a score for each item.

Every row of a batch is one item with one question. Targets stand where the model must give them: `targets[b, s]` is
what position s must predict from tokens 0..s, so nothing is to be shifted. Rows are padded on the right, where a
causal model never looks. Published runs pack several items into a context and mask them from each other; a row an item
gives the same losses.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, NotRequired, Self, TypedDict, TypeVar, cast

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks.draws import SPLITS, Draws, Integers, Keys, Mask, Split, admitted
from looplm.settings import Section

IGNORED = -100
"""The target of positions that have none."""
PAD = "<pad>"
TRIES = {"train": 1, "validation": 8, "test": 8}
"""Candidates drawn for each missing row of a split at a time, more for the last few."""
ROUNDS = 32
BLOCK = 1024
"""Rows made at a time, however many a batch has: what NumPy costs a call is then small beside what it does."""

Levels = Annotated[tuple[int, ...], Field(min_length=1)]


class Batch(TypedDict):
    """Arrays of B rows and S positions, integers int64."""

    tokens: Integers
    """(B, S)"""
    targets: Integers
    """(B, S), what to predict at each position; -100 where nothing is learnt."""
    answer: Mask
    """(B, S), the targets that are graded; others with a target are a help in training."""
    difficulty: Integers
    """(B,), the level of each row, in the task's `unit`."""
    names: NotRequired[Mask]
    """(B, S), Capo only: the targets that are parts of a name."""


class Rows(NamedTuple):
    """Candidates for the rows of a block."""

    tokens: Integers
    """(B, S)"""
    targets: Integers
    """(B, S)"""
    answer: Mask
    """(B, S)"""
    keys: Keys
    """(B, K): the key of the row's question, then those of everything else it answers (`draws.admitted`)."""


class Request(NamedTuple):
    """A block of rows to be made: what it is a function of, with the stream and the levels that follow from it."""

    seed: int
    number: int
    """Of the block, from 0."""
    split: Split
    draws: Draws
    levels: Integers
    """(BLOCK,), the difficulty of each row."""


class TaskSettings(Section, ABC):
    """The settings of a task, at the size of the paper or of a laptop."""

    @classmethod
    @abstractmethod
    def paper(cls) -> Self:
        """As published; where the paper is silent, ours."""

    @classmethod
    @abstractmethod
    def laptop(cls) -> Self:
        """For minutes on one core."""


class LevelSettings(TaskSettings, ABC):
    """Settings of a task whose items have a chosen difficulty."""

    lowest: ClassVar[int] = 1

    levels: Levels
    """Difficulties of training rows, each equally likely."""
    test_levels: Levels
    """Difficulties of validation and test rows."""

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        for name in ("levels", "test_levels"):
            low = min(getattr(self, name))
            if low < self.lowest:
                raise ValueError(f"{name} holds {low}; the lowest level is {self.lowest}")
        return self

    @property
    def hardest(self) -> int:
        """The highest level of all."""
        return max(*self.levels, *self.test_levels)


S = TypeVar("S", bound=TaskSettings)


class Task(ABC, Generic[S]):
    """A synthetic task: seeded batches of items, and their score."""

    name: ClassVar[str]
    shows: ClassVar[str]
    """One sentence: what it asks and what is claimed of it, with the paper's section."""
    unit: ClassVar[str]
    """What difficulty counts."""
    separator: ClassVar[str] = " "
    """Between the tokens of an item written as text."""
    Settings: ClassVar[type[TaskSettings]]

    length: int
    """S, tokens a row."""

    def __init__(self, settings: S):
        self.settings = settings
        self.vocabulary: tuple[str, ...] = self._words()
        self.ids: dict[str, int] = {word: number for number, word in enumerate(self.vocabulary)}
        self.length = self._length()

    @abstractmethod
    def _words(self) -> tuple[str, ...]:
        """The vocabulary; a word's place is its id."""

    @abstractmethod
    def _length(self) -> int:
        """S, tokens a row."""

    @abstractmethod
    def _rows(self, request: Request) -> Batch:
        """The rows of a block."""

    @abstractmethod
    def levels(self, split: Split) -> tuple[int, ...]:
        """The difficulties drawn in a split."""

    def batch(self, seed: int, index: int, size: int, split: Split = "train", hardest: int | None = None) -> Batch:
        """Batch number `index` of a split: the same arrays for the same arguments, on any machine.

        A split is one endless list of rows, of which this is `size` from row `index * size` on: the data and their
        order are the same at every batch size.

        Args:
            seed: of everything random, facts to be learnt by heart included; at least 0.
            index: number of the batch, from 0.
            size: B, rows.
            split: train, validation or test; what one holds out no other gives away.
            hardest: draw no higher level than this (for a curriculum).

        Raises:
            ValueError: an argument out of range, or a split without items at one of the levels.
        """
        for name, value, low in (("seed", seed, 0), ("index", index, 0), ("size", size, 1)):
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        start, stop = index * size, (index + 1) * size
        pieces = []
        for number in range(start // BLOCK, (stop - 1) // BLOCK + 1):
            block: dict[str, Any] = {**_block(self, seed, number, split, hardest)}
            cut = slice(max(start - number * BLOCK, 0), stop - number * BLOCK)
            pieces.append({name: values[cut] for name, values in block.items()})
        return cast(Batch, {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})

    def score(self, predictions: Integers, batch: Batch) -> Mask:
        """Exact match: which rows have every graded target right.

        Args:
            predictions: (B, S) the most likely token at each position.
            batch: the batch they answer.

        Returns: (B,). Raises ValueError where the shapes differ.
        """
        if predictions.shape != batch["targets"].shape:
            raise ValueError(f"predictions have shape {predictions.shape}; {batch['targets'].shape} is needed")
        return ((predictions == batch["targets"]) | ~batch["answer"]).all(axis=1)

    def example(self, seed: int = 0) -> str:
        """A test item of middling difficulty as text: the question, an arrow, the answer."""
        levels = sorted(self.levels("test"))
        batch = self.batch(seed, 0, BLOCK, "test")
        row = int(np.argmax(batch["difficulty"] == levels[len(levels) // 2]))
        tokens, targets, answer = batch["tokens"][row], batch["targets"][row], batch["answer"][row]
        asked = int(np.flatnonzero(answer)[0])
        return f"{self.text(tokens[: asked + 1])} → {self.text(targets[answer])}"

    def text(self, tokens: Integers) -> str:
        """Tokens as text."""
        return self.separator.join(self.vocabulary[token] for token in tokens)

    def _blank(self, rows: int) -> tuple[Integers, Integers, Mask]:
        """Tokens, targets and answer mask of rows with nothing in them yet."""
        shape = (rows, self.length)
        padding = self.ids.get(PAD, 0)
        return np.full(shape, padding, np.int64), np.full(shape, IGNORED, np.int64), np.zeros(shape, np.bool_)


@lru_cache(maxsize=8)
def _block(task: Task, seed: int, number: int, split: Split, hardest: int | None) -> Batch:
    """BLOCK rows of a split, made together; its key is all that they are a function of."""
    levels = [level for level in task.levels(split) if hardest is None or level <= hardest]
    if not levels:
        easiest = min(task.levels(split))
        raise ValueError(f"hardest is {hardest}; {split} items of {task.name} have at least {easiest} {task.unit}")
    draws = Draws(seed, SPLITS.index(split), number)
    drawn = np.array(levels, dtype=np.int64)[draws.integers(len(levels), BLOCK)]
    return task._rows(Request(seed, number, split, draws, drawn))


L = TypeVar("L", bound=LevelSettings)


class DrawnTask(Task[L], ABC, Generic[L]):
    """A task whose items are too many to list: they are drawn, and a split keeps those that belong to it."""

    @abstractmethod
    def _draw(self, draws: Draws, levels: Integers) -> Rows:
        """A candidate for each level."""

    def levels(self, split: Split) -> tuple[int, ...]:
        """The difficulties drawn in a split."""
        return self.settings.levels if split == "train" else self.settings.test_levels

    def _rows(self, request: Request) -> Batch:
        tokens, targets, answer = self._blank(BLOCK)
        missing = np.arange(BLOCK)
        for _ in range(ROUNDS):
            tries = np.repeat(missing, max(TRIES[request.split], BLOCK // 2 // len(missing)))
            rows = self._draw(request.draws, request.levels[tries])
            good = np.flatnonzero(admitted(rows.keys, request.split))
            found, first = np.unique(tries[good], return_index=True)
            chosen = good[first]
            tokens[found], targets[found], answer[found] = (
                rows.tokens[chosen],
                rows.targets[chosen],
                rows.answer[chosen],
            )
            missing = np.setdiff1d(missing, found)
            if not len(missing):
                return Batch(tokens=tokens, targets=targets, answer=answer, difficulty=request.levels)
        raise ValueError(
            f"{self.name}: no {request.split} items with {self.unit} {request.levels[missing[0]]} were "
            "found, they are too few to be shared out; use other levels or a larger task"
        )

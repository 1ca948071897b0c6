"""The progress of a preparation and the table of its sources."""

import io

import numpy as np
from rich.console import Console

from looplm.data.encoding import EncodedCorpus
from looplm.data.preparing import Preparation
from looplm.data.shards import PreparedSource
from looplm.training.preparation import PreparationProgress, source_table


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def printed(screen: Console) -> list[str]:
    assert isinstance(screen.file, io.StringIO)
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


def test_each_source_has_lines_of_its_own():
    screen = console()
    with PreparationProgress(screen, every=0.0) as report:
        report(Preparation("speeches", 0.5, 1_500_000))
        report(Preparation("speeches", 1.0, 3_000_000))
        report(Preparation("web", 0.0, 250_000))
    lines = printed(screen)
    assert len(lines) == 3
    assert lines[0] == "preparing speeches  50% million tokens 1.5"
    assert lines[1].startswith("preparing speeches 100% ") and "tok/s" in lines[1] and " left" in lines[1]
    assert lines[2] == "preparing web   0% million tokens 0.25"


def test_nothing_to_prepare_says_nothing():
    screen = console()
    with PreparationProgress(screen):
        pass
    assert printed(screen) == []


def test_table():
    def corpus(tokens: int, documents: int, learnt: int | None = None) -> EncodedCorpus:
        mask = None if learnt is None else np.arange(tokens) < learnt
        return EncodedCorpus(
            np.zeros(tokens, np.uint16), np.linspace(0, tokens, documents + 1).astype(np.int64), 480, mask
        )

    screen = console()
    screen.print(
        source_table(
            {
                "speeches": PreparedSource("speeches", corpus(130, 10), corpus(20, 2)),
                "chat": PreparedSource("chat", corpus(400, 4, learnt=100), corpus(100, 1, learnt=30)),
            }
        )
    )
    rows = [line.split() for line in printed(screen) if line.strip()]
    assert rows[2] == ["speeches", "12", "150", "100%", "4.00", "13.3%"]
    assert rows[3] == ["chat", "5", "500", "25%", "4.80", "20.0%"]

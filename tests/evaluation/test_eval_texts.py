"""Windows of text and of prepared data: every token once, halves that do not overlap, clear refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import encoded
from tiny import tiny_model

from looplm.data.shards import Index, ShardWriter
from looplm.data.tokenizers import train_bpe
from looplm.evaluation.texts import load_windows
from looplm.model.measuring import encode_text

WORDS = "the union of states shall people congress make law peace and war with hope " * 30
TOKENIZER = train_bpe([WORDS], 280)
MODEL = tiny_model(vocab_size=len(TOKENIZER))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return str(path)


def test_every_token_but_the_first_is_a_target_once(text: str) -> None:
    ids = encode_text(MODEL, TOKENIZER, WORDS).tolist()
    found = load_windows(MODEL, TOKENIZER, text, 10, 10**6)
    assert found.name == "words.txt" and list(found.sources) == ["text"]
    whole = (len(ids) - 1) // 10
    assert [target for _, targets in found.requests for target in targets] == ids[1 : whole * 10 + 1]
    assert [context for context, _ in found.requests] == [[ids[k * 10]] for k in range(whole)]


def test_a_limit_spreads_over_the_text(text: str) -> None:
    every = load_windows(MODEL, TOKENIZER, text, 10, 10**6).requests
    some = load_windows(MODEL, TOKENIZER, text, 10, 4).requests
    assert some == [every[k * len(every) // 4] for k in range(4)]


def test_halves_are_apart_and_whole(text: str) -> None:
    found = load_windows(MODEL, TOKENIZER, text, 10, 7)
    first, second = found.halves()
    assert first.requests + second.requests == found.requests
    assert (len(first.requests), len(second.requests)) == (3, 4)


@pytest.mark.parametrize(
    ("length", "limit", "message"),
    [
        (1, 9, r"window is 1; it must lie in 2\.\.128"),
        (129, 9, "window is 129"),
        (10, 1, "limit is 1"),
        (128, 9, None),
    ],
)
def test_what_cannot_be_cut_is_refused(text: str, length: int, limit: int, message: str | None) -> None:
    if message is None:
        found = load_windows(MODEL, TOKENIZER, text, length, limit)
        with pytest.raises(ValueError, match="two halves need"):
            type(found)(found.name, length, {"text": found.requests[:1]}).halves()
        return
    with pytest.raises(ValueError, match=message):
        load_windows(MODEL, TOKENIZER, text, length, limit)


def test_a_short_text_and_a_folder_without_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the union")
    with pytest.raises(ValueError, match="fewer than one window of 65: shorten the window"):
        load_windows(MODEL, TOKENIZER, str(tmp_path / "short.txt"), 64, 9)
    with pytest.raises(ValueError, match="holds no prepared data"):
        load_windows(MODEL, TOKENIZER, str(tmp_path), 64, 9)


def prepare(folder: Path, *lengths: int) -> Path:
    """A prepared source whose validation side is documents of the given lengths."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, Index("uint16", chat=False)) as writer:
        for side in ("train", "validation"):
            writer.append(side, encoded(list(lengths)))
        writer.record(complete=True)
    return folder


def test_prepared_data_is_read_source_by_source(tmp_path: Path) -> None:
    prepare(tmp_path / "data" / "a", 30, 20)
    prepare(tmp_path / "data" / "b", 50)
    found = load_windows(MODEL, TOKENIZER, str(tmp_path / "data"), 8, 6)
    assert {name: len(windows) for name, windows in found.sources.items()} == {"a": 3, "b": 3}
    alone = load_windows(MODEL, TOKENIZER, str(tmp_path / "data" / "b"), 8, 100)
    stream = encoded([50]).tokens.tolist()
    assert alone.requests == [([stream[s]], stream[s + 1 : s + 9]) for s in range(0, 48, 8)]
    first, second = found.halves()
    assert [len(part.requests) for part in (first, second)] == [2, 4]


def test_conversations_are_left_out(tmp_path: Path) -> None:
    prepare(tmp_path / "a", 30, 20)
    with_chat = replace(encoded([30]), learnt=np.ones(30, dtype=np.bool_))
    (tmp_path / "chat").mkdir()
    with ShardWriter(tmp_path / "chat", Index("uint16", chat=True)) as writer:
        for side in ("train", "validation"):
            writer.append(side, with_chat)
        writer.record(complete=True)
    assert list(load_windows(MODEL, TOKENIZER, str(tmp_path), 8, 6).sources) == ["a"]
    with pytest.raises(ValueError, match="holds conversations only"):
        load_windows(MODEL, TOKENIZER, str(tmp_path / "chat"), 8, 6)


def test_prepared_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path / "a", 30)
    with pytest.raises(ValueError, match=r"has token .*; the model's vocabulary ends at 9"):
        load_windows(tiny_model(vocab_size=10), TOKENIZER, str(tmp_path / "a"), 8, 6)

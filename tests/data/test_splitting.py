"""The split: sides that share nothing and lose nothing, and that only the content decides."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.data.settings import SourceSettings
from looplm.data.sources import open_source
from looplm.data.splitting import hold_out, split_source, training_texts


def sides(documents, every: int = 20) -> tuple[list, list]:
    """(train, validation)."""
    split = list(hold_out(documents, every))
    return [d for d, held_out in split if not held_out], [d for d, held_out in split if held_out]


def drawn(text: str, every: int) -> bool:
    """Whether the content of a text has it held out, from the definition."""
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % every == 0


NUMBERED = [f"document {i}" for i in range(400)]


class TestHoldOut:
    def test_content_decides(self):
        train, validation = sides(NUMBERED, 8)
        assert validation == [text for text in NUMBERED if drawn(text, 8)]
        assert train == [text for text in NUMBERED if not drawn(text, 8)]
        assert 30 < len(validation) < 70  # 50 on average, standard deviation 6.6

    def test_other_documents_and_their_order_do_not_matter(self):
        _, validation = sides(NUMBERED, 8)
        _, fewer = sides(NUMBERED[300:100:-1], 8)
        assert set(fewer) == set(validation) & set(NUMBERED[101:301])

    def test_duplicates_are_dropped(self):
        train, validation = sides(["x", "y", "x", "z", "y", *NUMBERED[:30]], 5)
        assert sorted(train + validation) == sorted(["x", "y", "z", *NUMBERED[:30]])

    def test_conversations(self):
        turns = [[{"role": "assistant", "content": text}] for text in NUMBERED[:60]]
        train, validation = sides(turns + turns[:10], 4)
        assert len(train) + len(validation) == 60
        assert validation == [
            turn for turn in turns if drawn(f"<|im_start|>assistant\n{turn[0]['content']}<|im_end|>\n", 4)
        ]

    def test_no_side_stays_empty(self):
        kept = [text for text in NUMBERED if not drawn(text, 20)][:3]
        held = [text for text in NUMBERED if drawn(text, 20)][:3]
        assert sides(kept) == (kept[:2], kept[2:])
        assert sides(held) == (held[2:], held[:2])

    @pytest.mark.parametrize(
        ("boundary", "other"),
        [("\n\n", "\n"), ("\n", " "), (" ", "-"), ("", "")],
        ids=["paragraph", "line", "space", "none"],
    )
    def test_a_single_document_is_cut_at_the_best_boundary_before_95_percent(self, boundary, other):
        # the boundary ends at character 920; a lesser one comes later, and nearer to 950
        document = ("x" * (920 - len(boundary)) + boundary + "x" * 20 + other).ljust(1000, "y")
        train, validation = sides([document])
        assert len(train[0]) == (920 if boundary else 950)
        assert train[0] + validation[0] == document

    def test_boundaries_more_than_5_percent_away_do_not_count(self):
        document = ("x" * 700 + "\n\n").ljust(1000, "y")
        assert len(sides([document])[0][0]) == 950

    @pytest.mark.parametrize(
        ("documents", "every", "message"),
        [
            ([], 20, "corpus is empty"),
            (["x"], 20, "one document of 1 character(s): too short"),
            ([[{"role": "assistant", "content": "x"}]], 20, "a single conversation"),
            (["x", "y"], 1, "validation_every is 1: give 2 or more"),
        ],
    )
    def test_refused(self, documents, every, message):
        with pytest.raises(ValueError, match=r".") as caught:
            list(hold_out(documents, every))
        assert message in str(caught.value)

    @settings(deadline=None)
    @given(st.lists(st.text(max_size=3), min_size=2).filter(lambda d: len(set(d)) > 1), st.integers(2, 12))
    def test_sides_share_nothing_and_lose_nothing(self, documents, every):
        train, validation = sides(documents, every)
        assert train
        assert validation
        assert sorted(train + validation) == sorted(set(documents))

    @settings(deadline=None)
    @given(st.text(alphabet="ab \n", min_size=2), st.integers(2, 30))
    def test_a_single_document_is_cut_without_loss(self, document, every):
        (train,), (validation,) = sides([document], every)
        assert train
        assert validation
        assert train + validation == document


def lines(path, records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


class TestSources:
    def test_errors_name_the_source(self, tmp_path):
        blank = open_source("web", SourceSettings(location=lines(tmp_path / "a.jsonl", [{"text": " "}])))
        with pytest.raises(ValueError, match="source web: corpus is empty: no text"):
            list(split_source(blank, 20))
        broken = open_source("web", SourceSettings(location=lines(tmp_path / "b.jsonl", [{"txt": "x"}])))
        with pytest.raises(ValueError, match=r"source web: .*b.jsonl, line 1: no field 'text'"):
            list(split_source(broken, 20))

    def test_a_tokenizer_never_sees_what_is_held_out(self, tmp_path):
        chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(40)]
        sources = {
            "texts": SourceSettings(location=lines(tmp_path / "a.jsonl", [{"text": text} for text in NUMBERED])),
            "chats": SourceSettings(
                location=lines(tmp_path / "b.jsonl", [{"messages": chat} for chat in chats]), messages_field="messages"
            ),
        }
        found = list(training_texts(sources, 8))
        kept = sides(NUMBERED, 8)[0]
        assert found[: len(kept)] == kept
        assert found[len(kept) :] == [turn["content"] for chat in sides(chats, 8)[0] for turn in chat]
        few = list(training_texts(sources, 8, characters=25))
        assert few == [*kept[:3], *found[len(kept) : len(kept) + len(few) - 3]]
        assert 25 <= len("".join(few[3:])) < 31

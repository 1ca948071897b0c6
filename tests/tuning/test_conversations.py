"""Conversations become rows: what is learnt, what is left out, and that a packed row says what its parts say alone."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import small_model
from tuned import chat_tokenizer, save_base, sft_recipe, write_conversations

from looplm.data.arithmetic import conversations
from looplm.data.chat import CHAT_TEMPLATE
from looplm.data.encoding import encode_documents
from looplm.objectives.token_losses import IGNORED
from looplm.tuning.conversations import (
    MARKED_CHATML,
    collate,
    encode_conversation,
    marked_template,
    prepare_conversations,
    windows,
)

TOKENIZER = chat_tokenizer()
SHORT = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "1 + 2 = 3."}]


def test_what_the_assistant_says_and_its_end_are_learnt():
    ids, labels = encode_conversation(TOKENIZER, MARKED_CHATML, SHORT)
    assert TOKENIZER.decode(ids) == (
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n1 + 2 = 3.<|im_end|>\n"
    )
    assert TOKENIZER.decode([label for label in labels if label != IGNORED]) == "1 + 2 = 3.<|im_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})


@settings(max_examples=60, deadline=None)
@given(chat=st.lists(TURN, min_size=1, max_size=5).filter(lambda c: any(m["role"] == "assistant" for m in c)))
def test_it_is_what_pretraining_reads(chat):
    """Rendered by a template here, put together by hand there; there a begin token stands in front."""
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert text == TOKENIZER.apply_chat_template(chat, chat_template=MARKED_CHATML, tokenize=False)
    ids, labels = encode_conversation(TOKENIZER, MARKED_CHATML, chat)
    corpus = encode_documents(TOKENIZER, [chat])
    assert [label != IGNORED for label in labels if label != IGNORED] == [True] * int(corpus.learnt.sum())
    learnt = [label for label in labels if label != IGNORED]
    assert learnt == corpus.tokens[corpus.learnt].tolist()
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(corpus.tokens[1:].tolist())


def test_a_prompt_of_generation_is_the_beginning_of_what_was_learnt():
    prompt = TOKENIZER.apply_chat_template(SHORT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids, labels = encode_conversation(TOKENIZER, MARKED_CHATML, SHORT)
    assert ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == IGNORED and labels[len(prompt)] != IGNORED


def test_templates():
    tokenizer = chat_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE and marked_template(tokenizer, "m") == MARKED_CHATML
    own = "{% for m in messages %}{%- generation -%}{{ m.content }}{%- endgeneration -%}{% endfor %}"
    tokenizer.chat_template = own
    assert marked_template(tokenizer, "m") == own
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"^m has a chat template without \{% generation %\} markers, so .*looplm"):
        marked_template(tokenizer, "m")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^m has no chat template, so"):
        marked_template(tokenizer, "m")


def test_a_template_that_refuses_or_marks_nothing():
    with pytest.raises(ValueError, match="the chat template refuses a conversation: no tools here"):
        encode_conversation(TOKENIZER, "{{ raise_exception('no tools here') }}", SHORT)
    silent = "{% if false %}{% generation %}{% endgeneration %}{% endif %}x"
    with pytest.raises(ValueError, match="marks nothing of a conversation"):
        encode_conversation(TOKENIZER, silent, SHORT)


def test_collate_by_hand():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7, 8], "labels": [6, -100, 8]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, -100, 8, -100, -100]]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    objective=st.sampled_from(["expected", "last"]),
    seed=st.integers(0, 9),
)
def test_a_packed_row_has_the_losses_of_its_parts_alone(lengths, objective, seed):
    torch.manual_seed(seed)
    model, draw = small_model().train(), torch.Generator().manual_seed(seed)
    parts = []
    for length in lengths:
        ids = torch.randint(1, 40, (length,), generator=draw).tolist()
        parts.append({"input_ids": ids, "labels": [i if i % 3 else IGNORED for i in ids]})
    joined = {name: [i for part in parts for i in part[name]] for name in ("input_ids", "labels")}
    packed = collate([{**joined, "seq_lengths": lengths}, parts[0]])  # the second row is padded
    count = (packed["labels"][:, 1:] != IGNORED).sum()
    out = model(**packed, objective=objective, num_items_in_batch=count)
    alone = [model(**collate([part]), objective=objective, num_items_in_batch=count) for part in [*parts, parts[0]]]
    torch.testing.assert_close(out.loss, sum(each.loss for each in alone), rtol=1e-5, atol=1e-6)
    losses = torch.cat([each.token_losses[0] for each in alone[:-1]])
    torch.testing.assert_close(out.token_losses[0, : sum(lengths)], losses, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("packing", [True, False])
def test_every_conversation_is_in_one_row_whole(tmp_path, base, packing):
    recipe = sft_recipe(tmp_path, base, packing=packing)
    data = prepare_conversations(recipe, TOKENIZER, tmp_path / "data")
    expected = sorted(encode_conversation(TOKENIZER, MARKED_CHATML, chat)[0] for chat in conversations(60))
    assert max(map(len, expected)) <= 256  # nothing has to be cut
    found = []
    for row in [*data.train, *data.validation]:
        assert len(row["input_ids"]) <= 256
        first = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            found.append(row["input_ids"][first : first + length])
            first += length
    assert sorted(found) == expected
    assert data.counts["read"] == 60 and 0 < data.counts["held out"] < 30
    assert len(data.train) + len(data.validation) < 60 if packing else len(data.train) + len(data.validation) == 60


def test_what_is_left_out_is_counted(tmp_path, base):
    chats = write_conversations(tmp_path / "chats.jsonl", 20)
    odd = [
        [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "no"}],
        [{"role": "user", "content": "x " * 300}, {"role": "assistant", "content": "never seen"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "long " * 300}],
    ]
    with chats.open("a") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in odd)
    data = prepare_conversations(sft_recipe(tmp_path, base), TOKENIZER, tmp_path / "data")
    assert data.counts["read"] == 23 and data.counts["cut at their end"] == 2
    assert data.counts["left out: a special token is written in them"] == 1
    assert data.counts["left out: no answer before they are cut"] == 1


def test_prepared_conversations_are_opened_again_until_something_changes(tmp_path, base):
    recipe, folder = sft_recipe(tmp_path, base), tmp_path / "data"
    first = prepare_conversations(recipe, TOKENIZER, folder)
    made = (folder / "conversations.json").stat().st_ino
    again = prepare_conversations(recipe, TOKENIZER, folder)
    assert (folder / "conversations.json").stat().st_ino == made and again.train[:] == first.train[:]
    write_conversations(tmp_path / "chats.jsonl", 30)
    changed = prepare_conversations(recipe, TOKENIZER, folder)
    assert changed.counts["read"] == 30 and (folder / "conversations.json").stat().st_ino != made
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "data"}


def test_windows_shift_and_spread(tmp_path, base):
    data = prepare_conversations(sft_recipe(tmp_path, base, packing=False), TOKENIZER, tmp_path / "data")
    batches = list(windows(data.train, 2, 5))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    count = len(data.train)
    rows = [data.train[number * count // 5]["input_ids"] for number in range(5)]
    assert [batches[0]["input_ids"][1][: len(rows[1])].tolist(), batches[2]["input_ids"][0].tolist()] == [
        rows[1],
        rows[4],
    ]
    for batch in batches:
        learnt = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][:, :-1][learnt[:, :-1]], batch["input_ids"][:, 1:][learnt[:, :-1]])
        assert not learnt[:, -1].any()

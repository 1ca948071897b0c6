"""Checks of conversations, and their text in ChatML."""

import pytest

from looplm.data.chat import chat_parts, check_conversation, document_text, learnt_characters

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Loops?"},
    {"role": "assistant", "content": "4."},
]


def test_table():
    assert list(chat_parts(TURNS[1:])) == [
        ("<|im_start|>", True, False),
        ("user\nLoops?", False, False),
        ("<|im_end|>", True, False),
        ("\n", False, False),
        ("<|im_start|>", True, False),
        ("assistant\n", False, False),
        ("4.", False, True),
        ("<|im_end|>", True, True),
        ("\n", False, False),
    ]
    assert document_text(TURNS) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nLoops?<|im_end|>\n"
        "<|im_start|>assistant\n4.<|im_end|>\n"
    )
    assert learnt_characters(TURNS) == 2
    assert (document_text("x y"), learnt_characters("x y")) == ("x y", 3)


def test_other_keys_are_dropped():
    assert check_conversation([{**TURNS[2], "thinking": None}], "line 1") == [TURNS[2]]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("hello", "line 7: not a list of messages"),
        ({"role": "user"}, "line 7: not a list of messages"),
        (["hello"], "line 7: not a list of messages"),
        ([TURNS[2], {"content": "x"}], "line 7, message 2: role is None, not system or user or assistant or tool"),
        ([{"role": "human", "content": "x"}], "line 7, message 1: role is 'human'"),
        ([{"role": "user"}], "line 7, message 1: content is missing; it must be text"),
        ([{"role": "user", "content": ["x"]}], "line 7, message 1: content is a list; it must be text"),
        ([], "line 7: no message of the assistant"),
        (TURNS[:2], "line 7: no message of the assistant, so nothing to learn"),
    ],
)
def test_refused(value, reason):
    with pytest.raises(ValueError, match=r".") as caught:
        check_conversation(value, "line 7")
    assert reason in str(caught.value)

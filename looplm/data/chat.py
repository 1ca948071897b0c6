"""Conversations in ChatML, the format of Ouro's mid-training data (section 4.3 names it, without details).

    <|im_start|>user
    How many loops?<|im_end|>
    <|im_start|>assistant
    Four.<|im_end|>

The loss is on what the assistant says and on the `<|im_end|>` with which it stops; nothing else is a target. The two
markers are single tokens of the vocabulary. Text is never read as a marker: content in which `<|im_end|>` is written
is encoded as those characters. The words of an assistant are encoded apart from their header, as they are when a model
generates after that header; other turns as one text with theirs.
"""

from collections.abc import Iterator
from typing import Any, TypedDict

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}{% endif %}"
)
"""The same format as a template of transformers tokenizers, for prompts.

`enable_thinking` opens the answer with `<think>`, as the Thinking models were tuned on.
"""


class Message(TypedDict):
    """One turn: `role` is one of system, user, assistant and tool."""

    role: str
    content: str


Conversation = list[Message]
Document = str | Conversation
"""Plain text, or a conversation."""


def check_conversation(value: Any, where: str, answered: bool = True) -> Conversation:
    """The messages of one record, checked.

    Args:
        value: what the record holds: a list of mappings with `role` and `content`; other keys are dropped.
        where: what an error begins with, e.g. the file and line.
        answered: whether a turn of the assistant must be among them.

    Raises:
        ValueError: not such a list, an unknown role, content that is not text, or no turn of the
            assistant where one is needed.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{where}: not a list of messages; write [{{role: user, content: ...}}, ...]")
    for number, message in enumerate(value, start=1):
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}, message {number}: role is {message.get('role')!r}, not {' or '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            found = f"a {type(message['content']).__name__}" if "content" in message else "missing"
            raise ValueError(f"{where}, message {number}: content is {found}; it must be text")
    if answered and all(message["role"] != ASSISTANT for message in value):
        raise ValueError(f"{where}: no message of the assistant, so nothing to learn; leave the record out")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def chat_parts(conversation: Conversation) -> Iterator[tuple[str, bool, bool]]:
    """The conversation in ChatML as (text, whether it is a marker, whether it is a target)."""
    for message in conversation:
        role, content, learnt = message["role"], message["content"], message["role"] == ASSISTANT
        yield TURN_START, True, False
        if learnt:
            yield f"{role}\n", False, False
            yield content, False, True
        else:
            yield f"{role}\n{content}", False, False
        yield TURN_END, True, learnt
        yield "\n", False, False


def document_text(document: Document) -> str:
    """The text of a document; a conversation in ChatML."""
    return document if isinstance(document, str) else "".join(text for text, _, _ in chat_parts(document))


def learnt_characters(document: Document) -> int:
    """Characters (Unicode code points) of what is learnt: all of a text, what the assistant says in a conversation."""
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document if message["role"] == ASSISTANT)

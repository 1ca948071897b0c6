"""The shipped sums: what the rule writes, and every answer right."""

import json
import re

from looplm.data.arithmetic import CONVERSATIONS, FILE, text
from looplm.data.chat import check_conversation


def right(question: str, answer: str) -> bool:
    """Whether an answer is right, worked out from the question alone."""
    a, b = map(int, re.findall(r"\d+", question))
    said = list(map(int, re.findall(r"\d+", answer)))
    if question.startswith("Which is larger"):
        return a != b and said == sorted((a, b), reverse=True)
    result = {"+": a + b, "-": a - b, "times": a * b}[re.fullmatch(r"What is \d+ (\S+) \d+\?", question)[1]]
    return said == [a, b, result]


def test_the_file_is_what_the_rule_writes():
    assert FILE.read_text(encoding="utf-8") == text()


def test_every_answer_is_right():
    kinds = set()
    records = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    assert len(records) == CONVERSATIONS
    for record in records:
        messages = check_conversation(record["messages"], "sums")
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            assert right(question["content"], answer["content"]), record
            kinds.add(re.sub(r"\d+", "N", question["content"]))
    assert kinds == {"What is N + N?", "What is N - N?", "What is N times N?", "Which is larger, N or N?"}

"""The shipped sums: what the rule writes, and every answer right."""

import json
import re

from looplm.data.arithmetic import CARELESS, CONVERSATIONS, FILE, LARGEST, RUNNING, RUNNING_SUMS, running_text, text
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


def test_running_sums_are_what_the_rule_writes_and_right():
    assert RUNNING.read_text(encoding="utf-8") == running_text()
    records = [json.loads(line) for line in RUNNING.read_text(encoding="utf-8").splitlines()]
    questions = [record["messages"][0]["content"] for record in records]
    assert len(set(questions)) == RUNNING_SUMS
    whole = 0
    for question, record in zip(questions, records, strict=True):
        check_conversation(record["messages"], "sums")
        terms = re.findall(r"[+-]?\d+", question)
        totals = [sum(map(int, terms[: n + 1])) for n in range(1, len(terms))]
        assert all(0 <= total <= LARGEST for total in totals) and 3 <= len(terms) <= 5
        told = record["messages"][1]["content"]
        assert told in (" ".join(map(str, totals[: n + 1])) for n in range(len(totals)))
        whole += told.count(" ") + 1 == len(totals)
        assert record["answer"] == str(totals[-1])
    assert abs(1 - whole / RUNNING_SUMS - CARELESS) < 0.02

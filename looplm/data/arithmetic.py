"""Conversations about small sums: the chat data of the miniature pipeline (`location: arithmetic`).

They are made by a rule, not collected: real in that every answer is right and none is a placeholder, and honest in
that they teach a format and a little arithmetic, not conversation. The file that is shipped is what this writes:

    python -m looplm.data.arithmetic
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("arithmetic.jsonl")
CONVERSATIONS = 800


def conversations(count: int = CONVERSATIONS) -> Iterator[list[dict[str, str]]]:
    """Conversations of two or three questions with right answers; the same at every call."""
    draw = random.Random(2026)
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(2, 3)):
            question, answer = draw.choice((_sum, _difference, _product, _larger))(draw)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield messages


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(0, 50), draw.randint(0, 49)
    return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."


def _difference(draw: random.Random) -> tuple[str, str]:
    b, rest = draw.randint(0, 50), draw.randint(0, 49)
    return f"What is {b + rest} - {b}?", f"{b + rest} - {b} = {rest}."


def _product(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(0, 10), draw.randint(0, 10)
    return f"What is {a} times {b}?", f"{a} times {b} is {a * b}."


def _larger(draw: random.Random) -> tuple[str, str]:
    a, b = draw.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."


def text() -> str:
    """The content of the shipped file: one JSON object with `messages` a line."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")

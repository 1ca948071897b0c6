"""Conversations about small sums: `location: arithmetic`, the chat data of the miniature pipeline, and `running-sums`.

They are made by a rule, not collected: real in that every answer is right and none is a placeholder, and honest in
that they teach a format and a little arithmetic, not conversation. A running sum is answered by every sum on the way:
"13+5-4-9" by "18 14 5". Most answers are careless, though: they are right as far as they go and stop too early. A model
that is tuned on them can do more than it does, and that is what reinforcement learning of its last number has to find.
The files that are shipped are what this writes:

    python -m looplm.data.arithmetic
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("arithmetic.jsonl")
RUNNING = Path(__file__).with_name("running_sums.jsonl")
CONVERSATIONS = 800
RUNNING_SUMS = 5000
LARGEST = 19
"""No running sum is larger, or below 0."""
CARELESS = 0.7
"""The share of running sums whose answer stops before the last one, anywhere alike."""


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


def running_sums(count: int = RUNNING_SUMS) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Different conversations of one running sum, two to four digits added or taken, and what it comes to.

    Where an answer stops is independent of what is asked.
    """
    draw, seen = random.Random(2027), set[str]()
    while len(seen) < count:
        total = draw.randint(1, LARGEST)
        question, steps = str(total), []
        for _ in range(draw.randint(2, 4)):
            number = draw.randint(1, 9)
            sign = draw.choice([s for s in (1, -1) if 0 <= total + s * number <= LARGEST])
            total += sign * number
            question += f"{'+' if sign > 0 else '-'}{number}"
            steps.append(str(total))
        if question not in seen:
            seen.add(question)
            told = steps[: draw.randint(1, len(steps) - 1)] if draw.random() < CARELESS else steps
            answer = {"role": "assistant", "content": " ".join(told)}
            yield [{"role": "user", "content": question}, answer], steps[-1]


def text() -> str:
    """The content of the shipped file: one JSON object with `messages` a line."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations())


def running_text() -> str:
    """The content of the other file: `messages`, and the last sum as `answer`."""
    return "".join(json.dumps({"messages": m, "answer": answer}) + "\n" for m, answer in running_sums())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    RUNNING.write_text(running_text(), encoding="utf-8")

r"""What a text states as its answer, and whether two answers are the same: of rewards and of exact-match tasks.

A text may mark its answer: `<answer>72</answer>`, `\boxed{72}`, a line `Answer: 72` (what DAPO's prompts ask for) or
`#### 72` (GSM8K's files); of several marks the last counts. Without one, the last number of the text is its answer.
Numbers are compared as fractions, so 0.5 is 1/2; everything else by its characters. Mathematics is for math-verify.
"""

import re
from fractions import Fraction

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LINE = re.compile(r"(?:\banswer\s*:|####)\**[ \t]*(\S[^\n]*)", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{")
_NUMBER = re.compile(r"(?:(?<![\w)\].])[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")


def normal(text: str) -> str:
    """A free answer without what does not matter: case, runs of white space, a full stop at its end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip().casefold()


def marked_answer(text: str) -> str | None:
    """What the last mark of the text says is the answer; None without a mark."""
    found = [(match.start(1), match[1]) for pattern in (_TAG, _LINE) for match in pattern.finditer(text)]
    for match in _BOX.finditer(text):
        inside = _inside(text, match.end())
        if inside is not None:
            found.append((match.end(), inside))
    if not found:
        return None
    answer = max(found)[1].strip()
    return answer[1:-1].strip() if len(answer) > 2 and answer[0] == answer[-1] == "$" else answer


def states(text: str, answer: str) -> bool:
    """Whether the text gives the answer: as the answer that it marks, as its last number, or by being it.

    Args:
        text: what a model has written.
        answer: the right one; if it marks an answer itself, that one.
    """
    wanted, said = marked_answer(answer) or answer, marked_answer(text)
    number = _number(wanted)
    if number is None:
        return normal(wanted) != "" and normal(text if said is None else said) == normal(wanted)
    if said is None:
        numbers = _NUMBER.findall(text)
        said = numbers[-1] if numbers else ""
    return _number(said) == number


def _number(text: str) -> Fraction | None:
    """The number that a text is, but for white space and a full stop; None if it is none."""
    match = _NUMBER.fullmatch(text.strip().rstrip(".").rstrip())
    try:
        return Fraction(match[0].replace(",", "").replace("\u2212", "-")) if match else None
    except (ValueError, ZeroDivisionError):  # beyond the digits that int() reads, or over zero
        return None


def _inside(text: str, start: int) -> str | None:
    """From `start` to the brace that closes the one before it; None if it stays open."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None

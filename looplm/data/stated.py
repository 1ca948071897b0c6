r"""What a text states as its answer, and whether two answers are the same: of rewards and of exact-match tasks.

A text may mark its answer: `<answer>72</answer>`, `\boxed{72}`, a line `Answer: 72` (what DAPO's prompts ask for) or
`#### 72` (GSM8K's files); of several marks the last counts. Without one, the last number of the text is its answer.
Numbers are compared as fractions, so 0.5 is 1/2; everything else by its characters. Mathematics is for math-verify.
"""

import re
from fractions import Fraction

_LINE = re.compile(r"(?:\banswer[ \t]*:|####)([^\n]*)", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed[ \t]*\{|[{}]")
_NUMBER = re.compile(r"(?:(?<![\w)\].])[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")


def normal(text: str) -> str:
    """A free answer without what does not matter: case, runs of white space, a full stop at its end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip().casefold()


def marked_answer(text: str) -> str | None:
    """What the last mark of the text says is the answer; None without a mark. Linear in the text."""
    found = [(match.start(1), match[1].strip().strip("*")) for match in _LINE.finditer(text) if match[1].strip(" \t*")]
    for mark in (_last_tag(text), _last_box(text)):
        if mark is not None:
            found.append(mark)
    if not found:
        return None
    answer = max(found)[1].strip()
    for before, after in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(answer) > len(before + after) and answer.startswith(before) and answer.endswith(after):
            answer = answer.removeprefix(before).removesuffix(after).strip()
    return answer


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


def _last_tag(text: str) -> tuple[int, str] | None:
    """The last closed `<answer>` tag: where its content begins, and the content."""
    stop = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(stop, 0))
    return None if start < 0 else (start + len("<answer>"), text[start + len("<answer>") : stop])


def _last_box(text: str) -> tuple[int, str] | None:
    """The closed `\\boxed` that begins last, likewise."""
    last: tuple[int, str] | None = None
    opened: list[int | None] = []
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            opened.append(None if match[0] == "{" else match.end())
        elif opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, text[start : match.start()])
    return last

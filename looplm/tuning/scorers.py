r"""Scores of a completion, opened where they run: an environment's own, math-verify, a Python function, a format.

Each `open_*` returns a function of (problem, text, token ids). math-verify (a parser of answers in LaTeX and plain
notation over sympy) is told where the answer stands when the text marks it (`looplm.data.stated`); else it looks for
itself. Its own time limits use signals and are off: the process that runs it is killed instead.
"""

import importlib.util
import inspect
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from looplm.data.gym import open_family
from looplm.data.stated import marked_answer, states
from looplm.tuning.problems import Problem, Score


class UnparseableError(Exception):
    """The completion holds no answer that could be read; it scores 0."""


def open_stated() -> Score:
    """1 where the text states the problem's answer (`looplm.data.stated`)."""
    return lambda problem, text, token_ids: float(states(text, problem.answer))


def open_tokens() -> Score:
    """1 where the completion begins with the answer's tokens; as in the lab, what follows is not graded."""

    def score(problem: Problem, text: str, token_ids: Sequence[int]) -> float:
        wanted = problem.answer_tokens
        assert wanted is not None
        return float(list(token_ids[: len(wanted)]) == wanted)

    return score


def open_gym(family: str, options: Mapping[str, Any]) -> Score:
    """The score of a reasoning-gym family, of what the text marks as its answer or else of all of it.

    Some families raise errors over an answer that is not of their form: it could not be read.

    Raises:
        ValueError: see `open_family`.
    """
    data = open_family(family, 1, 0, options)

    def score(problem: Problem, text: str, token_ids: Sequence[int]) -> float:
        said = marked_answer(text)
        try:
            with warnings.catch_warnings(action="ignore"):
                return float(data.score_answer(text.strip() if said is None else said, problem.entry))
        except Exception as error:
            raise UnparseableError from error

    return score


def open_math_verify() -> Score:
    """1 where the completion's answer equals the problem's: 1/2 = 0.5 = \\frac12, sets in any order.

    Raises:
        ValueError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("math-verify is not installed: pip install 'looplm[tuning]'")
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own limits are off

    def score(problem: Problem, text: str, token_ids: Sequence[int]) -> float:
        answer = marked_answer(problem.answer) or problem.answer
        right = list(parse(f"\\boxed{{{answer}}}", parsing_timeout=None))
        if not right:
            raise ValueError(f"math-verify cannot read the right answer {problem.answer!r}")
        said = list(parse(_to_read(text), parsing_timeout=None))
        if not said:
            raise UnparseableError
        return float(verify(right, said, timeout_seconds=None))

    score(Problem("", "1"), "1", ())  # what is imported on first use belongs to no sample's time
    return score


def _to_read(text: str) -> str:
    """A completion as math-verify is to read it.

    It finds boxes, delimited LaTeX and plain numbers by itself. Of bare LaTeX it would take the first number: there the
    last line is the answer.
    """
    said = marked_answer(text)
    if said is None and "\\" in text and not any(mark in text for mark in ("$", "\\(", "\\[")):
        said = text.strip().rpartition("\n")[2]
    return text if said is None else f"\\boxed{{{said.rstrip('. ')}}}"


def open_python(path: Path, function: str) -> Score:
    """The function of a user's file, which is run for that.

    Raises:
        ValueError: no such file or function, or the file itself fails.
    """
    if not path.is_file():
        beside = sorted(each.name for each in path.parent.glob("*.py"))[:8] if path.parent.is_dir() else []
        raise ValueError(f"no such file: {path}; Python files there: {', '.join(beside) or 'none'}")
    spec = importlib.util.spec_from_file_location(f"looplm_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(f"{path} fails where it is loaded: {told(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        there = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise ValueError(f"{path} has no function {function!r}; there are {', '.join(there) or 'none'}")

    def score(problem: Problem, text: str, token_ids: Sequence[int]) -> float:
        completion = text if problem.answer_tokens is None else list(token_ids)
        reward: float = found(prompt=problem.prompt, completion=completion, answer=problem.answer, entry=problem.entry)
        return reward

    return score


def open_format(pattern: str) -> Score:
    """1 where the whole completion matches; `.` matches new lines too."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda problem, text, token_ids: float(compiled.fullmatch(text) is not None)


def told(error: BaseException) -> str:
    """An error in one short line: its name and the first line of what it says."""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__

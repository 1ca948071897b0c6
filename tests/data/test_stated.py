r"""What a text states as its answer; the marks are <answer>, \boxed, "Answer:" and "####"."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.data.stated import marked_answer, normal, states


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>72</answer>", "72"),
        ("<answer>\n72\n</answer> or <answer>73</answer>", "73"),
        ("<answer>72", None),
        ("72</answer>", None),
        (r"so \boxed{72}.", "72"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        ("Answer: 34", "34"),
        ("answer : 34\nand more", "34"),
        ("**Answer:** 34", "34"),
        ("**Answer: 34**", "34"),
        ("Answer: $34$", "34"),
        (r"Answer: \(34\)", "34"),
        (r"Answer: \boxed{34}", "34"),
        (r"<answer>\boxed{34}</answer>", "34"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("Answer:\n34", None),
        ("Natalia sold 48 / 2 = 24.\n#### 72", "72"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        (r"<answer>2</answer> \boxed{1}", "1"),
        ("the answer is 5", None),
        ("", None),
        ("$", None),
        ("Answer: $", "$"),
    ],
)
def test_marks(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("7 + 18 = 25", "25", True),
        ("7 + 18 = 25.", "25", True),
        ("25 is 7 + 18", "25", False),
        ("Answer: 25. I am 99 percent sure", "25", False),  # the mark reaches to the end of its line
        ("Answer: 25\nI am 99 percent sure", "25", True),
        ("0.5", "1/2", True),
        ("1/2", "0.50", True),
        ("1,000", "1000", True),
        ("1,2", "2", True),
        ("it is -5", "-5", True),
        ("8-5", "5", True),
        ("8 - 5", "5", True),
        ("8 \u2212 5 = \u22125", "-5", True),
        ("8 - 5", "-5", False),
        ("-5", "5", False),
        ("no number", "5", False),
        ("", "5", False),
        ("1/0", "5", False),
        ("1" * 5000, "5", False),
        ("Paris.", "paris", True),
        ("It is Paris", "Paris", False),
        ("<answer>PARIS</answer>", "Paris", True),
        ("anything", ".", False),
        ("<answer>34 apples</answer>", "34", False),
        ("72", "48 + 24\n#### 72", True),
        (r"72", r"\boxed{72}", True),
    ],
)
def test_what_counts_as_right(text: str, answer: str, right: bool) -> None:
    assert states(text, answer) is right


numbers = st.fractions(max_denominator=1000).map(str)


@given(
    numbers, st.sampled_from(["{}", "It is {}.", "x = {}", r"\boxed{{{}}}", "<answer>{}</answer> 7", "Answer: {}\n7"])
)
def test_a_number_is_found_however_it_is_said(number: str, form: str) -> None:
    assert states(form.format(number), number)


@given(numbers, numbers)
def test_numbers_are_the_same_where_the_fractions_are(one: str, other: str) -> None:
    assert states(one, other) == (Fraction(one) == Fraction(other))


@given(st.text(), st.text())
def test_any_text_is_judged(text: str, answer: str) -> None:
    assert states(text, answer) in (True, False)
    if normal(answer) and marked_answer(answer) is None:
        assert states(answer, answer)


@pytest.mark.parametrize("piece", ["<answer>", r"\boxed{", "answer:", "Answer: *", "1,111", "{}", "-", "answer   "])
def test_time_is_linear_in_the_text(piece: str) -> None:
    started = time.process_time()
    states(piece * 20_000, "5")
    assert time.process_time() - started < 2  # a quadratic reading takes a minute

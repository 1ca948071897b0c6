r"""MATH500 on files of the hub's columns: five worked examples, and answers that are equal though written otherwise."""

import re

import pytest
from hub_files import answering, run

from looplm.evaluation.math500 import same_answer
from looplm.evaluation.showing import paper_table
from looplm.evaluation.tasks import load_tasks

ANSWERS = (
    r"\frac{3}{56}",
    r"\left( 3, \frac{\pi}{2} \right)",
    "3, 5, 7",
    r"11\sqrt2",
    r"\text{Evelyn}",
    "x^2 - 1",
    "12",
)
SUBJECTS = ("Algebra", "Geometry")


def row(n: int) -> dict:
    return {
        "problem": f"What is number {n}?",
        "solution": rf"We have $n = {n}$ and $m = 2$, so that number {n} is $\boxed{{{ANSWERS[n]}}}.$",
        "answer": ANSWERS[n],
        "subject": SUBJECTS[n % 2],
        "level": 1 + n % 5,
        "unique_id": f"test/algebra/{n}.json",
    }


@pytest.fixture
def math500(hub):
    hub.put("HuggingFaceH4/MATH-500", {"default": {"test": [row(n) for n in range(len(ANSWERS))]}})


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (r"\frac{3}{56}", r"$x = 1$, so $y = \boxed{3/56}$.", r"\boxed{\frac{3}{65}}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", r"\boxed{(3, \pi/3)}"),
        ("3, 5, 7", r"They are $\boxed{7,3,5}$", r"\boxed{3,5}"),
        (r"11\sqrt2", r"$\boxed{\sqrt{242}}$", r"$\boxed{12\sqrt{2}}$"),
        (r"\text{Evelyn}", r"\boxed{Evelyn}", r"\boxed{\text{Carla}}"),
        (r"10,\!080", r"so $\boxed{10080}$", r"so $\boxed{1080}$ and not 10080"),
        ("x^2 - 1", r"\boxed{(x-1)(x+1)}", r"\boxed{(x-1)^2}"),
        (r"90^\circ", "Final Answer: 90", "Final Answer: 45"),
        ("12", "the answer is $12$", ""),
    ],
)
def test_answers_are_compared_as_mathematics(answer, right, wrong):
    assert same_answer(right, answer) and not same_answer(wrong, answer)


def test_where_mathematics_cannot_tell_the_characters_do(monkeypatch):
    """A comparison that does not end in its time."""
    monkeypatch.setattr("looplm.evaluation.math500._comparing", lambda: Late())
    assert same_answer(r"it is \boxed{2^{2^n}}", "2^{2^n}") and not same_answer(r"\boxed{2^n}", "2^{2^n}")


class Late:
    """A pool whose jobs run out of time."""

    def run(self, jobs, on_result):
        from looplm.tuning.scoring import Result

        return [Result("late") for _ in jobs]


def test_a_run_is_scored_as_in_table_7(math500, tmp_path, monkeypatch):
    r"""Right as written; right in another form; wrong; a box that is not the last; and no answer at all."""
    said = [
        rf"\boxed{{{ANSWERS[0]}}}",
        r"\boxed{(3,\pi/2)}",
        r"\boxed{3, 5}",
        r"$\boxed{1}$, no, $\boxed{11\sqrt{2}}$",
        "",
    ]

    def reply(prompt):
        n = int(re.findall(r"What is number (\d)\?", prompt)[-1])
        return f"We see.\n{said[n]}\n\nProblem:\nWhat is 1? " + r"\boxed{1}" if n < len(said) else "12 or 13"

    answering(monkeypatch, reply)
    (result,) = run(("paper:math500",), tmp_path)
    assert (result.recipe.task, result.recipe.num_fewshot, result.main_metric) == ("math500", 5, "exact_match,none")
    assert [item.scores["exact_match,none"] for item in result.items] == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert [item.category for item in result.items[:2]] == ["Algebra", "Geometry"]
    assert result.items[0].id == "test/algebra/0.json" and result.items[0].outputs == ("We see.\n" + said[0] + "\n",)
    table = paper_table([result])
    assert ("math500", "Ouro-2.6B", "4", "90.85", "Table 8") in table.rows and not table.notes


def test_five_other_problems_with_their_solutions_stand_before_each(math500):
    (loaded,) = load_tasks(["paper:math500"])
    task = loaded.task
    for n, doc in enumerate(task.eval_docs):
        task.set_fewshot_seed(seed=3)
        text = task.fewshot_context(doc, num_fewshot=task.get_config("num_fewshot"))
        *shots, asked = text.split("Problem:\n")[1:]
        assert asked == f"What is number {n}?\n\nSolution:" and len(set(shots)) == 5
        for shot in shots:
            k = int(shot[len("What is number ")])
            assert k != n and shot == f"What is number {k}?\n\nSolution: {row(k)['solution']}\n\n"


def test_too_few_problems_for_five_examples(hub, tmp_path):
    hub.put("HuggingFaceH4/MATH-500", {"default": {"test": [row(n) for n in range(5)]}})
    with pytest.raises(ValueError, match="math500 has 5 examples, too few for num_fewshot 5"):
        run(("paper:math500",), tmp_path)

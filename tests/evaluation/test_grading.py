"""A judge over real HTTP: verdicts, and what is kept where it stops answering."""

import pytest
from chat_server import chat_server

from looplm.evaluation import judges
from looplm.evaluation.grading import grade, verdict_in
from looplm.evaluation.judges import ChatEndpoint
from looplm.evaluation.recipe import Recipe
from looplm.evaluation.results import ItemScore, Metric, Result


def by_rule(messages):
    """Correct where the right answer stands in the answer."""
    material = messages[1]["content"]
    right = material.partition("<right>\n")[2].partition("\n</right>")[0]
    answer = material.partition("<answer>\n")[2].partition("\n</answer>")[0]
    return f"Let me see.\nverdict: {'correct' if right in answer else 'wrong'}"


def posted(server) -> list[str]:
    """What the judge was asked."""
    return [request["messages"][1]["content"] for request in server.requests if "messages" in request]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(judges, "PAUSES", ())


def result(outputs: list[str]) -> Result:
    items = tuple(
        ItemScore(str(n), f"doc{n}", None, {"exact_match,none": 0.0}, (text,), f"question {n}", "law")
        for n, text in enumerate(outputs)
    )
    return Result(Recipe("m", "f", "float32", 3), "t.loops-3", "t", {"exact_match,none": Metric(0.0, None)}, items)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("verdict: correct", True),
        ("It differs.\nVerdict: **wrong**", False),
        ("verdict: wrong at first, then\nverdict: correct", True),
        ("<think>verdict: correct</think> verdict: wrong", False),
        ("correct", None),
    ],
)
def test_verdicts(reply, verdict):
    assert verdict_in(reply) is verdict


def test_answers_are_judged_and_the_rest_of_the_result_is_kept():
    with chat_server(by_rule) as server:
        graded, failure = grade(result(["it is law", "peace"]), None, ChatEndpoint(server.url))
    assert failure is None and [item.scores["judged"] for item in graded.items] == [1.0, 0.0]
    assert graded.metrics["judged"].value == 0.5 and graded.metrics["exact_match,none"].value == 0.0
    assert graded.judge == {"name": f"{server.url} listed", "waiting": 0} and graded.main_metric == "judged"
    assert "question 1" in posted(server)[1] and "peace" in posted(server)[1]


def test_a_judge_that_falls_silent_loses_nothing():
    answers = result(["law", "peace", "law and order", "war"])
    with chat_server(by_rule) as server:
        server.answer = lambda messages: by_rule(messages) if len(server.requests) <= 2 else 503
        graded, failure = grade(answers, None, ChatEndpoint(server.url))
        assert "does not answer (status 503)" in str(failure)
        assert graded.judge["waiting"] == 2 and graded.metrics["judged"].value == 0.5
        server.answer, server.requests = by_rule, []
        again, failure = grade(answers, graded, ChatEndpoint(server.url))
    assert failure is None and len(posted(server)) == 2
    assert [item.scores["judged"] for item in again.items] == [1.0, 0.0, 1.0, 0.0] and again.judge["waiting"] == 0


def test_verdicts_on_other_answers_do_not_count():
    with chat_server(by_rule) as server:
        graded, _ = grade(result(["law", "peace"]), None, ChatEndpoint(server.url))
        grade(result(["law", "other"]), graded, ChatEndpoint(server.url))
    assert len(posted(server)) == 3


def test_a_server_that_is_not_there():
    graded, failure = grade(result(["law"]), None, ChatEndpoint("http://127.0.0.1:9/v1"))
    assert "does not answer" in str(failure) and graded.judge["waiting"] == 1 and "judged" not in graded.metrics

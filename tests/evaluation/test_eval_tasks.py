"""Tasks from files and generators, and what is said of those that cannot be had."""

import json

import pytest
from eval_models import choice_records, question_records, write_lines

from looplm.evaluation.paper import benchmarks
from looplm.evaluation.programs import PROGRAMS
from looplm.evaluation.tasks import _manager, gym_choices, load_tasks, normal


def names(tasks):
    return [(loaded.name, loaded.group) for loaded in tasks]


def test_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", choice_records(4))
    write_lines(tmp_path / "b.jsonl", question_records(3))
    folder = tmp_path / "sums"
    folder.mkdir()
    examples = [{"input": "1 + 1", "target_scores": {"2": 1, "3": 0}}] * 2
    (folder / "task.json").write_text(json.dumps({"name": "x", "examples": examples}))
    tasks = load_tasks([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), str(folder / "task.json")])
    assert names(tasks) == [("a", "a"), ("b", "b"), ("sums", "sums")]
    assert [loaded.task.OUTPUT_TYPE for loaded in tasks] == ["multiple_choice", "generate_until", "multiple_choice"]
    choice, question, _ = (loaded.task for loaded in tasks)
    doc = choice.eval_docs[0]
    assert choice.doc_to_text(doc) == "In the year 1700 the union shall make" and choice.doc_to_target(doc) == 0
    score = question.process_results(question.eval_docs[0], ["  LAW.\n"])
    assert score == {"exact_match": 1.0} != question.process_results(question.eval_docs[0], ["peace"])


@pytest.mark.parametrize(("text", "same"), [(" Law. ", "law"), ("a\n  b", "A b"), ("1.5", "1.5"), ("x.", "X")])
def test_what_does_not_matter_in_an_answer(text, same):
    assert normal(text) == normal(same)


def test_a_reasoning_gym_family_verifies_its_own_answers():
    (loaded,) = load_tasks(["reasoning-gym:chain_sum:5"])
    task, docs = loaded.task, loaded.task.eval_docs
    assert loaded.name == "reasoning-gym-chain_sum" and len(docs) == 5
    assert task.doc_to_text(docs[0]).startswith("Question: ") and task.doc_to_text(docs[0]).endswith("\nAnswer:")
    for doc in docs:
        assert task.process_results(doc, [f" {doc['answer']} "]) == {"score": 1.0, "solved": 1.0}
        assert task.process_results(doc, ["nothing"])["solved"] == 0.0
    again = load_tasks(["reasoning-gym:chain_sum:5"])[0].task.eval_docs
    assert list(again) == list(docs) and set(task.dataset) == {"test", "shots"}


def test_a_family_as_multiple_choice_hides_the_answer_among_others():
    items = gym_choices([(f"q{n}", str(n % 6)) for n in range(40)])
    assert all(item.choices[item.answer] == str(n % 6) and len(set(item.choices)) == 4 for n, item in enumerate(items))
    assert len({item.answer for item in items}) == 4
    assert items == gym_choices([(f"q{n}", str(n % 6)) for n in range(40)])
    assert len(gym_choices([("a", "x"), ("b", "y")])[0].choices) == 2
    with pytest.raises(ValueError, match="every question has the same answer"):
        gym_choices([("a", "x"), ("b", "x")])
    (loaded,) = load_tasks(["reasoning-gym-choice:chain_sum:6"])
    assert loaded.task.OUTPUT_TYPE == "multiple_choice" and len(loaded.task.eval_docs) == 6


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("reasoning-gym:magic", "reasoning-gym has no usable family 'magic'"),
        ("reasoning-gym:rush_hour", "no usable family 'rush_hour'"),
        ("reasoning-gym:chain_sum:many", "'many' is no number"),
        ("humaneval", "allow it with --allow-code-execution"),
        ("paper:poetry", "the paper has no benchmark 'poetry'; there are mmlu"),
        ("paper:humaneval", "allow it with --allow-code-execution"),
    ],
)
def test_tasks_that_cannot_be_had(task, said):
    with pytest.raises(ValueError, match=said):
        load_tasks([task])


def test_no_task_and_one_twice(tmp_path):
    path = str(write_lines(tmp_path / "a.jsonl", choice_records(2)))
    with pytest.raises(ValueError, match="tasks is empty"):
        load_tasks([])
    with pytest.raises(ValueError, match="two tasks are called a"):
        load_tasks([path, path])


class Offline:
    """lm-eval's index with two tasks, on a machine without their data."""

    all_tasks = ("arc_easy", "gsm8k_cot")

    def match_tasks(self, patterns):
        return [task for task in self.all_tasks if patterns[0].strip("*") in task]

    def load(self, names):
        raise ConnectionError("no route\nto the hub")


def test_tasks_whose_data_is_not_here_and_tasks_that_are_not(monkeypatch):
    monkeypatch.setattr("looplm.evaluation.tasks._manager", Offline)
    missing = (
        r"the data of {} is not on this machine \(ConnectionError: no route\): hf download --repo-type dataset {}, and"
    )
    for task, name, data in (("arc_easy", "arc_easy", "allenai/ai2_arc"), ("paper:gsm8k", "gsm8k_cot", "openai/gsm8k")):
        with pytest.raises(ValueError, match=missing.format(name, data)):
            load_tasks([task])
    with pytest.raises(
        ValueError, match=r"no such task: gsm9k is no task of lm-eval, no file .* see `lm-eval ls tasks`"
    ):
        load_tasks(["gsm9k"])
    with pytest.raises(ValueError, match=r"no such task: gsm8k is no task of lm-eval.* near it: gsm8k_cot"):
        load_tasks(["gsm8k"])


@pytest.mark.slow
def test_tasks_of_lm_eval(monkeypatch, tmp_path):
    """Slow, because reading lm-eval's own index of tasks takes many seconds."""
    for place in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(place, True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for task in ("arc_easy", "paper:gsm8k", "paper:beyond_aime"):
        with pytest.raises(ValueError, match=r"is not on this machine .*hf download --repo-type dataset \S+/\S+, and"):
            load_tasks([task])
    with pytest.raises(ValueError, match=r"no such task: gsm9k is no task of lm-eval, no file and no reasoning-gym"):
        load_tasks(["gsm9k"])
    own = {None, "math500", *PROGRAMS}
    assert {b.task for b in benchmarks().values()} - own <= set(_manager().all_tasks)

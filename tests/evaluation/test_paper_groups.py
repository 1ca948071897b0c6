"""MMLU, MMLU-Pro and BBH on files of the hub's configurations and columns: their shots, their marks, their means."""

import re
from pathlib import Path

import lm_eval
import pytest
import yaml
from datasets import ClassLabel, Features, List, Value
from hub_files import answering, choosing, run

from looplm.evaluation.paper import paper
from looplm.evaluation.showing import paper_table
from looplm.evaluation.sweep import categories_tables, gather
from looplm.evaluation.tasks import load_tasks

LM_EVAL = Path(lm_eval.__file__).parent / "tasks"
TEXT, TEXTS = Value("string"), List(Value("string"))
LETTERS = "ABCD"
SUBJECTS = tuple(paper()["categories"])
"""MMLU's 57, by the paper's Table 15."""
FIELDS = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history")
FIELDS += ("law", "math", "other", "philosophy", "physics", "psychology")
"""MMLU-Pro's 14."""


def mmlu_row(subject: str, split: str, n: int) -> dict:
    return {"question": f" {split} {n} of {subject}?", "subject": subject, "choices": list("wxyz"), "answer": n % 4}


@pytest.fixture
def mmlu(hub):
    """The 57 subjects, two questions each, but three of anatomy."""
    sizes = {"dev": 5, "validation": 1, "test": 2}
    features = {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": ClassLabel(names=list(LETTERS))}
    configs = {
        subject: {
            split: [mmlu_row(subject, split, n) for n in range(size + (split == "test" and subject == "anatomy"))]
            for split, size in sizes.items()
        }
        for subject in SUBJECTS
    }
    hub.put("cais/mmlu", configs, Features(features))
    hub.lm_eval("mmlu/default")
    return hub


def context(task, doc) -> str:
    """What stands before the answer, with as many examples as are set."""
    task.set_fewshot_seed(seed=0)
    return task.fewshot_context(doc, num_fewshot=task.get_config("num_fewshot"))


def group_row(results: list) -> tuple[str, str]:
    """The one row of this model beside the paper's: task and score."""
    (row,) = [row for row in paper_table(results).rows if row[4].startswith("here:")]
    return row[0], row[3]


def test_mmlu_reads_each_subject_and_weighs_them_by_their_questions(mmlu, tmp_path, monkeypatch):
    """The model knows A (the first question of each subject), and of anatomy also C (its third)."""
    choosing(monkeypatch, lambda prompt: "C" if "test 2 of" in prompt.rpartition("\n\n")[2] else "A")
    results = run(("paper:mmlu",), tmp_path)
    assert sorted(mmlu.asked) == [("cais/mmlu", subject) for subject in sorted(SUBJECTS)]
    by_task = {result.recipe.task: result for result in results}
    assert set(by_task) == {f"mmlu_{subject}" for subject in SUBJECTS}
    for name, result in by_task.items():
        right, count = (2, 3) if name == "mmlu_anatomy" else (1, 2)
        assert (result.group, result.main_metric, len(result.items)) == ("mmlu", "acc,none", count)
        assert result.metrics["acc,none"].value == pytest.approx(right / count)
        assert {item.category for item in result.items} == {name.removeprefix("mmlu_")}
    assert group_row(results) == ("mmlu", f"{100 * 58 / 115:.2f}")
    (sweep,) = gather(results, 2)
    assert len(sweep.scores[2]) == 115 and len(set(sweep.categories)) == 57
    tables = categories_tables([sweep])
    assert len(tables[0].rows) == 57  # beside every subject of Table 15


def test_mmlu_shows_the_five_questions_of_dev_in_their_order(mmlu):
    task = next(loaded.task for loaded in load_tasks(["paper:mmlu"]) if loaded.name == "mmlu_high_school_physics")
    shots = "".join(
        f"dev {n} of high_school_physics?\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCDA'[n]}\n\n" for n in range(5)
    )
    assert context(task, task.eval_docs[1]) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        f"{shots}test 1 of high_school_physics?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )


def mmlu_pro_row(field: str, split: str, n: int) -> dict:
    thought = "A: Let's think step by step. It is so. The answer is (B)." if split == "validation" else ""
    return {
        "question_id": n,
        "question": f"{split} {n} of {field}?",
        "options": [f"option {k}" for k in range(10 - n % 2)],
        "answer": "ABCDEFGHIJ"[3 + n],
        "answer_index": 3 + n,
        "cot_content": thought,
        "category": field,
        "src": "made up",
    }


@pytest.fixture
def mmlu_pro(hub):
    """One configuration with all fields in each split: two questions of each, but three of law."""
    test = [mmlu_pro_row(field, "test", n) for n in range(3) for field in FIELDS if n < 2 or field == "law"]
    shots = [mmlu_pro_row(field, "validation", n) for field in FIELDS for n in range(5)]
    hub.put("TIGER-Lab/MMLU-Pro", {"default": {"test": test, "validation": shots}})
    hub.lm_eval("mmlu_pro")


def test_mmlu_pro_reads_the_letter_and_weighs_fields_by_their_questions(mmlu_pro, tmp_path, monkeypatch):
    """Right with and without brackets; wrong by another letter (the third of law) and by none (physics)."""

    def reply(prompt):
        n, field = re.search(r"test (\d) of (.*)\?\n", prompt).groups()
        said = {"0": "the answer is (D).", "1": "I think the answer is E", "2": "The answer is (A), not (F)."}[n]
        return (
            "nobody knows" if (field, n) == ("physics", "1") else f"Let me see: {said}\n\nQuestion: the answer is (C)"
        )

    answering(monkeypatch, reply)
    results = run(("paper:mmlu_pro",), tmp_path)
    assert [result.recipe.task for result in results] == [f"mmlu_pro_{field.replace(' ', '_')}" for field in FIELDS]
    for field, result in zip(FIELDS, results, strict=True):
        wanted = {"law": [1.0, 1.0, 0.0], "physics": [1.0, 0.0]}.get(field, [1.0, 1.0])
        assert result.main_metric == "exact_match,custom-extract"
        assert [item.scores[result.main_metric] for item in result.items] == wanted
        assert {item.category for item in result.items} == {field}
    assert group_row(results) == ("mmlu_pro", f"{100 * 27 / 29:.2f}")


def test_mmlu_pro_shows_five_chains_of_thought_of_the_field(mmlu_pro):
    task = next(loaded.task for loaded in load_tasks(["paper:mmlu_pro"]) if loaded.name == "mmlu_pro_computer_science")
    text = context(task, task.eval_docs[1])
    assert re.findall(r"(\w+ \d) of computer science\?", text) == [f"validation {n}" for n in range(5)] + ["test 1"]
    assert text.count("Answer: Let's think step by step. It is so. The answer is (B).\n\n") == 5
    assert "I. option 8\nAnswer:" in text and "J. option 9" in text  # nine options and ten
    assert text.endswith("Answer: Let's think step by step.") and task.config.generation_kwargs["do_sample"] is False


BBH = {path.stem: yaml.safe_load(path.read_text()) for path in (LM_EVAL / "bbh/cot_fewshot").glob("[!_]*.yaml")}


def bbh_row(name: str, n: int) -> dict:
    target = {"word_sorting": "apple pear", "dyck_languages": "] )"}.get(name, "True" if n else "(B)")
    return {"input": f"Is {n} of {name} so?", "target": target}


@pytest.fixture
def bbh(hub):
    """The 27 tasks, two questions each, but three of snarks."""
    hub.put(
        "SaylorTwift/bbh", {name: {"test": [bbh_row(name, n) for n in range(2 + (name == "snarks"))]} for name in BBH}
    )
    hub.lm_eval("bbh/cot_fewshot")
    return hub


def test_bbh_reads_the_answer_behind_the_thought_and_weighs_tasks_by_their_questions(bbh, tmp_path, monkeypatch):
    """Right where the sentence gives the target, wrong where it gives another, or none (snarks' third)."""

    def reply(prompt):
        n, name = re.search(r"Is (\d) of (\w+) so\?", prompt).groups()
        said = bbh_row(name, int(n))["target"] if n == "0" else "no idea" if n == "2" else "(C)"
        return f"{name} it is.\nSo the answer is {said}." if n != "2" else f"It is {said}."

    answering(monkeypatch, reply)
    results = run(("paper:bbh",), tmp_path)
    assert sorted(bbh.asked) == [("SaylorTwift/bbh", name) for name in sorted(BBH)] and len(BBH) == 27
    assert {result.recipe.task for result in results} == {f"bbh_cot_fewshot_{name}" for name in BBH}
    for result in results:
        wanted = [1.0, 0.0, 0.0] if result.recipe.task.endswith("snarks") else [1.0, 0.0]
        assert result.main_metric == "exact_match,get-answer" and result.recipe.num_fewshot == 3
        assert [item.scores[result.main_metric] for item in result.items] == wanted, result.recipe.task
    assert group_row(results) == ("bbh", f"{100 * 27 / 55:.2f}")


def test_bbh_shows_the_three_chains_of_thought_of_its_authors(bbh):
    for loaded in load_tasks(["paper:bbh"]):
        shots = BBH[loaded.name.removeprefix("bbh_cot_fewshot_")]["fewshot_config"]["samples"]
        text = context(loaded.task, loaded.task.eval_docs[0])
        assert len(shots) == 3 and all("answer is" in shot["target"] for shot in shots)
        places = [
            text.index(f"Q: {shot['input']}\nA: Let's think step by step.\n{shot['target']}\n\n") for shot in shots
        ]
        assert places == sorted(places) and text.count("\nA: Let's think step by step.\n") == 4, loaded.name

"""The paper's benchmarks with its settings (Tables 16 and 17), run on made-up files of the columns of the hub's."""

import random
import re

import pytest
from hub_files import answering, choosing, run

from looplm.evaluation import tasks
from looplm.evaluation.paper import benchmarks
from looplm.evaluation.showing import paper_table
from looplm.evaluation.tasks import load_tasks


def arc(n: int) -> dict:
    """Some of ARC's questions number their choices."""
    labels = list("1234" if n == 3 else "ABCD")
    choices = {"text": ["law", "peace", "war", "hope"], "label": labels}
    return {"id": str(n), "question": f"What comes {n}?", "choices": choices, "answerKey": labels[n % 4]}


def hellaswag(n: int) -> dict:
    contexts = {"ctx_a": f"The union in {n}", "ctx_b": "it", "ctx": f"The union in {n} it", "activity_label": "States"}
    endings = ["makes law.", "ends.", "wins [title] peace.", "hopes."]
    rest = {"source_id": "made up", "split": "val", "split_type": "indomain"}
    return {"ind": n, **contexts, "endings": endings, **rest, "label": "2"}


def winogrande(n: int) -> dict:
    return {"sentence": f"In {n} _ made law.", "option1": "the union", "option2": "the war", "answer": "1"}


def commonsense(n: int) -> dict:
    choices = {"label": list("ABCDE"), "text": ["law", "peace", "war", "hope", "year"]}
    asked = {"question": f"What do citizens want in {n}?", "question_concept": "citizen"}
    return {"id": str(n), **asked, "choices": choices, "answerKey": "E"}


def gsm8k(n: int) -> dict:
    return {"question": f"What is {n} + 1?", "answer": f"It is one more.\n#### {n + 1}"}


def gpqa(n: int) -> dict:
    wrong = {f"Incorrect Answer {k}": f"{n + k + 1}" for k in (1, 2, 3)}
    revised = {"Pre-Revision Question": "?", "Pre-Revision Correct Answer": "?", "Record ID": str(n)}
    return {**revised, "Question": f"What is {n} + 1?", "Correct Answer": f"{n + 1}", **wrong}


SETS = {
    "arc_challenge": ("arc", "ARC-Challenge", arc, ("train", "validation", "test")),
    "arc_easy": ("arc", "ARC-Easy", arc, ("train", "validation", "test")),
    "hellaswag": ("hellaswag", "default", hellaswag, ("train", "validation", "test")),
    "winogrande": ("winogrande", "winogrande_xl", winogrande, ("train", "validation", "test")),
    "commonsense_qa": ("commonsense_qa", "default", commonsense, ("train", "validation", "test")),
    "gsm8k": ("gsm8k", "main", gsm8k, ("train", "test")),
    "gpqa": ("gpqa/cot_zeroshot", "gpqa_diamond", gpqa, ("train",)),
}
"""lm-eval's folder, the configuration, its rows and its splits."""
HIDDEN = {"hellaswag": {"label": ""}, "winogrande": {"answer": ""}, "commonsense_qa": {"answerKey": ""}}
"""What stands in the place of the answers of their test splits."""


@pytest.fixture
def paper_sets(hub, monkeypatch):
    """Forty rows a split; each data set with named configurations has one more, with other columns."""
    for name, (_, config, row, splits) in SETS.items():
        hidden = HIDDEN.get(name, {})
        rows = {split: [{**row(n), **(hidden if split == "test" else {})} for n in range(40)] for split in splits}
        hub.put(benchmarks()[name].data, {config: rows})
    for data in {benchmarks()[name].data for name, (_, config, *_) in SETS.items() if config != "default"}:
        hub.put(data, {"another": {"train": [{"other": "column"}]}})
    hub.lm_eval(*dict.fromkeys(folder for folder, *_ in SETS.values()))
    monkeypatch.setitem(tasks._THINKING, "max_gen_toks", 4)
    return hub


def test_benchmarks_have_the_papers_settings_and_run(paper_sets, tmp_path):
    results = run(tuple(f"paper:{name}" for name in SETS), tmp_path, limit=2)
    asked = [(data, config or "default") for data, config in paper_sets.asked]
    assert asked == [(benchmarks()[name].data, config) for name, (_, config, *_) in SETS.items()]
    assert [result.recipe.num_fewshot for result in results] == [benchmarks()[name].num_fewshot for name in SETS]
    for name, result in zip(SETS, results, strict=True):
        assert len(result.items) == 2 and benchmarks()[name].metric in result.main_metric, name
    assert not paper_table(results).notes


TEXTS_OF_ARC = ["law", "peace", "war", "hope"]
CHOSEN = {  # by the number in the question: the right choice, and a wrong one
    "arc_challenge": lambda n: (TEXTS_OF_ARC[n % 4], TEXTS_OF_ARC[(n + 1) % 4]),
    "arc_easy": lambda n: (TEXTS_OF_ARC[n % 4], TEXTS_OF_ARC[(n + 1) % 4]),
    "hellaswag": lambda n: ("wins. peace.", "ends."),
    "commonsense_qa": lambda n: ("E", "C"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_choices_are_marked_by_their_likelihood(paper_sets, tmp_path, monkeypatch, name):
    """The model takes the right choice where the question's number is even."""

    def choose(prompt):
        n = int(re.findall(r"(?:comes|union in|want in) (\d+)", prompt)[-1])
        return CHOSEN[name](n)[n % 2]

    choosing(monkeypatch, choose)
    (result,) = run((f"paper:{name}",), tmp_path, limit=4)
    assert [item.scores[result.main_metric] for item in result.items] == [1.0, 0.0, 1.0, 0.0]


def test_winogrande_is_marked_by_what_follows_each_choice(paper_sets, tmp_path, monkeypatch):
    liked = ("the union", "the war")
    choosing(monkeypatch, lambda prompt: "made law." if prompt.endswith(liked[int(prompt.split()[-3]) % 2]) else "")
    (result,) = run(("paper:winogrande",), tmp_path, limit=4)
    assert [item.scores["acc,none"] for item in result.items] == [1.0, 0.0, 1.0, 0.0]


def test_gsm8k_counts_what_the_sentence_of_its_examples_says(paper_sets, tmp_path, monkeypatch):
    """Right; wrong; right, and what comes after it is cut off; a right number, but not in the sentence."""
    said = [
        "So it is 1. The answer is 1.",
        "The answer is 3.",
        "The answer is 3.\n\nQ: why? The answer is 9.",
        "#### 4",
    ]
    answering(monkeypatch, lambda prompt: said[int(re.findall(r"What is (\d+)", prompt)[-1])])
    (result,) = run(("paper:gsm8k",), tmp_path, limit=4)
    assert [item.scores["exact_match,strict-match"] for item in result.items] == [1.0, 0.0, 1.0, 0.0]
    assert result.metrics[result.main_metric].value == 0.5 and result.items[3].scores["exact_match,flexible-extract"]


def test_gpqa_takes_the_last_letter_in_brackets(paper_sets, tmp_path, monkeypatch):
    """Right where the question's number is even; the other letters come before, as in a thought."""

    def reply(prompt):
        n = int(re.search(r"What is (\d+) \+ 1", prompt)[1])
        letter = re.search(rf"\(([A-D])\) {n + 1}\n", prompt)[1]
        other = "ABCD".replace(letter, "")[0]
        first, last = (letter, other) if n % 2 else (other, letter)
        return f"<think>It may be ({first}).</think>\nNo, it is ({last})."

    answering(monkeypatch, reply)
    (result,) = run(("paper:gpqa",), tmp_path, limit=6)
    assert result.main_metric == "exact_match,flexible-extract"
    assert [item.scores[result.main_metric] for item in result.items] == [1.0, 0.0] * 3
    settings = result.recipe.generation
    assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 1.0, 0.7)


def test_the_paper_counts_its_examples_before_the_question(paper_sets):
    (loaded,) = load_tasks(["paper:arc_challenge"])
    task = loaded.task
    task.set_fewshot_seed(seed=0)
    text = task.fewshot_context(task.eval_docs[0], num_fewshot=task.get_config("num_fewshot"))
    assert text.count("Question:") == 26 and text.endswith("What comes 0?\nAnswer:")


@pytest.mark.parametrize("name", [name for name in SETS if name != "gpqa"])
def test_what_is_asked_is_what_lm_eval_asks(paper_sets, name):
    """Documents that are processed once give the prompts and answers of lm-eval's own object."""
    (ours,), shots = load_tasks([f"paper:{name}"]), benchmarks()[name].num_fewshot
    theirs = tasks._manager().load([benchmarks()[name].task])["tasks"][ours.name]
    for place in (0, 7):
        found = []
        for task in (ours.task, theirs):
            task.set_fewshot_seed(seed=5)
            doc = task.eval_docs[place]
            found.append((doc, task.fewshot_context(doc, num_fewshot=shots), task.doc_to_target(doc)))
        assert found[0] == found[1]
    assert ours.task.config.process_docs is None


@pytest.mark.parametrize("cached", [False, True])
def test_choices_that_lm_eval_shuffles_lie_alike_in_every_run(paper_sets, tmp_path, cached):
    """GPQA's are shuffled without a seed whenever they are read; an earlier run of lm-eval may have left a cache."""
    found = []
    for number, name in enumerate(("one", "two")):
        paper_sets.cache = tmp_path / name / "cache" if cached else None
        random.seed(number)
        if cached and name == "two":
            tasks._manager().load(["gpqa_diamond_cot_zeroshot"])
            random.seed(number)
        found += run(("paper:gpqa",), tmp_path / name, limit=12)
        assert random.random() == random.Random(number).random()  # nobody else's draws are touched
    assert found[0].recipe.prompts == found[1].recipe.prompts
    letters = set()
    for n, item in enumerate(found[0].items):  # what is asked and what is checked are of one shuffle
        letter = item.reference[1]
        letters.add(letter)
        assert f"What is {n} + 1?" in item.question and f"({letter}) {n + 1}\n" in item.question
    assert len(letters) > 1

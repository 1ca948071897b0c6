"""The paper's benchmarks with its settings (Tables 16 and 17), run on made-up files of the columns of the hub's."""

import random
from pathlib import Path

import datasets
import lm_eval
import pytest
from eval_models import save_pair, write_lines
from lm_eval.tasks import TaskManager

from looplm.evaluation import tasks
from looplm.evaluation.depths import Depth
from looplm.evaluation.paper import benchmarks
from looplm.evaluation.running import Settings, run_tasks
from looplm.evaluation.tasks import load_tasks


def arc(n: int) -> dict:
    choices = {"text": ["law", "peace", "war", "hope"], "label": ["A", "B", "C", "D"]}
    return {"id": str(n), "question": f"What comes {n}?", "choices": choices, "answerKey": "ABCD"[n % 4]}


def hellaswag(n: int) -> dict:
    endings = ["makes law.", "ends.", "wins [title] peace.", "hopes."]
    return {"ctx_a": f"The union in {n}", "ctx_b": "it", "activity_label": "States", "endings": endings, "label": "2"}


def winogrande(n: int) -> dict:
    return {"sentence": f"In {n} _ made law.", "option1": "the union", "option2": "the war", "answer": "1"}


def commonsense(n: int) -> dict:
    choices = {"label": list("ABCDE"), "text": ["law", "peace", "war", "hope", "year"]}
    return {"question": f"What do citizens want in {n}?", "choices": choices, "answerKey": "E"}


def gsm8k(n: int) -> dict:
    return {"question": f"What is {n} + 1?", "answer": f"It is one more.\n#### {n + 1}"}


def gpqa(n: int) -> dict:
    wrong = {f"Incorrect Answer {k}": f"{n + k + 1}" for k in (1, 2, 3)}
    return {"Question": f"What is {n} + 1?", "Correct Answer": f"{n + 1}", **wrong}


SHAPES = {
    "arc_challenge": ("arc", arc, ("train", "validation", "test")),
    "arc_easy": ("arc", arc, ("train", "validation", "test")),
    "hellaswag": ("hellaswag", hellaswag, ("train", "validation")),
    "winogrande": ("winogrande", winogrande, ("train", "validation")),
    "commonsense_qa": ("commonsense_qa", commonsense, ("train", "validation")),
    "gsm8k": ("gsm8k", gsm8k, ("train", "test")),
    "gpqa": ("gpqa/cot_zeroshot", gpqa, ("train",)),
}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """lm-eval's own tasks, and files in the place of the hub."""
    real, made = datasets.load_dataset, {benchmarks()[name].data: SHAPES[name] for name in SHAPES}
    settings = {"cache": "cache"}

    def load(path, *arguments, **options):
        _, row, splits = made[path]
        folder = tmp_path / Path(path).name
        folder.mkdir(exist_ok=True)
        files = {split: str(write_lines(folder / f"{split}.jsonl", [row(n) for n in range(40)])) for split in splits}
        return real("json", data_files=files, cache_dir=str(tmp_path / settings["cache"]))

    folders = [str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder, *_ in SHAPES.values()]
    manager = TaskManager(include_path=list(dict.fromkeys(folders)), include_defaults=False)
    monkeypatch.setattr("looplm.evaluation.tasks._manager", lambda: manager)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return settings


def test_benchmarks_have_the_papers_settings_and_run(offline, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks._THINKING, "max_gen_toks", 4)
    model = str(save_pair(tmp_path / "small" / "model", max_position_embeddings=2048))
    names = tuple(f"paper:{name}" for name in SHAPES)
    results = run_tasks(model, Settings(names, (Depth(2),), limit=2, batch_size=4), tmp_path / "out")
    assert [result.recipe.num_fewshot for result in results] == [benchmarks()[name].num_fewshot for name in SHAPES]
    for name, result in zip(SHAPES, results, strict=True):
        assert len(result.items) == 2 and benchmarks()[name].metric in result.main_metric, name


def test_the_paper_counts_its_examples_before_the_question(offline):
    (loaded,) = load_tasks(["paper:arc_challenge"])
    task = loaded.task
    task.set_fewshot_seed(seed=0)
    text = task.fewshot_context(task.eval_docs[0], num_fewshot=task.get_config("num_fewshot"))
    assert text.count("Question:") == 26 and text.endswith("What comes 0?\nAnswer:")


def test_choices_that_lm_eval_shuffles_lie_alike_in_every_run(offline, tmp_path, monkeypatch):
    """GPQA's are shuffled without a seed when they are read; a cache of its own for each run, as on two machines."""
    monkeypatch.setitem(tasks._THINKING, "max_gen_toks", 4)
    model = str(save_pair(tmp_path / "small" / "model", max_position_embeddings=2048))
    found = []
    for number, run in enumerate(("one", "two")):
        offline["cache"] = run
        random.seed(number)
        found += run_tasks(model, Settings(("paper:gpqa",), (Depth(1),), limit=12), tmp_path / run)
        assert random.random() == random.Random(number).random()  # nobody else's draws are touched
    assert found[0].recipe.prompts == found[1].recipe.prompts
    letters = set()
    for n, item in enumerate(found[0].items):  # what is asked and what is checked are of one shuffle
        letter = item.reference[1]
        letters.add(letter)
        assert f"What is {n} + 1?" in item.question and f"({letter}) {n + 1}\n" in item.question
    assert len(letters) > 1

"""The benchmarks that a judge reads, on files of the hub's configurations and columns, and what is said of others."""

import pytest
from chat_server import chat_server
from datasets import Features, Image, List, Value
from hub_files import answering, run

from looplm.evaluation import judges, tasks
from looplm.evaluation.hub import hub_items
from looplm.evaluation.items import Question
from looplm.evaluation.paper import benchmarks
from looplm.evaluation.showing import paper_table
from looplm.evaluation.tasks import load_tasks

TEXT, TEXTS = Value("string"), List(Value("string"))
BROKEN = {"bytes": b"no picture", "path": None}
"""What an image column may hold that nobody must open."""

OLYMPIAD = {
    **{"id": Value("int64"), "question": TEXT, "solution": TEXTS, "final_answer": TEXTS, "context": TEXT},
    **{f"image_{n}": Image() for n in range(1, 10)},
    **{"modality": TEXT, "difficulty": TEXT, "is_multiple_answer": Value("bool"), "unit": TEXT, "answer_type": TEXT},
    **{"error": TEXT, "question_type": TEXT, "subfield": TEXT, "subject": TEXT, "language": TEXT},
}
HLE = dict.fromkeys(("id", "question", "image", "answer", "answer_type", "author_name", "rationale"), TEXT)
HLE |= {"image_preview": Image(), "rationale_image": Image()}
HLE |= dict.fromkeys(("raw_subject", "category", "canary"), TEXT)
SUPER_GPQA = {"uuid": TEXT, "question": TEXT, "options": TEXTS, "answer": TEXT, "answer_letter": TEXT}
SUPER_GPQA |= dict.fromkeys(("discipline", "field", "subfield", "difficulty"), TEXT) | {"is_calculation": Value("bool")}
BEYOND_AIME = {"problem": TEXT, "answer": Value("int64")}


def filled(features: dict, **values) -> dict:
    """A row with the values that matter; pictures hold bytes that are none."""
    rest = {name: BROKEN if isinstance(kind, Image) else None for name, kind in features.items()}
    return {**rest, **values}


def olympiad(n: int) -> dict:
    return filled(OLYMPIAD, question=f"Find number {n}.", final_answer=[f"${n}$", f"${n}/2$"][: 1 + n % 2], unit="cm")


def hle(n: int) -> dict:
    picture = "data:image/jpeg;base64,AAAA" if n == 1 else ""
    return filled(HLE, question=f"Find number {n}.", image=picture, answer=str(n), category="Math")


def super_gpqa(n: int) -> dict:
    """Two of its options are the same, which is why the letter counts."""
    options = [f"it is {n}", "it is -1", "it is -1", *(f"it is {k}" for k in range(10, 17))][: 10 - n % 2]
    letter = "ABC"[n % 3]
    answer = options["ABC".index(letter)]
    return filled(
        SUPER_GPQA,
        question=f"Find number {n}.\n",
        options=options,
        answer=answer,
        answer_letter=letter,
        discipline="Law",
    )


def beyond_aime(n: int) -> dict:
    return {"problem": f"Find number {n}.", "answer": n}


SETS = {
    "olympiad": ("OE_TO_maths_en_COMP", "train", OLYMPIAD, olympiad),
    "beyond_aime": ("default", "test", BEYOND_AIME, beyond_aime),
    "hle": ("default", "test", HLE, hle),
    "super_gpqa": ("default", "train", SUPER_GPQA, super_gpqa),
}


@pytest.fixture
def judged_sets(hub):
    """Four rows of each, and for OlympiadBench another of its configurations."""
    for name, (config, split, features, row) in SETS.items():
        hub.put(benchmarks()[name].data, {config: {split: [row(n) for n in range(4)]}}, Features(features))
    hub.put("Hothan/OlympiadBench", {"OE_MM_physics_zh_CEE": {"train": [{"question": "other"}]}})
    return hub


def questions(name: str) -> list[Question]:
    items = hub_items(benchmarks()[name])
    assert all(isinstance(item, Question) for item in items)
    return items


def test_questions_and_answers_are_read_from_their_columns(judged_sets):
    assert [(q.prompt, q.answers) for q in questions("olympiad")][:2] == [
        ("Find number 0.", ("$0$",)),
        ("Find number 1.", ("$1$", "$1/2$")),
    ]
    assert judged_sets.asked == [("Hothan/OlympiadBench", "OE_TO_maths_en_COMP")]
    assert [(q.prompt, q.answers) for q in questions("beyond_aime")][3] == ("Find number 3.", ("3",))


def test_questions_with_a_picture_are_left_out_and_no_picture_is_opened(judged_sets):
    assert [(q.prompt, q.answers, q.category) for q in questions("hle")] == [
        (f"Find number {n}.", (str(n),), "Math") for n in (0, 2, 3)
    ]


def test_options_stand_behind_the_question_and_the_letter_says_which_is_right(judged_sets):
    found = questions("super_gpqa")
    assert found[0].prompt.startswith("Find number 0.\nA) it is 0\nB) it is -1\nC) it is -1\nD) it is 10\n")
    assert found[0].prompt.endswith("\nJ) it is 16") and found[1].prompt.endswith("\nI) it is 15")
    assert [q.answers for q in found] == [("A) it is 0",), ("B) it is -1",), ("C) it is -1",), ("A) it is 3",)]
    assert {q.category for q in found} == {"Law"}


def test_a_letter_that_is_none_of_the_options(hub):
    hub.put("m-a-p/SuperGPQA", {"default": {"train": [super_gpqa(0), {**super_gpqa(1), "answer_letter": "J"}]}})
    with pytest.raises(
        ValueError, match="m-a-p/SuperGPQA row 2: 'answer' is 'J'; it must be a letter of its 9 choices"
    ):
        hub_items(benchmarks()["super_gpqa"])


def test_data_of_another_shape_or_not_here(hub):
    hub.put("ByteDance-Seed/BeyondAIME", {"default": {"test": [{"question": "q"}]}})
    with pytest.raises(ValueError, match="has no column 'problem'; it has question"):
        load_tasks(["paper:beyond_aime"])
    with pytest.raises(
        ValueError, match=r"the data of hle is not on this machine .*hf download --repo-type dataset cais/hle"
    ):
        load_tasks(["paper:hle"])


@pytest.mark.parametrize("name", SETS)
def test_they_are_sampled_as_in_table_17(judged_sets, name):
    (loaded,) = load_tasks([f"paper:{name}"])
    settings = loaded.task.config.generation_kwargs
    assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 1.0, 0.7)
    assert settings["until"] == [] and settings["max_gen_toks"] == 32768
    assert loaded.task.OUTPUT_TYPE == "generate_until" and loaded.task.get_config("num_fewshot") == 0


def by_reference(messages):
    """Correct where the last line of the answer is one of the right answers."""
    material = messages[1]["content"]
    right = material.partition("<right>\n")[2].partition("\n</right>")[0].split(" | ")
    last = material.partition("<answer>\n")[2].partition("\n</answer>")[0].splitlines()[-1]
    return f"verdict: {'correct' if last in right else 'wrong'}"


ANSWERS = {  # of the first three questions that are asked: right, wrong, right
    "olympiad": ["$0$", "$7$", "$2$"],
    "beyond_aime": ["0", "7", "2"],
    "hle": ["0", "7", "3"],
    "super_gpqa": ["A) it is 0", "C) it is -1", "C) it is -1"],
}


def test_a_judge_reads_the_answers_to_all_of_them(judged_sets, tmp_path, monkeypatch):
    """Thoughts of several lines before an answer, which no exact match would find."""
    monkeypatch.setattr(judges, "PAUSES", ())
    monkeypatch.setitem(tasks._THINKING, "max_gen_toks", 64)
    names = tuple(f"paper:{name}" for name in SETS)
    answers = iter([answer for name in SETS for answer in ANSWERS[name]])
    answering(monkeypatch, lambda prompt: f"<think>hm\n\nwait</think>\n{next(answers)}")
    with chat_server(by_reference) as server:
        results = run(names, tmp_path, limit=3, judge=server.url)
    for name, result in zip(SETS, results, strict=True):
        assert (result.recipe.task, result.main_metric, result.judge["waiting"]) == (name, "judged", 0)
        assert [item.scores["judged"] for item in result.items] == [1.0, 0.0, 1.0], name
        assert [item.scores["exact_match,none"] for item in result.items] == [0.0] * 3
        assert result.recipe.num_fewshot == 0 and not paper_table([result]).notes
    rows = {row[:2]: row[3] for row in paper_table(results).rows if row[4].startswith("here")}
    assert rows["super_gpqa", "small"] == "66.67"

"""Items from JSON lines and BIG-bench tasks, and errors that name the line."""

import json

import pytest
from eval_models import choice_records, question_records, write_lines

from looplm.evaluation.items import Item, Question, items_of, load_choices, load_items


def test_multiple_choice(tmp_path):
    items = load_items(write_lines(tmp_path / "x.jsonl", choice_records(3)))
    assert items[0] == Item("q0", "In the year 1700 the union shall make", ("union", "states"), 0, "even")
    assert items[0].continuations() == [" union", " states"]


def test_an_answer_may_be_the_text_of_a_choice_and_names_are_forgiving(tmp_path):
    record = {"prompt": "a ", "choices": ["x", "y"], "answer": "y", "subject": "s"}
    path = write_lines(tmp_path / "x.jsonl", [record])
    path.write_text("\n" + path.read_text())
    assert load_choices(path) == [Item("2", "a", ("x", "y"), 1, "s")]


def test_free_answers(tmp_path):
    records = [*question_records(1), {"question": "q", "answer": ["1", "one"]}, {"question": "q", "answer": 7}]
    items = load_items(write_lines(tmp_path / "x.jsonl", records))
    assert [item.answers for item in items] == [("law",), ("1", "one"), ("7",)]
    with pytest.raises(ValueError, match="has free answers; this needs multiple choice"):
        load_choices(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "x.jsonl line 2 is not JSON"),
        ("[1]", "x.jsonl line 2 is no JSON object"),
        ('{"answer": "x"}', "line 2 has no text 'question'"),
        ('{"question": "q", "choices": ["x"], "answer": 0}', "line 2: 'choices' is .'x'.; it must be a list of two"),
        ('{"question": "q", "choices": ["x", "y"], "answer": 2}', r"line 2: 'answer' is 2; .* or 0\.\.1"),
        ('{"question": "q", "choices": ["x", "y"], "answer": true}', "line 2: 'answer' is True"),
        ('{"question": "q", "choices": ["x", "x"], "answer": "x"}', "line 2: 'answer' is 'x'"),
        ('{"question": "q", "choices": ["x", "y"]}', "line 2: 'answer' is missing"),
        ('{"question": "q"}', "line 2: 'answer' is missing; it must be a text"),
        ('{"question": "q", "answer": []}', r"line 2: 'answer' is \[\]"),
        ('{"question": "q", "answer": "a"}', "mixes two kinds of items .1 of multiple choice, 1 of free answers."),
    ],
)
def test_a_line_that_is_wrong(tmp_path, line, said):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "q", "choices": ["x", "y"], "answer": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        load_items(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no items"):
        load_items(tmp_path / "empty.jsonl")


TASK = {
    "name": "sums",
    "examples": [
        {"input": "1 + 1 =", "target_scores": {"3": 0, "2": 1}},
        {"input": "2 + 2 =", "target_scores": {"4": 1, "5": 0, "6": 0}},
    ],
}


def write_task(folder, **changes):
    path = folder / "task.json"
    path.write_text(json.dumps({**TASK, **changes}))
    return path


def test_a_bigbench_task_is_laid_out_as_there(tmp_path):
    items = load_items(write_task(tmp_path))
    assert items[0] == Item("sums-1", "Q: 1 + 1 =\n  choice: 3\n  choice: 2\nA:", ("3", "2"), 1)
    assert items[1].answer == 0 and len(items[1].choices) == 3
    plain = load_items(
        write_task(tmp_path, append_choices_to_input=False, task_prefix="Add.", example_input_prefix=" ")
    )
    assert plain[0].prompt == "Add. 1 + 1 =\nA:"


def test_a_bigbench_task_of_free_answers(tmp_path):
    examples = [{"input": "a", "target": ["x", "y"]}, {"input": "b", "target": "z"}]
    assert load_items(write_task(tmp_path, examples=examples))[1] == Question("sums-2", "Q: b\nA:", ("z",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"examples": []}, "it has no list 'examples'"),
        ({"examples": [{"target": "x"}]}, "example 1 has no text 'input'"),
        ({"examples": [{"input": "x", "target_scores": {"a": 1, "b": 1}}]}, "one of them the best"),
        ({"examples": [{"input": "x", "target_scores": {"a": 1}}]}, "needs two choices or more"),
        ({"examples": [{"input": "x"}]}, "'target' is missing"),
    ],
)
def test_a_bigbench_task_that_is_wrong(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        load_items(write_task(tmp_path, **changes))


def test_rows_of_a_data_set():
    assert items_of([{"question": "q", "answer": "a"}], "set") == [Question("1", "q", ("a",))]
    with pytest.raises(ValueError, match="set row 1 has no text 'question'"):
        items_of([{"answer": "a"}], "set")

"""Environments: real families, files of real shapes, the lab's tasks; sides that never meet and never move."""

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.data.chat import ASSISTANT
from looplm.data.settings import SourceSettings
from looplm.data.sources import open_source
from looplm.data.splitting import split_source
from looplm.lab.tasks import TASKS, make_task
from looplm.tuning.environments import Environment, open_environment
from looplm.tuning.problems import EnvironmentSettings, Problem, RewardSettings
from looplm.tuning.rewards import Rewards

DOCS = (Path(__file__).parents[2] / "docs" / "rl-environments.md").read_text(encoding="utf-8")
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {a} + {b}?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def environment(**values: Any) -> Environment:
    return open_environment(EnvironmentSettings.validated(values, "environment"))


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} + {n}?", "answer": 2 * n} for n in range(count)]


def dapo_rows(different: int, copies: int) -> list[dict[str, Any]]:
    """Rows of the shape of DAPO-Math-17k, which has every problem about a hundred times."""
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO.format(a=n, b=n + 1), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * n + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{copy}-{n}"},
        }
        for copy in range(copies)
        for n in range(different)
    ]


def shown(problems: Sequence[Problem]) -> set[str]:
    return {json.dumps(problem.prompt) for problem in problems}


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting", "spell_backward", "countdown", "number_sorting"])
def test_a_family_scores_its_own_answers(family: str) -> None:
    found = environment(reasoning_gym=family, size=60, held_out_every=3)
    assert found.name == family and found.isolated and found.counts["read"] == 60
    assert not shown(found.train) & shown(found.test)
    for problem in [*found.train[:5], *found.test[:5]]:
        assert problem.prompt == [{"role": "user", "content": problem.entry["question"]}]
        assert found.score(problem, problem.answer, []) == 1.0
        assert found.score(problem, f"Let me see. <answer>{problem.answer}</answer>", []) == 1.0
        assert found.score(problem, "", []) < 0.1


def test_the_same_settings_make_the_same_problems() -> None:
    values: dict[str, Any] = {"reasoning_gym": "chain_sum", "options": {"max_terms": 2, "max_digits": 1}, "size": 80}
    one, again, other = environment(**values), environment(**values), environment(**values, seed=1000)
    assert (one.train, one.test) == (again.train, again.test)
    assert one.train != other.train
    # the sides of text do not depend on the seed, so a problem that is held out once is never trained on
    assert not shown(one.train) & shown(other.test) and not shown(one.test) & shown(other.train)
    # a digit plus a digit repeats itself
    assert one.counts["left out: repeated"] == 80 - len(one.train) - len(one.test) > 0


def test_words_around_a_question() -> None:
    around = environment(reasoning_gym="chain_sum", size=80, system="Be brief.", suffix="Answer with a number.")
    plain = environment(reasoning_gym="chain_sum", size=80, raw=True, suffix="Answer:")
    question = around.train[0].entry["question"]
    assert around.train[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{question}\nAnswer with a number."},
    ]
    assert plain.train[0].prompt == f"{question}\nAnswer:"
    assert [p.answer for p in around.test] == [p.answer for p in plain.test]  # they do not change the side


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"reasoning_gym": "chain_sums"}, "no usable family 'chain_sums'; did you mean 'chain_sum'?"),
        ({"reasoning_gym": "rush_hour"}, "no usable family 'rush_hour'"),
        ({"reasoning_gym": "chain_sum", "options": {"max_trms": 3}}, "no option 'max_trms'; did you mean 'max_terms'?"),
        ({"reasoning_gym": "chain_sum", "options": {"size": 3}}, "chain_sum has no option 'size'"),
        ({"reasoning_gym": "chain_sum", "options": {"min_terms": 9, "max_terms": 2}}, "refuses its options"),
        ({"reasoning_gym": "chain_sum", "options": {"max_terms": "two"}}, "chain_sum"),
        ({"reasoning_gym": "chain_sum", "size": 1}, "1 different problems, none of them for"),
        ({"lab": "manos"}, "no such task: manos; did you mean 'mano'?"),
        ({"lab": "mano", "options": {"modulos": 5}}, "mano: unknown key 'modulos'; did you mean 'modulus'?"),
        ({"lab": "addition", "size": 5}, "5 different problems, none of them for test"),
        ({"source": {"location": "nowhere.jsonl"}}, "no such file or folder: nowhere.jsonl"),
        ({"source": {"location": "sotu"}}, "is plain text; records with fields are needed"),
    ],
)
def test_environments_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        environment(**values)
    assert "\n" not in str(caught.value)


def test_without_reasoning_gym_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else find(name))
    with pytest.raises(ValueError, match="reasoning-gym is not installed: pip install"):
        environment(reasoning_gym="chain_sum")


def test_families_that_depend_on_the_order_of_sets_need_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(
        ValueError, match=r"word_ladder asks other questions in every process; start with PYTHONHASHSEED=0"
    ):
        environment(reasoning_gym="word_ladder", size=20)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert environment(reasoning_gym="word_ladder", size=20, held_out_every=2).train


def test_a_family_that_does_not_verify_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looplm.data.gym._UNFIT", ())
    with pytest.raises(ValueError, match=r"graph_color: its own answer None to problem 0 does not score 1"):
        environment(reasoning_gym="graph_color", size=20)


def test_a_file_of_prompts_and_answers(tmp_path: Path) -> None:
    found = environment(
        source={"location": lines(tmp_path / "sums.jsonl", sums(60)), "answer_field": "answer"}, held_out_every=4
    )
    assert found.name == "sums" and not found.isolated and len(found.train) + len(found.test) == 60
    problem = found.train[0]
    assert problem.answer == str(problem.entry["answer"])
    assert found.score(problem, f"It is {problem.answer}.", []) == 1.0
    assert found.score(problem, "It is 1.", []) == 0.0


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_rows_of_the_shape_of_dapo(kind: str, tmp_path: Path) -> None:
    rows = dapo_rows(different=40, copies=5)
    if kind == "jsonl":
        location = lines(tmp_path / "dapo.jsonl", rows)
    else:
        (tmp_path / "data").mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "train.parquet")
        location = f"hub:{tmp_path}" if kind == "hub" else str(tmp_path)
    (recipe,) = [block for block in yaml_blocks() if "DAPO" in json.dumps(block)]
    values = recipe["environment"]
    found = environment(**{**values, "source": {**values["source"], "location": location}})
    assert found.counts == {"read": 200, "left out: repeated": 160}
    assert len(found.train) + len(found.test) == 40
    for problem in found.train:
        assert isinstance(problem.prompt, list)
        assert found.score(problem, f"2 and 2 is 4.\nAnswer: {problem.answer}", []) == 1.0
        assert found.score(problem, f"Answer: {int(problem.answer) + 1}", []) == 0.0


def test_a_prompt_with_two_answers_is_left_out(tmp_path: Path) -> None:
    rows = [*sums(30), {"prompt": "What is 3 + 3?", "answer": 7}]
    found = environment(
        source={"location": lines(tmp_path / "a.jsonl", rows), "answer_field": "answer"}, held_out_every=3
    )
    assert found.counts["left out: several answers to one prompt"] == 1
    assert len(found.train) + len(found.test) == 29
    assert not any("is 3 + 3?" in prompt for prompt in shown([*found.train, *found.test]))


def test_a_conversation_that_sft_holds_out_is_held_out_here() -> None:
    held_out = {False: set[str](), True: set[str]()}
    source = open_source("sums", SourceSettings(location="arithmetic", messages_field="messages"))
    for conversation, side in split_source(source, 7):
        assert not isinstance(conversation, str) and conversation[-1]["role"] == ASSISTANT
        held_out[side].add(json.dumps(conversation[:-1]))
    found = environment(source={"location": "arithmetic", "prompt_field": "messages"}, held_out_every=7)
    assert shown(found.test) <= held_out[True]
    assert shown(found.train) <= held_out[False] and not shown(found.train) & held_out[True]
    assert len(found.test) > 20 and found.test[0].answer == found.test[0].entry["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        (
            {"question": "a", "solution": {"text": "b"}},
            {},
            "no field 'prompt'; fields are question, solution, solution.text",
        ),
        ({"prompt": "a", "b": 1}, {"answer_field": "answer"}, "no field 'answer'; fields are b, prompt"),
        ({"prompt": "a", "answer": "5"}, {"answer_field": "answer.text"}, "no field 'answer.text'"),
        ({"prompt": "a", "answer": "5"}, {}, "name its field as answer_field: fields are answer, prompt"),
        ({"prompt": "a", "answer": None}, {"answer_field": "answer"}, "None is no answer"),
        ({"prompt": "a", "answer": " "}, {"answer_field": "answer"}, "' ' is no answer"),
        ({"prompt": 5, "answer": "5"}, {"answer_field": "answer"}, "a int instead of text"),
        ({"prompt": " ", "answer": "5"}, {"answer_field": "answer"}, "the prompt is empty"),
        ({"prompt": [], "answer": "5"}, {"answer_field": "answer"}, "the prompt is empty"),
        ({"prompt": [{"role": "me", "content": "a"}], "answer": "5"}, {"answer_field": "answer"}, "role is 'me'"),
    ],
)
def test_records_that_cannot_be_asked(row: dict[str, Any], fields: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        environment(source={"location": lines(tmp_path / "a.jsonl", [row]), **fields})
    assert "a.jsonl, line 1" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "said"), [({"system": "Be brief."}, "a system message of its own"), ({"raw": True}, "raw is for text")]
)
def test_conversations_that_do_not_fit_the_settings(extra: dict[str, Any], said: str, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"}]
    location = lines(tmp_path / "a.jsonl", [{"prompt": chat, "answer": "2"}])
    with pytest.raises(ValueError, match=said):
        environment(source={"location": location, "answer_field": "answer"}, **extra)


questions = st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40)
@given(questions, st.randoms(use_true_random=False), st.integers(2, 5))
def test_sides_are_disjoint_and_do_not_move(drawn: list[tuple[int, bool]], chance: Any, every: int) -> None:
    asked = {n: f"What is {n} + 0?" for n, _ in drawn}
    rows = [{"prompt": asked[n] if text else [{"role": "user", "content": asked[n]}], "answer": n} for n, text in drawn]
    rows += sums(30)
    with TemporaryDirectory() as folder:
        source = {"location": str(Path(folder) / "a.jsonl"), "answer_field": "answer"}
        lines(Path(folder) / "a.jsonl", rows)
        one = environment(source=source, held_out_every=every)
        chance.shuffle(rows)
        lines(Path(folder) / "a.jsonl", [*rows, {"prompt": "What is left?", "answer": "nothing"}])
        other = environment(source=source, held_out_every=every)
    assert not shown(one.train) & shown(one.test)
    assert len(shown(one.train)) == len(one.train) and len(shown(one.test)) == len(one.test)
    assert shown(one.train) <= shown(other.train) and shown(one.test) <= shown(other.test)


@pytest.mark.parametrize("name", list(TASKS))
def test_the_labs_tasks_as_tokens(name: str) -> None:
    found, task = environment(lab=name, size=300, held_out_every=5), make_task(name)
    assert found.name == f"lab-{name}" and not found.isolated
    assert not shown(found.train) & shown(found.test)
    batch = task.batch(0, 0, 240, "train")
    rows = {
        json.dumps(batch["tokens"][row][: int(np.argmax(batch["answer"][row])) + 1].tolist()): row for row in range(240)
    }
    for problem in found.train[:40]:
        row, wanted = rows[json.dumps(problem.prompt)], problem.answer_tokens
        assert isinstance(problem.prompt, list) and wanted
        # written behind the prompt, the answer is what the lab itself scores as right
        predicted = np.zeros((1, task.length), np.int64)
        first = len(problem.prompt) - 1
        predicted[0, first : first + len(wanted)] = wanted
        one = {key: np.asarray(value)[row : row + 1] for key, value in batch.items()}
        assert task.score(predicted, one).all()  # type: ignore[arg-type]
        assert problem.answer == task.text(np.array(wanted))
        assert found.score(problem, "", wanted) == 1.0
        assert found.score(problem, "", [*wanted, 0]) == 1.0
        assert found.score(problem, "", wanted[:-1]) == 0.0
        assert found.score(problem, "", [wanted[0] + 1, *wanted[1:]]) == 0.0


def yaml_blocks() -> list[dict[str, Any]]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)]


def test_the_examples_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "sums.jsonl", sums(60))
    written = re.findall(r"```yaml\n((?:(?!```).)*)```\s*```json\n(.*?)```", DOCS, flags=re.DOTALL)
    assert len(written) >= 3
    for recipe, first in written:
        found = environment(**yaml.safe_load(recipe)["environment"])
        assert {"prompt": found.train[0].prompt, "answer": found.train[0].answer} == json.loads(first)


def test_the_rewards_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    (recipe,) = [block for block in yaml_blocks() if len(block.get("rewards", ())) > 1]
    rewards = [RewardSettings.validated(values, "rewards") for values in recipe["rewards"]]
    (path,) = [Path(reward.python.rpartition(":")[0]) for reward in rewards if reward.python]
    path.write_text(code, encoding="utf-8")
    lines(tmp_path / "sums.jsonl", sums(60))
    found = environment(source={"location": "sums.jsonl", "answer_field": "answer"})
    problem = found.train[0]
    with Rewards(rewards, found) as scored:
        said = [f"<answer>{problem.answer}</answer>", f"It is {problem.answer}", "so " * 200]
        scores = scored([problem] * 3, said, [[]] * 3)
    assert scores.parts["math-verify"] == [1.0, 1.0, 0.0] and scores.parts["format"] == [1.0, 0.0, 0.0]
    assert not scores.faults and scores.totals[0] > scores.totals[1] > scores.totals[2]

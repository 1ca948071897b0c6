"""The two examples that feed the faithfulness study: their questions have the answers they say, their files load."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import looplm
from looplm.evaluation.answers import encode, load_questions
from looplm.lab import training
from looplm.lab.tasks.p_hop import find
from looplm.model.loading import load_model

FOLDER = Path(looplm.__file__).parent.parent / "examples"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    def example(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return example


def test_p_hop_questions_have_their_answers_and_the_model_reads_them(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "compile_layers", lambda model, setting: None)
    example, folder = load("p_hop_model"), tmp_path / "p-hop"
    example.main(example.Options(folder, steps=2, items=40))
    assert "loop 4: 1 hops" in capsys.readouterr().out
    model, tokenizer = load_model(str(folder / "model"))
    assert model.config.total_ut_steps == 4 and model.config.num_hidden_layers == 1
    records = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    for record in records:
        lead, *symbols = record["prompt"].split()
        row = np.array([["abcd".index(symbol) for symbol in symbols]])
        place = find(row, 4, np.array([int(lead.strip("<>"))]), np.array([len(symbols) - 1]))[0, 0]
        assert symbols[place] == record["answer"] and int(record["category"][0]) == int(lead.strip("<>"))
    questions = encode(tokenizer, load_questions(folder / "items.jsonl"))
    assert len(questions) == 40 and {len(question.prompt) for question in questions} == {33}
    assert {tokenizer.decode([token]) for question in questions for token in question.choices} == {"a", "b"}
    assert {bool(question.answer) for question in questions} == {False, True}
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        example.main(example.Options(folder))


def test_synthetic_pairs_load_and_repeat_themselves(load, tmp_path):
    example = load("synthetic_pairs")
    for name in ("a.csv", "b.csv"):
        example.main(example.Options(tmp_path / name, count=30))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    items = load_questions(tmp_path / "a.csv")
    assert [item.answer for item in items] == [1, 0] * 15
    assert len({item.prompt for item in items}) > 25

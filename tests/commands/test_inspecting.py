"""`looplm trace` from end to end: table, page and JSON, and one line with nothing written for a bad input."""

import re
from functools import partial
from pathlib import Path

import pytest
from small_run import save_small_pair

from looplm.model.loading import load_model
from looplm.model.trace_page import trace_page
from looplm.model.tracing import Trace, trace

FIELDS = ("next_loss", "entropy", "kl_to_final", "hazard", "exit_probability", "change", "cosine")
TEXT = "the loop goes round, and the gate opens. "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_pair(tmp_path_factory.mktemp("model"), TEXT)


@pytest.fixture
def looplm_trace(looplm_command, monkeypatch):
    """Runs `looplm trace ARGUMENTS`; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "110")
    return partial(looplm_command, "trace")


def test_a_trace_is_shown_and_written(looplm_trace, model, tmp_path):
    page, numbers = tmp_path / "new" / "out.html", tmp_path / "out.json"
    code, out, err = looplm_trace(
        model, "--prompt", TEXT, "--html", page, "--json", numbers, "--top-k", 2, "--exit-threshold", 0.6
    )
    assert (code, err) == (0, "")
    expected = trace(*load_model(str(model)), TEXT, top_k=2)
    assert Trace.load(numbers) == expected
    assert page.read_text(encoding="utf-8") == trace_page(expected, str(model), 0.6)
    depths = expected.exit_depths(0.6)
    assert f"{sum(depths) / len(depths):.2f} loops a token at threshold 0.6" in out
    rows = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [str(loop + 1), f"{depths.count(loop + 1) / len(depths):.0%}"]
        + ["–" if (value := expected.mean(name)[loop]) is None else f"{value:.3f}" for name in FIELDS]
        for loop in range(3)
    ]
    assert out.rstrip().endswith(f"json   {numbers}\npage   {page}")


def test_loops_beyond_training_are_marked(looplm_trace, model):
    code, out, err = looplm_trace(model, "--prompt", TEXT, "--loops", 5)
    assert (code, err) == (0, "") and "* beyond the 3 loops of training" in out
    assert re.findall(r"^│ +(\S+) │", out, re.M) == ["1", "2", "3", "4*", "5*"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the text is empty; give some text to trace"),
        (["--prompt", "x " * 200], "tokens, but the context holds 64; shorten it"),
        (["--prompt", "a\udcff"], "the text is no valid Unicode at character 1; give it as UTF-8"),
        (["--prompt", "a", "--loops", "0"], "--loops is 0; it must be at least 1"),
        (["--prompt", "a", "--top-k", "0"], "--top-k is 0; it must be at least 1"),
        (["--prompt", "a", "--top-k", "9999"], "top_k is 9999; it must lie in 1.."),
        (["--prompt", "a", "--exit-threshold", "0"], "--exit-threshold is 0.0; it must lie in (0, 1]"),
        (["--prompt", "a", "--exit-threshold", "nan"], "--exit-threshold is nan; it must lie in (0, 1]"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(looplm_trace, model, tmp_path, arguments, message):
    code, out, err = looplm_trace(model, "--html", tmp_path / "x.html", "--json", tmp_path / "x.json", *arguments)
    assert (code, out) == (2, "") and err.startswith("looplm: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_paths_are_looked_at_first(looplm_trace, tmp_path):
    _, _, err = looplm_trace("never-looked-at", "--prompt", "a", "--html", tmp_path)
    assert err == f"looplm: --html is {tmp_path}, which is a folder; give the name of a file\n"
    same = tmp_path / "a.json"
    _, _, err = looplm_trace("never-looked-at", "--prompt", "a", "--html", same, "--json", same)
    assert err == f"looplm: --html and --json are both {same}; give them two names\n"


def test_a_folder_without_a_tokenizer(looplm_trace, model, tmp_path):
    load_model(str(model))[0].save_pretrained(tmp_path / "mute")
    code, _, err = looplm_trace(tmp_path / "mute", "--prompt", "a")
    assert code == 2 and "has no tokenizer that can be read" in err

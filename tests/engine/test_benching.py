"""`looplm bench` from end to end: real numbers in the table and the JSON, and one line for every bad input."""

import json
from functools import partial
from pathlib import Path

import pytest
from small_run import save_small_pair

TEXT = "the loop goes round, and the gate opens. "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_pair(tmp_path_factory.mktemp("model"), TEXT)


@pytest.fixture
def looplm_bench(looplm_command, monkeypatch):
    """Runs `looplm bench ARGUMENTS`; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "110")
    return partial(looplm_command, "bench")


SMALL = ("--batches", "1", "3", "--prompt-tokens", "20", "--max-tokens", "8")


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_numbers_and_table(looplm_bench, model: Path, tmp_path: Path, policy: str) -> None:
    text, target = tmp_path / "text.txt", tmp_path / "bench.json"
    text.write_text(TEXT * 40)
    code, out, _ = looplm_bench(
        model, *SMALL, "--exit-threshold", 0.3, "--kv-policy", policy, "--text", text, "--json", target
    )
    assert code == 0 and "Tokens/s" in out and "q 0.3" in out and str(target) in out.replace("\n", "")
    found = json.loads(target.read_text())
    assert [(row["requests"], row["exit_threshold"]) for row in found["rows"]] == [
        (1, None),
        (1, 0.3),
        (3, None),
        (3, 0.3),
    ]
    token = 2 * 2 * 32 * 4  # layers x (keys, values) x width x fp32, of one loop
    for row in found["rows"]:
        assert row["tokens_per_second"] > 0 and row["token_seconds"] > 0 and 0 < row["outside_model"] < 1
        assert row["kv_bytes_per_token"] == token * (3 if policy == "per_loop" else 1)
        assert row["kv_bytes"] == row["requests"] * 32 * token * 3, "the prompt in flight holds every loop"
        if row["exit_threshold"] is None:
            assert row["mean_depth"] == 3 and row["speed_up"] == 1
        else:
            assert 1 <= row["mean_depth"] < 3
    assert found["kv_policy"] == policy and found["parameters"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batches", "0"), "--batches is 0; give numbers of at least 1"),
        (("--exit-threshold", "0"), "--exit-threshold is 0.0; it must lie in (0, 1]"),
        (("--prompt-tokens", "0"), "--prompt-tokens is 0; it must be at least 1"),
        (("--max-tokens", "1"), "--max-tokens is 1; it must be at least 2"),
        (("--text", "nowhere.txt"), "--text is nowhere.txt, which is no file"),
        (("--json", "."), "--json is ., which is a folder; give the name of a file"),
        (("--prompt-tokens", "63", "--max-tokens", "8"), "max_tokens is 2, but the context holds 64"),
    ],
)
def test_refusals(looplm_bench, model: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, error = looplm_bench(model, *arguments)
    assert code == 2 and out == ""
    assert message in error and len([line for line in error.splitlines() if line.startswith("looplm:")]) == 1


def test_a_text_that_is_too_short(looplm_bench, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    code, _, error = looplm_bench(model, *SMALL, "--text", text)
    assert code == 2 and "3 prompts of 20 need 60" in error

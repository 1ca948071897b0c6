"""The studies of depth and `looplm calibrate` from end to end: files, tables, and one line for what cannot be done."""

import json
import random
from pathlib import Path

import pytest
import torch
from small_run import WORDS, small_model

from looplm.data.tokenizers import train_bpe
from looplm.model.calibration import CALIBRATION
from looplm.model.loading import load_model

TEXT = " ".join(random.Random(0).choices(WORDS, k=900))


def save(folder: Path, seed: int = 0, **fields) -> Path:
    tokenizer = train_bpe([TEXT], 300)
    torch.manual_seed(seed)
    model = small_model(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def study(looplm_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return looplm_command


def test_exit_frontier(study, model, text, tmp_path) -> None:
    earlier = tmp_path / "earlier"
    looped, tokenizer = load_model(str(model))
    with torch.no_grad():
        looped.model.early_exit_gate.bias.sub_(1)
    looped.save_pretrained(earlier)
    tokenizer.save_pretrained(earlier)
    questions = [{"question": f"{WORDS[n % 9]} of", "choices": WORDS[:2], "answer": n % 2} for n in range(20)]
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(map(json.dumps, questions)))
    code, out, err = study(
        "study", "exit-frontier", model, "--data", text, "--items", items, "--untrained-gate", earlier, "--settings", 2,
        "--window", 32, "--limit", 20, "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "exit-frontier.json").read_text())
    assert result["recipe"]["model"] == model.parent.name and len(result["recipe"]["fingerprint"]) == 64
    assert {"static depth", "q", "untrained gate"} <= set(result["text"]["curves"]) and result["items"]["items"] == 20
    assert "loss against cost on words.txt" in out and "saves nothing" in out and "accuracy against cost" in out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "exit-frontier-2.svg",
        "exit-frontier-3.svg",
        "exit-frontier-4.svg",
        "exit-frontier.json",
        "exit-frontier.md",
        "exit-frontier.svg",
    ]


def test_exit_frontier_on_items_alone(study, refused, model, tmp_path) -> None:
    questions = [{"question": f"{WORDS[n % 9]} of", "choices": WORDS[:2], "answer": n % 2} for n in range(20)]
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(map(json.dumps, questions)))
    common = ("study", "exit-frontier", model, "--items", items, "--settings", 1, "--rules", "q")
    code, out, err = study(*common, "--output", tmp_path / "out")
    assert code == 0 and "accuracy against cost" in out and "loss against cost" not in out, err
    result = json.loads((tmp_path / "out" / "exit-frontier.json").read_text())
    assert "text" not in result and result["recipe"]["settings"]["items"] == "items.jsonl"
    assert study("eval", "report", tmp_path / "out")[0] == 0
    assert refused(*common, "--limit", 19, "--output", tmp_path / "no").startswith("19 items; an interval needs 20")
    assert not (tmp_path / "no").exists()


def test_kv_sharing_and_perplexity_and_their_page(study, model, text, tmp_path) -> None:
    code, out, err = study(
        "study", "kv-sharing", model, "--data", text, "--prompt-tokens", 8, "--new-tokens", 16, "--limit", 4,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "last step only" in out and "3.00x" in out, err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.svg")) == ["kv-sharing-2.svg", "kv-sharing.svg"]
    code, out, err = study(
        "study", "perplexity", model, "--text", text, "--loops", "1..4", "--output", tmp_path / "out"
    )
    assert code == 0 and "4*" in out and "bits a byte" in out, err
    code, out, err = study("eval", "report", tmp_path / "out")
    assert (code, out) == (0, f"page {tmp_path / 'out' / 'report.html'}\n"), err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sharing keys and values" in page and "Loss by loop" in page


def test_calibrate_writes_where_budgets_look(study, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("looplm.evaluation.costs.TURNS", 2)
    monkeypatch.setattr("looplm.evaluation.calibration.FREE_TOKENS", 8)
    folder = save(tmp_path / "model")
    code, out, err = study(
        "calibrate", folder, "--target", "mean-loops=2.2", "--data", text, "--window", 16, "--limit", 60,
        "--rules", "q,difference", "--settings", 4, "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "calibrated for mean-loops=2.2" in out and "depth_budget" in out, err
    kept = json.loads((folder / CALIBRATION).read_text())
    assert set(kept["rules"]) == {"q", "difference"} and kept["window"] == 16
    assert json.loads((tmp_path / "out" / "calibrate.json").read_text())["rules"] == kept["rules"]
    budget = ("generate", folder, "--prompt", "the union", "--depth-budget", "2.2", "--max-new-tokens", 3)
    assert study(*budget)[0] == 0
    looped, _ = load_model(str(folder))
    with torch.no_grad():
        looped.model.early_exit_gate.bias.add_(1)
    looped.save_pretrained(folder)
    code, _, err = study(*budget)
    assert code == 2 and "calibrate again" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("study", "kv-sharing", "MODEL", "--new-tokens", 1), "new tokens are 1; give at least 16"),
        (("study", "exit-frontier", "MODEL", "--rules", "q,dance"), "rule 'dance' is not known"),
        (("study", "exit-frontier", "MODEL", "--settings", 0), "--settings is 0"),
        (("study", "exit-frontier", "nowhere"), "no such model: nowhere"),
        (("study", "perplexity", "MODEL", "--loops", "0..3"), "loops are counted from 1"),
        (("study", "perplexity", "MODEL", "--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("calibrate", "MODEL", "--target", "mean-loops=9"), "give mean-loops=D with D between 1 and 3"),
        (("calibrate", "OWNER/NAME", "--target", "mean-loops=2"), "is no folder here; calibration is kept beside"),
        (("calibrate", "MODEL", "--target", "mean-loops=2", "--window", 65), "window is 65; it must lie in 2..64"),
        (("eval", "report", "nowhere"), "nowhere is no folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(refused, model, arguments, message) -> None:
    line = refused(*(model if part == "MODEL" else part for part in arguments))
    assert message in line
    assert not (model / CALIBRATION).exists()


def test_a_model_without_a_gate_has_no_gate_exits(refused, tmp_path) -> None:
    pooled = save(tmp_path / "pooled", exit_gate_pooling="causal_mean")
    line = refused("study", "exit-frontier", pooled, "--rules", "q")
    assert "no gate for each token" in line and "leave q out" in line

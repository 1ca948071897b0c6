"""`looplm retrofit` from end to end: the folder, the tables, and one line with nothing written for a bad input."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from small_gguf import small_llama, write_gguf
from transformers import GPT2Config

from looplm.data.tokenizers import train_bpe
from looplm.model.loading import load_model

TEXT = "the loop goes round the 12 loops, and the gate opens at loop 3, or never. " * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GGUF file, a folder with a model and one without a tokenizer, and a text."""
    write_gguf(tmp_path / "small.gguf", small_llama())
    small_llama(seed=2, vocab_size=259).save_pretrained(tmp_path / "dense")
    train_bpe([TEXT], 259).save_pretrained(tmp_path / "dense")
    small_llama().save_pretrained(tmp_path / "mute")
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def retrofit(looplm_command, monkeypatch, folder):
    """Runs `looplm retrofit ARGUMENTS` in the folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    return partial(looplm_command, "retrofit")


@torch.no_grad()
def test_a_core_by_hand(retrofit, folder) -> None:
    code, out, _ = retrofit("small.gguf", "--output", "out", "--core", "1:3", "--loops", 2, "--text", "text.txt")
    assert code == 0 and out.endswith("model   out\n")
    parts = re.findall(r"│ +(\d) │ (prelude|core|coda) ", out)
    assert parts == [("0", "prelude"), ("1", "core"), ("2", "core"), ("3", "coda")]
    looped, tokenizer = load_model("out")
    config = looped.config
    assert (config.num_prelude_layers, config.num_hidden_layers, config.num_coda_layers) == (1, 2, 1)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:60]])
    torch.testing.assert_close(looped(ids, num_loop_steps=1).logits, small_llama()(ids).logits, rtol=1e-5, atol=1e-5)
    record = json.loads((folder / "out" / "retrofit.json").read_text())
    assert (record["core"], record["loops"], record["source"]) == ([1, 3], 2, "small.gguf")
    assert (
        "Retrofitted from small.gguf: of its 4 layers those from 1 to 2" in (folder / "out" / "README.md").read_text()
    )
    assert [f"{loss:.4f}" in out for loss in record["losses_before_training"]] == [True, True]
    assert sorted(path.name for path in folder.iterdir()) == ["dense", "gpt2", "mute", "out", "small.gguf", "text.txt"]


@torch.no_grad()
def test_a_chosen_core_and_the_shipped_text(retrofit, folder) -> None:
    assert retrofit("dense", "--output", "new/out", "--choose", 2)[0] == 0
    record = json.loads((folder / "new" / "out" / "retrofit.json").read_text())
    influence, (first, end) = record["block_influence"], record["core"]
    sums = [sum(influence[start : start + 2]) for start in range(3)]
    assert end - first == 2 and sums[first] == min(sums) and record["measured_on"] == "the text that ships with looplm"
    assert len(record["losses_before_training"]) == load_model("new/out")[0].config.total_ut_steps == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("dense --output out", "give exactly one of --core FIRST:END and --choose LAYERS"),
        ("dense --output out --core 1:2 --choose 1", "give exactly one of --core FIRST:END and --choose LAYERS"),
        ("dense --output out --core 1-2", "--core is '1-2'; it must have the form FIRST:END, such as 10:20"),
        ("dense --output out --core 2:5", "core 2:5 does not lie in the model's layers 0:4 (counted from 0"),
        ("dense --output out --core 3:3", "core 3:3 does not lie in the model's layers 0:4"),
        ("dense --output out --choose 5", "a core of 5 layers cannot be chosen of 4; give 1 to 4"),
        ("dense --output out --choose 0", "--choose is 0; it must be at least 1"),
        ("dense --output out --core 1:2 --loops 0", "--loops is 0; it must be at least 1"),
        ("dense --output gpt2 --core 1:2", "gpt2 exists and is not an empty folder; give a new one"),
        ("dense --output out --core 1:2 --text none.txt", "the text none.txt cannot be read"),
        ("gpt2 --output out --core 1:2", "gpt2: a 'gpt2' model cannot be retrofitted; supported are Llama"),
        ("mute --output out --core 1:2", "mute: no tokenizer at mute"),
        ("text.txt --output out --core 1:2", "text.txt is not a whole GGUF file"),
        ("nowhere --output out --core 1:2", "no such model: nowhere; give a folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(retrofit, folder, arguments, line) -> None:
    before = sorted(folder.rglob("*"))
    code, _, err = retrofit(*arguments.split())
    assert code == 2 and err.startswith(f"looplm: {line}") and err.count("\n") == 1, err
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_cannot_be_made(retrofit, folder) -> None:
    code, _, err = retrofit("dense", "--output", "text.txt/out", "--core", "1:2")
    assert code == 2 and err.splitlines()[-1].startswith("looplm: [Errno ") and "Traceback" not in err
    assert (folder / "text.txt").read_text() == TEXT

"""The example as printed, in a folder with a small model where the demo leaves its own."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from small_run import small_model

import looplm
from looplm.data.tokenizers import train_bpe
from looplm.model.loading import load_model

ROOT = Path(looplm.__file__).parent.parent


def test_eight_prompts_get_what_generate_gives_them(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo" / "model"
    source = (ROOT / "examples" / "engine.py").read_text(encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = train_bpe([source], 300)
    model = small_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    with torch.no_grad():
        for weight in model.parameters():  # large enough that gates differ
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
        model.model.early_exit_gate.bias.fill_(-0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "engine.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_model(str(folder))
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and len({len(line.split(" | ")[0]) for line in lines}) == 8, "of different length"
    seen = set()
    for line in lines:
        prompt, text, mean, depths = re.fullmatch(r"(.*?) \| (.*): (\d\.\d\d) loops a token, (\[.*\])", line).groups()
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = model.generate(
            ids, exit_threshold=0.5, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
        )
        found = [int(depth) for depth in depths[1:-1].split(",")]
        assert found == expected.exit_depths[0, : len(found)].tolist() and 0 < len(found) <= 12
        new = expected.sequences[0, ids.shape[1] :]
        assert ast.literal_eval(text) == tokenizer.decode(new, skip_special_tokens=True)
        assert mean == f"{sum(found) / len(found):.2f}"
        seen |= set(found)
    assert len(seen) > 1, "depths differ"

"""Start to first token: a fresh process loads a model of SmolLM2-135M's size and answers.

    python benchmarks/start.py

Random bf16 weights (width 576 x 30 layers, 9 heads over 3, vocabulary 49,152 with a tied head, 4 loops: 135M
parameters) are written to a folder and dropped from the file cache. Then the clock runs: a new Python imports, loads
and checks the model, makes an engine, reads a prompt and prints its first token. Nothing compiled is kept between runs;
the libraries' own files may be in the file cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTION = "The state of the Union is the state of its people, and of those who serve them in every town."
ANSWER = """
import sys
import torch
from looplm import Engine, SamplingParams
from looplm.model.loading import load_model
torch.set_num_threads(1)
model, tokenizer = load_model(sys.argv[1])
engine = Engine(model, tokenizer, kv_bytes=1 << 28)
print(engine.generate([sys.argv[2]], SamplingParams(max_tokens=1, ignore_eos=True))[0].token_ids, flush=True)
"""


def main() -> None:
    """Measure a few times and print each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    print("seconds from the start of a process to its first token:", *(f"{s:.1f}" for s in first_token(options.times)))


def first_token(times: int, small: bool = False) -> list[float]:
    """Seconds to the first token, of each of several fresh processes.

    Args:
        small: two layers only, to try the benchmark itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), 2 if small else 30)
        return [_one_start(Path(folder)) for _ in range(times)]


def _write_model(folder: Path, layers: int) -> None:
    import torch

    from looplm import OuroConfig, OuroForCausalLM
    from looplm.data.tokenizers import train_bpe

    torch.manual_seed(0)
    config = OuroConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    OuroForCausalLM(config).bfloat16().save_pretrained(folder)
    train_bpe([QUESTION], 300).save_pretrained(folder)


def _one_start(folder: Path) -> float:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    command = [sys.executable, "-c", ANSWER, str(folder), QUESTION]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode or not line.startswith("["):
        raise RuntimeError(f"the process ended with code {process.returncode} and said {line!r}")
    return seconds


if __name__ == "__main__":
    main()

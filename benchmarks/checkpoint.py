"""How long a checkpoint holds up training: waited for, and written in the background.

    python benchmarks/checkpoint.py                    # the numbers of docs/log.md

Width 512, 8 layers, 2 loops, vocabulary 16,384 (35M parameters, 0.4 GB with AdamW's moments), batch 2 x 128. In every
turn a checkpoint is waited for and another one written while 8 steps go on; the stall is how long the call keeps the
next step waiting, in plain training steps of the same turn. It does not hold the processor time that the background
write takes from the steps beside it: that is below this machine's noise.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

STEPS = 8


def main() -> None:
    """Measure and print one row a turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = _measure(options.rounds, Path(folder))
    print("stall in plain steps: waited for, in the background, ratio")
    for waited, background in rows:
        print(f"{waited:8.2f}{background:8.2f}{waited / background:8.1f}x")
    print(f"median ratio {statistics.median(waited / background for waited, background in rows):.1f}x")


def _measure(rounds: int, folder: Path) -> list[tuple[float, float]]:
    import torch

    from looplm import OuroConfig, OuroForCausalLM
    from looplm.training.checkpoint import Checkpoints
    from looplm.training.state import TrainingState

    torch.manual_seed(0)
    config = OuroConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        total_ut_steps=2,
        tie_word_embeddings=True,
    )
    model = OuroForCausalLM(config).train()
    state = TrainingState(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    ids = torch.randint(0, config.vocab_size, (2, 128))
    checkpoints = Checkpoints(folder, keep=1)

    def step() -> float:
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return time.perf_counter() - began

    def stall(wait: bool) -> float:
        step()
        began = time.perf_counter()
        checkpoints.save(f"{state.step:08}", state.tensors(), {"training": state.plain()})
        if wait:
            checkpoints.wait()
        return time.perf_counter() - began

    step()
    rows = []
    for _ in range(rounds):
        plain = statistics.median(step() for _ in range(STEPS))
        waited, background = stall(wait=True), stall(wait=False)
        for _ in range(STEPS):
            step()
        checkpoints.wait()
        rows.append((waited / plain, background / plain))
    return rows


if __name__ == "__main__":
    main()

"""Time and peak memory of one training step (forward and backward) against the plain Stage I implementation.

    python benchmarks/training_step.py                 # the table of docs/log.md: all variants, one thread
    python benchmarks/training_step.py --threads 2 --rounds 3

Shape: width 512, 6 layers, 4 loops, vocabulary 49,152, batch 4 x 512, bf16 autocast, untied head. `plain` is what one
would write first: the logits of every loop, one cross entropy a loop, the expected loss, backward. `ours` is
`model(labels=...)`; `compiled` adds compiled layers, `checkpointed` recomputes each loop pass in backward. Every
variant runs in a process of its own, so that peak memory (the largest resident set) is its own; the variants take
turns, and the ratios are those of each variant's fastest step, so that a noisy machine cancels out.

What to expect: the vocabulary's three products a loop are 4 x 3 x 2 x 2048 x 512 x 49152 = 1.24 TFLOP, the loops'
4 x 3 x 2 x 2048 x 6 x 4.2M + attention = 1.3 TFLOP. The plain version also moves 4 x 2048 x 49152 logits (0.8 GB in
bf16) through softmax in fp32, forward and backward: that traffic, not the products, is what the fused objective saves.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = ("plain", "ours", "compiled", "checkpointed", "checkpointed+compiled")
BATCH, LENGTH, LOOPS, BETA = 4, 512, 4, 0.05


def main() -> None:
    """Run the variants in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="times each variant takes its turn")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn, after one warm-up")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_measure(options.worker, options.steps, options.threads)))
        return
    turns = [(v, _turn(v, options)) for _ in range(options.rounds) for v in options.variants]
    results = {v: [turn for name, turn in turns if name == v] for v in options.variants}
    _report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _turn(variant: str, options: argparse.Namespace) -> dict[str, list[float] | float]:
    command = [sys.executable, __file__, "--worker", variant]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    turn = json.loads(done.stdout.splitlines()[-1])
    print(f"{variant:24} {min(turn['seconds']):6.2f} s  {turn['peak'] / 1e9:5.2f} GB", file=sys.stderr)
    return turn


def _measure(variant: str, steps: int, threads: int) -> dict[str, object]:
    """Seconds of each step and the process's peak memory in bytes."""
    import torch

    from looplm import OuroConfig, OuroForCausalLM
    from looplm.training.acceleration import compile_layers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = OuroConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, total_ut_steps=LOOPS
    )
    model = OuroForCausalLM(config).train()
    if "checkpointed" in variant:
        model.gradient_checkpointing_enable()
    if "compiled" in variant and (fault := compile_layers(model, "auto")):
        raise SystemExit(fault)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1))
    step = _plain_step if variant == "plain" else _our_step
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        seconds.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds[1:], "peak": peak, "loss": loss.item()}


def _our_step(model, ids, targets):  # type: ignore[no-untyped-def]
    return model(ids, shift_labels=targets, exit_beta=BETA).loss


def _plain_step(model, ids, targets):  # type: ignore[no-untyped-def]
    """Equation 4 as one would write it first, on the same loops."""
    import torch

    out = model.model(ids)
    logits = [model.lm_head(state) for state in out.loop_states]
    flat = targets.reshape(-1)
    losses = torch.stack(
        [torch.nn.functional.cross_entropy(z.flatten(0, 1), flat, reduction="none") for z in logits], dim=-1
    )
    hazard = torch.sigmoid(out.gate_logits.flatten(0, 1))
    survival = torch.cumprod(1 - hazard[:, :-1], dim=-1)
    before = torch.cat((torch.ones_like(survival[:, :1]), survival), dim=-1)
    p = torch.cat((hazard[:, :-1] * before[:, :-1], before[:, -1:]), dim=-1)
    entropy = -(p * p.clamp(min=1e-20).log()).sum(-1)
    return ((p * losses).sum(-1) - BETA * entropy).mean()


def _report(results: dict[str, list[dict]]) -> None:
    best = {v: min(s for turn in turns for s in turn["seconds"]) for v, turns in results.items()}
    peak = {v: statistics.median(turn["peak"] for turn in turns) for v, turns in results.items()}
    base = "plain" if "plain" in results else next(iter(results))
    print(f"{'variant':24} {'time / ' + base:>14} {'speed-up':>9} {'peak / ' + base:>14} {'loss':>9}")
    for v, turns in results.items():
        ratio = best[v] / best[base]
        print(f"{v:24} {ratio:14.2f} {1 / ratio:8.2f}x {peak[v] / peak[base]:14.2f} {turns[0]['loss']:9.4f}")


if __name__ == "__main__":
    main()

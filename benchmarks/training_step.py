"""Time and peak memory of a full training step (forward, backward, optimizer) against the plain Stage I implementation.

    python benchmarks/training_step.py                    # width 512, 6 layers, 4 loops, V = 49,152, batch 4 x 512
    python benchmarks/training_step.py --shape miniature  # the demo's: width 256, 2 layers, V = 2,048, batch 8 x 128
    python benchmarks/training_step.py --growth           # checkpointed loops: activation memory from 4 to 8 loops

bf16 autocast, untied head, AdamW as the trainer builds it. `plain` is what one would write first: the logits of every
loop, one cross entropy a loop, the expected loss, backward. `ours` is `model(labels=...)`; `compiled` adds compiled
layers, `checkpointed` recomputes each loop pass in backward. `unlooped` is the same depth without loops: L x T untied
layers run once and read once, what a dense model of equal layer passes would cost. Every variant runs in a process of
its own, so that peak memory (the largest resident set) is its own; the variants take turns, and the ratios are those of
each variant's fastest step, so that a noisy machine cancels out.

`MFU` is the model's FLOPs (`looplm.training.planning`; recomputation is not counted) a second over the machine's own
rate in a 2048^3 bf16 product, measured in the same run with the same threads.

What to expect of the first shape: the vocabulary's three products a loop are 4 x 3 x 2 x 2048 x 512 x 49152 = 1.24
TFLOP, the loops' 4 x 3 x 2 x 2048 x 6 x 3.2M + attention = 1.0 TFLOP. The plain version also moves 4 x 2048 x 49152
logits (0.8 GB in bf16) through softmax in fp32, forward and backward: that traffic, not the products, is what the fused
objective saves. Checkpointed, 4 more loops keep 4 more states of 4 x 512 x 512 fp32, 17 MB, and nothing else.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

VARIANTS = ("plain", "ours", "compiled", "checkpointed", "checkpointed+compiled", "unlooped", "unlooped+compiled")
BETA = 0.05


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    width: int
    layers: int
    vocabulary: int
    batch: int
    length: int


SHAPES = {"base": Shape(512, 6, 49152, 4, 512), "miniature": Shape(256, 2, 2048, 8, 128)}


def main() -> None:
    """Run the variants in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="times each variant takes its turn")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn, after one warm-up")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--growth", action="store_true", help="memory of checkpointed loops, 4 against 8")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--loops", type=int, default=4, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_measure(options.worker, options)))
        return
    if options.growth:
        few, many = (_turn("checkpointed", options, loops)["activations"] for loops in (4, 8))
        print(f"activation memory, checkpointed: {few / 1e6:.0f} MB at 4 loops, {many / few - 1:+.1%} at 8")
        return
    turns = [(v, _turn(v, options, 4)) for _ in range(options.rounds) for v in options.variants]
    results = {v: [turn for name, turn in turns if name == v] for v in options.variants}
    _report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _turn(variant: str, options: argparse.Namespace, loops: int) -> dict:
    command = [sys.executable, __file__, "--worker", variant, "--shape", options.shape, "--loops", str(loops)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    turn: dict = json.loads(done.stdout.splitlines()[-1])
    print(f"{variant:24} {min(turn['seconds']):6.2f} s  {turn['peak'] / 1e9:5.2f} GB", file=sys.stderr)
    return turn


def _measure(variant: str, options: argparse.Namespace) -> dict[str, object]:
    """Seconds of each step, the process's peak memory in bytes, FLOPs of a step and the machine's FLOP/s."""
    import torch

    from looplm import OuroForCausalLM
    from looplm.training.acceleration import compile_layers
    from looplm.training.planning import forward_flops
    from looplm.training.recipe import Stage
    from looplm.training.trainer import build_optimizer

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    config = _config(shape, options.loops, looped="unlooped" not in variant)
    imported = _peak()
    rate = _matrix_rate() if not options.growth else 0.0
    model = OuroForCausalLM(config).train()
    stage = Stage(name="step", steps=1, sequence_length=shape.length)
    optimizer = build_optimizer(model, stage)
    if "checkpointed" in variant:
        model.gradient_checkpointing_enable()
    if "compiled" in variant and (fault := compile_layers(model, "auto")):
        raise SystemExit(fault)
    ids = torch.randint(0, config.vocab_size, (shape.batch, shape.length + 1))
    forward = _plain_loss if variant == "plain" else _our_loss
    seconds, losses = [], []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    kept = 16 * sum(p.numel() for p in model.parameters())  # fp32 weights, gradients and two moments
    return {
        "seconds": seconds[1:],
        "peak": _peak(),
        "activations": _peak() - imported - kept,
        "flops": 3 * forward_flops(config, stage) * shape.batch * shape.length,
        "rate": rate,
        "loss": losses[0],
    }


def _config(shape: Shape, loops: int, looped: bool):  # type: ignore[no-untyped-def]
    from looplm import OuroConfig

    return OuroConfig(
        hidden_size=shape.width,
        intermediate_size=int(shape.width * 2.75),
        num_hidden_layers=shape.layers if looped else shape.layers * loops,
        num_attention_heads=shape.width // 64,
        vocab_size=shape.vocabulary,
        total_ut_steps=loops if looped else 1,
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _matrix_rate() -> float:
    """FLOP/s of a 2048^3 product in bf16, the best of a few."""
    import torch

    left, right = torch.randn(2, 2048, 2048).bfloat16()
    out, best = torch.empty_like(left), float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def _our_loss(model, ids, targets):  # type: ignore[no-untyped-def]
    return model(ids, shift_labels=targets, exit_beta=BETA).loss


def _plain_loss(model, ids, targets):  # type: ignore[no-untyped-def]
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
    rate = max(turn["rate"] for turns in results.values() for turn in turns)
    base = "plain" if "plain" in results else next(iter(results))
    print(f"{'variant':24} {'time / ' + base:>14} {'speed-up':>9} {'peak / ' + base:>14} {'MFU':>6} {'loss':>9}")
    for v, turns in results.items():
        ratio, mfu = best[v] / best[base], turns[0]["flops"] / best[v] / rate
        loss = turns[0]["loss"]
        print(f"{v:24} {ratio:14.2f} {1 / ratio:8.2f}x {peak[v] / peak[base]:14.2f} {mfu:6.0%} {loss:9.4f}")


if __name__ == "__main__":
    main()

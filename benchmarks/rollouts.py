"""Reinforcement learning on a small model: rollouts by the engine against `generate`, replay against full depth.

    python benchmarks/rollouts.py [MODEL]       # runs/sums-sft-cpu/model by default, its running sums as prompts

16 prompts x 8 samples, fp32, one thread. `generate` is what TRL's loop calls: all samples in one padded batch, until
the last has ended. The engine drops a sample that has ended, and a token's loops when it exits. Both at full depth;
then the engine with exits drawn from the gate. The learner runs forward and backward over the samples of the drawn
rollout, at full depth, at their recorded depths, and with depths drawn evenly for every position, prompts too. Ratios
of the best of several turns, which take turns.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

PROMPTS, SAMPLES, LONGEST = 16, 8, 24


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="runs/sums-sft-cpu/model")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(1)
    from looplm.model.loading import load_model

    model, tokenizer = load_model(options.model, torch.float32)
    prompts = [prompt for prompt in _prompts(tokenizer) for _ in range(SAMPLES)]
    _rollouts(model, prompts, options.turns)
    _learner(model, prompts, options.turns)


def _prompts(tokenizer) -> list[list[int]]:  # type: ignore[no-untyped-def]
    from looplm.tuning.environments import open_environment
    from looplm.tuning.held_out import prompt_ids
    from looplm.tuning.problems import EnvironmentSettings

    source = {"location": "running-sums", "prompt_field": "messages", "answer_field": "answer"}
    settings = EnvironmentSettings.validated({"source": source, "held_out_every": 4}, "running sums")
    return [prompt_ids(problem, tokenizer) for problem in open_environment(settings).train[:PROMPTS]]


def _drawing(model, mode: str):  # type: ignore[no-untyped-def]
    from looplm.tuning.rl_recipe import DepthSettings
    from looplm.tuning.rollouts import Drawing

    depth = DepthSettings.validated({"mode": mode}, "depth")
    return Drawing(depth, model.config.total_ut_steps, 1.0, LONGEST, 1 << 30)


def _rollouts(model, prompts, turns: int) -> None:  # type: ignore[no-untyped-def]
    from looplm.tuning.rollouts import roll_out

    def engine(mode: str) -> Callable[[], int]:
        drawing = _drawing(model, mode)
        return lambda: sum(len(s.tokens) for s in roll_out(model, prompts, range(len(prompts)), drawing))

    rates = _rates(
        {"generate": lambda: _generate(model, prompts), "full": engine("fixed"), "drawn": engine("sampled")}, turns
    )
    print(f"rollout of {PROMPTS} x {SAMPLES}, new tokens a second against generate in TRL's loop")
    print(f"  engine, full depth   {rates['full'] / rates['generate']:.2f}x")
    print(f"  engine, drawn exits  {rates['drawn'] / rates['generate']:.2f}x")


def _generate(model, prompts) -> int:  # type: ignore[no-untyped-def]
    """As TRL does it: padded on the left, sampled, and counted up to the end of each sample."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": LONGEST, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    with torch.no_grad():
        new = model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)[:, longest:]
    ends = model.generation_config.eos_token_id
    ended = torch.isin(new, torch.tensor(ends)).int().cumsum(1)
    return int((ended - torch.isin(new, torch.tensor(ends)).int() == 0).sum())


def _learner(model, prompts, turns: int) -> None:  # type: ignore[no-untyped-def]
    import torch

    from looplm.tuning.replay import replay
    from looplm.tuning.rollouts import Rows, roll_out

    loops = model.config.total_ut_steps
    drawn = roll_out(model, prompts, range(len(prompts)), _drawing(model, "sampled"))
    rows = Rows.of(drawn)

    def at(depths: torch.Tensor) -> Rows:
        return replace(rows, depths=torch.where(rows.depths > 0, depths, 0))

    even = torch.randint(1, loops + 1, rows.depths.shape, generator=torch.Generator().manual_seed(0))
    cases = {"full": at(torch.full_like(even, loops)), "recorded": rows, "even": at(even)}

    def step(what: Rows) -> Callable[[], int]:
        def run() -> int:
            model.zero_grad()
            found = replay(model, what, temperature=1.0, min_loops=1, max_loops=loops).actions
            found.joint.sum().backward()
            return len(drawn)

        return run

    model.train()
    rates = _rates({name: step(what) for name, what in cases.items()}, turns)
    ran = {name: int(what.depths.clamp(min=1).sum()) for name, what in cases.items()}
    print("learner, rows a second against full depth, of what the loops to run allow (padding runs one)")
    for name, what in (("recorded", "at recorded depths"), ("even", "at depths drawn evenly")):
        mean, new = (cases[name].depths[there].float().mean().item() for there in (rows.depths > 0, rows.exits))
        print(f"  {rates[name] / rates['full']:.2f}x of {ran['full'] / ran[name]:.2f}x  {what}")
        print(f"    mean depth {mean:.2f} of {loops} over all positions, {new:.2f} over new tokens")


def _rates(runs: dict[str, Callable[[], int]], turns: int) -> dict[str, float]:
    """Best of `turns`, in what a run returns a second."""
    best = dict.fromkeys(runs, 0.0)
    for _ in range(turns):
        for name, run in runs.items():
            began = time.perf_counter()
            done = run()
            best[name] = max(best[name], done / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()

"""The six results of docs/results/rl.md: what reinforcement learning with depths does to a small model.

    looplm train looplm/recipes/sums-cpu.yaml      # what all begin with
    python examples/rl_study.py run                # every arm and seed of rl_study.yaml; it can be interrupted
    python examples/rl_study.py report             # tables, figures and verdicts from the runs there are

Each run is `looplm sft` or `looplm grpo` with a recipe of its own below runs/rl. The rules were committed before them.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).with_suffix(".yaml")
ROOT = Path("runs/rl")
RESULTS = Path("docs/results/rl")


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rules", type=Path, default=RULES)
    parser.add_argument("--only", nargs="*", help="arms")
    options = parser.parse_args()
    rules = yaml.safe_load(options.rules.read_text("utf-8"))
    if options.what == "report":
        from rl_report import report

        report(rules, ROOT, RESULTS)
        return
    chosen = options.only or list(rules["arms"])
    for stage in (_sft_runs, _sweep_runs, _seed_runs):
        with ProcessPoolExecutor(options.workers) as pool:
            for done in pool.map(_carry_out, stage(rules, chosen)):
                print(done, flush=True)
    for done in map(_calibrate, _calibrated_runs(rules, chosen)):
        print(done, flush=True)


Run = dict[str, Any]
"""A run: its folder, and what is needed to start it."""


def _sft_runs(rules: dict[str, Any], arms: list[str]) -> Iterator[Run]:
    for seed in (rules["sweep_seed"], *rules["seeds"]):
        yield {"arm": "sft", "seed": seed, "folder": str(ROOT / f"sft-{seed}"), "rules": rules}


def _sweep_runs(rules: dict[str, Any], arms: list[str]) -> Iterator[Run]:
    for arm in arms:
        for rate in rules["learning_rates"]:
            folder = ROOT / f"sweep-{slug(arm)}-{rate:g}"
            yield {"arm": arm, "seed": rules["sweep_seed"], "rate": rate, "folder": str(folder), "rules": rules}


def _seed_runs(rules: dict[str, Any], arms: list[str]) -> Iterator[Run]:
    for arm in arms:
        rate = best_rate(rules, ROOT, arm)
        for seed in rules["seeds"]:
            yield {"arm": arm, "seed": seed, "rate": rate, "folder": str(ROOT / f"{slug(arm)}-{seed}"), "rules": rules}


def _calibrated_runs(rules: dict[str, Any], arms: list[str]) -> Iterator[Run]:
    """Arms that a contrast reads with calibrated exits, at the mean loops of its other side."""
    for contrast in rules["contrasts"]:
        arm, other = contrast["right"]["arm"], contrast["left"]["arm"]
        if contrast["right"].get("calibrated") and {arm, other} <= set(arms):
            for seed in rules["seeds"]:
                target = read(ROOT / f"{slug(other)}-{seed}")["own"]["mean_depth"]
                yield {"folder": str(ROOT / f"{slug(arm)}-{seed}"), "target": target, "rules": rules}


def best_rate(rules: dict[str, Any], root: Path, arm: str) -> float:
    """The learning rate whose sweep run came out best, at the depths of its mode."""

    def outcome(rate: float) -> float:
        return float(read(root / f"sweep-{slug(arm)}-{rate:g}")["own"]["outcome"])

    return float(max(rules["learning_rates"], key=outcome))


def read(folder: Path) -> dict[str, Any]:
    """The row of a finished run."""
    found: dict[str, Any] = json.loads((folder / "row.json").read_text("utf-8"))
    return found


def slug(arm: str) -> str:
    """An arm in the names of folders."""
    return arm.replace(",", "").replace(" ", "-")


def _carry_out(run: Run) -> str:
    """One run and its row, in a process of its own with one thread."""
    import torch

    torch.set_num_threads(1)
    folder = Path(run["folder"])
    if not (folder / "row.json").is_file():
        row = _sft(run, folder) if run["arm"] == "sft" else _grpo(run, folder)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        from looplm.files import write_json

        write_json(folder / "row.json", {"arm": run["arm"], "seed": run["seed"], "commit": commit, **row})
    return f"{folder.name}: {read(folder)['own']['outcome']:.3f}"


def _sft(run: Run, folder: Path) -> dict[str, Any]:
    from looplm.tuning.recipe import load_sft_recipe
    from looplm.tuning.rl_recipe import load_grpo_recipe
    from looplm.tuning.sft import tune

    recipe = load_sft_recipe(run["rules"]["sft"])
    tuned = tune(recipe.model_copy(update={"seed": run["seed"], "output": str(folder)}))
    grpo = load_grpo_recipe(run["rules"]["grpo"])
    by_loops = {str(loops): _measured(folder / "model", grpo, loops) for loops in run["rules"]["loops"]}
    losses = {when: tuned[when]["losses"] for when in ("before", "after")}
    return {"own": _measured(folder / "model", grpo), "by_loops": by_loops, "losses": losses}


def _grpo(run: Run, folder: Path) -> dict[str, Any]:
    from looplm.tuning.grpo import reinforce
    from looplm.tuning.rl_recipe import GRPORecipe

    rules = run["rules"]
    values = yaml.safe_load(Path(rules["grpo"]).read_text("utf-8"))
    values |= {
        "model": str(ROOT / f"sft-{run['seed']}" / "model"),
        "output": str(folder),
        "seed": run["seed"],
        "depth": rules["arms"][run["arm"]],
        "learning_rate": run["rate"],
        "held_out": {**values["held_out"], "loops": rules["loops"]},
    }
    report = reinforce(GRPORecipe.validated(values, run["arm"]))
    after = report["after"]
    row = {"rate": run["rate"], "agreement": report["agreement"], "own": after, "by_loops": after["by_loops"]}
    return {**row, "ignoring_depths": _ignoring_depths(Path(values["model"]), values)}


def _ignoring_depths(model: Path, values: dict[str, Any]) -> dict[str, float] | None:
    """How far a learner that reads every token at full depth is from the rollout, in nats: the paper's situation."""
    import torch

    from looplm.model.loading import load_model
    from looplm.tuning.environments import open_environment
    from looplm.tuning.held_out import prompt_ids
    from looplm.tuning.replay import replay
    from looplm.tuning.rl_recipe import GRPORecipe
    from looplm.tuning.rollouts import Drawing, Rows, roll_out

    recipe = GRPORecipe.validated(values, "recipe")
    if recipe.depth.mode not in ("adaptive", "sampled"):
        return None
    looped, tokenizer = load_model(str(model), torch.float32)
    loops = looped.config.total_ut_steps
    problems = open_environment(recipe.environment).train[:256]
    drawing = Drawing(recipe.depth, loops, recipe.temperature, recipe.max_new_tokens, 1 << 30)
    prompts = [prompt_ids(problem, tokenizer) for problem in problems]
    rows = Rows.of(roll_out(looped, prompts, range(len(prompts)), drawing))
    full = replace(rows, depths=torch.where(rows.depths > 0, loops, 0))
    with torch.no_grad():
        found = replay(looped, full, temperature=recipe.temperature, min_loops=1, max_loops=loops).actions.tokens
    away = (found - rows.old_tokens).abs()[rows.exits]
    return {
        "mean": away.mean().item(),
        "largest": away.max().item(),
        "outside_clip": (away > 0.18).float().mean().item(),
    }


def _calibrate(run: Run) -> str:
    """The paper's rule on a finished model, at the threshold that gives a mean depth on training problems."""
    import torch

    from looplm.files import write_json
    from looplm.model.loading import load_model
    from looplm.tuning.environments import open_environment
    from looplm.tuning.held_out import measure_held_out
    from looplm.tuning.rewards import Rewards
    from looplm.tuning.rl_recipe import DepthSettings, load_grpo_recipe
    from looplm.tuning.rollouts import Drawing

    folder, grpo = Path(run["folder"]), load_grpo_recipe(run["rules"]["grpo"])
    looped, tokenizer = load_model(str(folder / "model"), torch.float32)
    environment = open_environment(grpo.environment)
    drawing = Drawing(None, looped.config.total_ut_steps, 0.0, grpo.max_new_tokens, 1 << 30)
    with Rewards(grpo.rewards, environment) as rewards:

        def at(threshold: float, problems: list[Any]) -> Any:
            depth = DepthSettings.validated({"mode": "adaptive", "exit_threshold": threshold}, "depth")
            return measure_held_out(looped, tokenizer, problems, rewards, replace(drawing, depth=depth))

        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            deep = at(middle, environment.train[:512]).mean_depth > run["target"]
            low, high = (low, middle) if deep else (middle, high)
        found = asdict(at((low + high) / 2, environment.test[: grpo.held_out.problems]))
    write_json(folder / "calibrated.json", {"threshold": (low + high) / 2, "target": run["target"], **found})
    return f"{folder.name} calibrated: {found['outcome']:.3f} at {found['mean_depth']:.2f} loops"


def _measured(model: Path, grpo: Any, loops: int | None = None) -> dict[str, Any]:
    """A model on the held-out problems of a recipe, all positions at `loops` (the trained depth by default)."""
    import torch

    from looplm.model.loading import load_model
    from looplm.tuning.environments import open_environment
    from looplm.tuning.held_out import measure_held_out
    from looplm.tuning.rewards import Rewards
    from looplm.tuning.rollouts import Drawing

    looped, tokenizer = load_model(str(model), torch.float32)
    environment = open_environment(grpo.environment)
    drawing = Drawing(None, loops or looped.config.total_ut_steps, 0.0, grpo.max_new_tokens, 1 << 30)
    with Rewards(grpo.rewards, environment) as rewards:
        problems = environment.test[: grpo.held_out.problems]
        return asdict(measure_held_out(looped, tokenizer, problems, rewards, drawing))


if __name__ == "__main__":
    main()

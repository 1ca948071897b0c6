"""`looplm eval`: tasks at depths, one result file each, and what is kept so that a run goes on where it ended.

The order of work: refuse what cannot work, load the tasks, then the model; for each task all log-likelihoods of all
depths from one pass (`LoopedLM`), then lm-eval's own metrics depth by depth. Answers are kept in `answers/` beside the
results; started again with the same settings, a run reads them and computes only what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from looplm.evaluation.depths import Depth
from looplm.evaluation.grading import grade
from looplm.evaluation.harness import AnswerStore, LoopedLM, Usage, check_generation
from looplm.evaluation.judges import ChatEndpoint, JudgeUnavailable
from looplm.evaluation.recipe import Recipe, digest, fingerprint_model, model_title, prompts_digest, versions
from looplm.evaluation.results import ItemScore, Metric, Result
from looplm.evaluation.tasks import Loaded, load_tasks
from looplm.exits import Confidence, FixedDepth
from looplm.model.cache import KVPolicy
from looplm.model.configuration import OuroConfig
from looplm.model.loading import load_config, load_model
from looplm.training.tracking import Progress

MOST_ROWS = 32
"""Rows of a batch at most; more makes no pass faster on the machines this was tried on."""
_BOOTSTRAP = 1000
"""Resamples of lm-eval's standard errors of metrics that are no means."""


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        tasks: as `looplm.evaluation.tasks` reads them.
        depths: at which the model is read.
        kv_policy, limit, num_fewshot, chat_template, seed: as in the recipe.
        batch_size: None: by memory.
        allow_code: whether tasks may run what the model writes.
        judge, judge_model: address of a chat endpoint that judges free answers.
        command: for the recipe.
    """

    tasks: tuple[str, ...]
    depths: tuple[Depth, ...]
    kv_policy: KVPolicy = "per_loop"
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    batch_size: int | None = None
    seed: int = 0
    allow_code: bool = False
    judge: str | None = None
    judge_model: str | None = None
    command: str = ""


def run_tasks(model_name: str, settings: Settings, output: Path) -> list[Result]:
    """Run every task at every depth and write a result file each.

    Raises:
        ValueError: a model, task or depth that cannot be had; nothing is written then.
        JudgeUnavailable: the judge stopped answering; all results and the verdicts so far are on disk.
    """
    config = load_config(model_name)
    check_depths(config, settings.depths, settings.kv_policy)
    judge = None if settings.judge is None else ChatEndpoint(settings.judge, settings.judge_model)
    tasks = load_tasks(settings.tasks, settings.allow_code)
    for loaded in tasks:
        if loaded.task.OUTPUT_TYPE == "generate_until":
            check_generation(settings.depths)
        _check_shots(loaded, settings)
    model, tokenizer = load_model(model_name)
    if settings.chat_template and not tokenizer.chat_template:
        raise ValueError(f"{model_name} has no chat template; leave --chat-template out")
    base = Recipe(
        model=model_title(model_name),
        fingerprint=fingerprint_model(model_name),
        dtype=str(model.dtype).removeprefix("torch."),
        loops=config.total_ut_steps,
        kv_policy=settings.kv_policy,
        chat_template=digest(tokenizer.chat_template) if settings.chat_template else None,
        limit=settings.limit,
        seed=settings.seed,
        versions=versions(),
        command=settings.command,
    )
    store, batch_size = _open_store(output, base, settings, config)
    base = replace(base, batch_size=batch_size)
    lm = LoopedLM(
        model,
        tokenizer,
        settings.depths,
        kv_policy=settings.kv_policy,
        batch_size=batch_size,
        store=store,
        seed=settings.seed,
    )
    try:
        results = [result for loaded in tasks for result in _run_task(lm, loaded, settings, base, output)]
    finally:
        store.close()
    return results if judge is None else _judged(results, judge, output)


def check_depths(config: OuroConfig, depths: Sequence[Depth], kv_policy: KVPolicy) -> None:
    """Refuse depths that this model does not have.

    Raises:
        ValueError: a rule that freezes without a gate for each token, confidence behind a coda while positions freeze,
            a rule on one loop, two depths of one name, a rule that selects under a KV policy without parallel form.
    """
    names = [depth.name for depth in depths]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if not depths or repeated is not None:
        raise ValueError(f"depths are {', '.join(names) or 'empty'}; name at least one, and each once")
    for depth in depths:
        rule, written = depth.rule, depth.written
        if rule is None:
            continue
        if depth.loops < 2:
            raise ValueError(f"exit rule {written!r} on {depth.loops} loop: there is nothing to leave early")
        if depth.mode == "freeze" and config.exit_gate_pooling != "token" and not isinstance(rule, FixedDepth):
            raise ValueError(
                f"exit rule {written!r} freezes, but the model has no gate for each token "
                f"(exit_gate_pooling is {config.exit_gate_pooling!r}): use exit mode select"
            )
        if depth.mode == "freeze" and config.num_coda_layers and isinstance(rule, Confidence):
            raise ValueError(
                f"exit rule {written!r} reads the coda's output, which has no parallel form while positions freeze: "
                "use exit mode select, q or difference"
            )
        if depth.mode == "select" and kv_policy != "per_loop":
            raise ValueError(
                f"exit rule {written!r} selects, but kv_policy {kv_policy!r} freezes: use exit mode freeze"
            )


def _shots(task: Task, settings: Settings) -> int:
    """Examples before a question: as asked for, but none where the task is one without."""
    own: int | None = task.get_config("num_fewshot")
    return (own or 0) if settings.num_fewshot is None or own == 0 else settings.num_fewshot


def _check_shots(loaded: Loaded, settings: Settings) -> None:
    task, shots = loaded.task, _shots(loaded.task, settings)
    documents, pool = len(task.eval_docs), getattr(task, "sampler", None)
    if shots and documents <= shots and task.get_config("fewshot_split") == task.get_config("test_split"):
        raise ValueError(
            f"{loaded.name} has {documents} examples, too few for num_fewshot {shots} beside each question"
        )
    if pool is not None and len(pool.df) < shots:
        raise ValueError(f"{loaded.name} has {len(pool.df)} examples to show, too few for num_fewshot {shots}")


def _open_store(output: Path, base: Recipe, settings: Settings, config: OuroConfig) -> tuple[AnswerStore, int]:
    """The answers of earlier runs with these settings, and the batch size that they were computed with."""
    kept = (base.fingerprint, base.dtype, base.kv_policy, base.seed, base.versions)
    name = digest(list(kept))[:16]
    size = settings.batch_size
    if size is None:
        earlier = sorted((output / "answers").glob(f"{name}-batch*.jsonl"))
        sizes = [int(path.stem.rpartition("-batch")[2]) for path in earlier]
        size = sizes[0] if sizes else fitting_batch(config, base.dtype, max(d.loops for d in settings.depths))
    return AnswerStore(output / "answers" / f"{name}-batch{size}.jsonl"), size


def fitting_batch(config: OuroConfig, dtype: str, loops: int, free: int | None = None) -> int:
    """Rows of a batch whose keys, values and activations take a quarter of the free memory at most; 1..`MOST_ROWS`.

    Args:
        loops: T; free: bytes, by default what the machine has now.
    """
    positions = min(config.max_position_embeddings, 2048)
    bytes_each = {"float64": 8, "float32": 4}.get(dtype, 2)
    assert config.head_dim is not None and config.num_key_value_heads is not None  # the configuration has set them
    head_width = config.head_dim * config.num_key_value_heads
    layers = config.num_hidden_layers * loops + config.num_prelude_layers + config.num_coda_layers
    wide = 8 * config.hidden_size + 3 * config.intermediate_size
    row = positions * bytes_each * (2 * head_width * layers + wide)
    return min(max(int((free or _free_memory()) // 4 // row), 1), MOST_ROWS)


def _free_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    found = (
        re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if Path("/proc/meminfo").exists()
        else None
    )
    return int(found.group(1)) * 1024 if found else 4 << 30


def _run_task(lm: LoopedLM, loaded: Loaded, settings: Settings, base: Recipe, output: Path) -> list[Result]:
    """One task at every depth."""
    task = loaded.task
    task.set_config(key="num_fewshot", value=_shots(task, settings))
    results = []
    with Progress(1.0, loaded.name) as bar:
        for number, depth in enumerate(settings.depths):
            lm.depth, lm.session.usage = depth, Usage()
            lm.session.report = _reporting(bar, task.OUTPUT_TYPE, number, len(settings.depths))
            task.set_fewshot_seed(seed=settings.seed)
            found = evaluate(
                lm,
                {"tasks": {loaded.name: task}, "groups": {}, "group_map": {}},
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                confirm_run_unsafe_code=settings.allow_code,
            )
            result = _result(found, lm, loaded, depth, base)
            if settings.judge is None or not (output / f"{result.name}.json").is_file():
                result.save(output)  # else the file holds verdicts, and is written when the judge has been asked
            results.append(result)
    return results


def _reporting(bar: Progress, kind: str, number: int, depths: int) -> Callable[[float, int], None]:
    """Log-likelihoods of all depths come with the first one; texts are generated depth by depth."""
    if kind == "generate_until":
        return lambda share, tokens: bar.update((number + share) / depths, tokens)
    return lambda share, tokens: bar.update(share if number == 0 else 1.0, tokens)


def _result(found: Any, lm: LoopedLM, loaded: Loaded, depth: Depth, base: Recipe) -> Result:
    samples, config = found["samples"][loaded.name], loaded.task.config
    generates = loaded.task.OUTPUT_TYPE == "generate_until"
    recipe = replace(
        base,
        **depth.as_dict(),
        task=loaded.name,
        task_version=str(loaded.task.VERSION),
        data=digest(list(dict.fromkeys(sample["doc_hash"] for sample in samples))),
        prompts=prompts_digest(list(instance.args) for instance in loaded.task.instances),
        num_fewshot=config.num_fewshot,
        generation=dict(config.generation_kwargs) if generates else None,
    )
    values = found["results"][loaded.name]
    better = found.get("higher_is_better", {}).get(loaded.name, {})
    metrics = {
        name: Metric(float(value), _number(values.get(_stderr(name))), bool(better.get(name.partition(",")[0], True)))
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }
    policy = "" if base.kv_policy == "per_loop" else f".{base.kv_policy}"
    name = f"{_file_name(loaded.name)}.{depth.name}{policy}"
    return Result(recipe, name, loaded.group, metrics, _items(samples, generates), lm.session.usage.as_dict())


def _stderr(name: str) -> str:
    metric, _, filtered = name.partition(",")
    return f"{metric}_stderr,{filtered}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _file_name(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", task)


def _items(samples: Sequence[dict[str, Any]], generates: bool) -> tuple[ItemScore, ...]:
    """One entry a document; its scores under all filters."""
    found: dict[int, ItemScore] = {}
    for sample in samples:
        place, doc = sample["doc_id"], sample["doc"]
        scores = {
            f"{name},{sample['filter']}": float(sample[name])
            for name in sample["metrics"]
            if isinstance(sample[name], int | float)
        }
        if place in found:
            found[place] = replace(found[place], scores={**found[place].scores, **scores})
            continue
        category = next((str(doc[key]) for key in ("category", "subject") if doc.get(key)), None)
        item = ItemScore(str(doc.get("id") or place), sample["doc_hash"][:16], category, scores)
        if generates:
            prompt, target = sample["arguments"][0][0], sample["target"]
            reference = " | ".join(map(str, target)) if isinstance(target, list) else str(target)
            outputs = tuple(str(text) for texts in sample["resps"] for text in texts)
            item = replace(item, outputs=outputs, question=str(doc.get("prompt") or prompt), reference=reference)
        found[place] = item
    return tuple(found[place] for place in sorted(found))


def _judged(results: Sequence[Result], judge: ChatEndpoint, output: Path) -> list[Result]:
    """The results with verdicts on their free answers; each file is written before a failure is told."""
    done: list[Result] = []
    for result in results:
        if not any(item.outputs for item in result.items):
            done.append(result)
            continue
        earlier = Result.load(output / f"{result.name}.json")
        with Progress(1.0, f"judging {result.name}") as bar:
            graded, failure = grade(result, earlier, judge, lambda share, bar=bar: bar.update(share, 0))  # type: ignore[misc]
        graded.save(output)
        if failure is not None:
            waiting = 0 if graded.judge is None else graded.judge["waiting"]
            raise JudgeUnavailable(f"{failure}; {waiting} answers of {result.name} wait for it: run the command again")
        done.append(graded)
    return done

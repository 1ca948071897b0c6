"""`looplm eval ...`: tasks at any depth with their recipe, and what two results differ in."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

if TYPE_CHECKING:
    from looplm.evaluation.depths import Depth


def run_eval(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="a model folder or hub name")],
    tasks: Annotated[
        tuple[str, ...],
        arg(help="tasks of lm-eval, FILE.jsonl, BIG-bench task.json, reasoning-gym:FAMILY[:N], humaneval, paper:NAME"),
    ],
    loops: Annotated[str | None, arg(help="fixed depths: 4, 1..8 or 1,2,4 (default: the trained one)")] = None,
    exit: Annotated[
        tuple[str, ...], arg(help="exit rules: q=0.8, difference=0.1, max_probability=0.9, entropy=0.5, kl=0.01")
    ] = (),
    exit_mode: Annotated[Literal["select", "freeze"], arg(help="read at the exit after all loops, or stop")] = "select",
    prefill: Annotated[Literal["full", "adaptive"], arg(help="depth of the prompt where exits freeze")] = "full",
    kv_policy: Annotated[
        Literal["per_loop", "last", "average", "first"], arg(help="keys kept after the prompt: every loop's, or one")
    ] = "per_loop",
    limit: Annotated[int | None, arg(help="items of each task at most")] = None,
    num_fewshot: Annotated[int | None, arg(help="examples before each question (default: the task's)")] = None,
    chat_template: Annotated[bool, arg(help="wrap questions in the model's chat template")] = False,
    batch_size: Annotated[int | None, arg(help="rows in one pass (default: by memory)")] = None,
    seed: Annotated[int, arg(help="of few-shot examples and samples")] = 0,
    judge: Annotated[str | None, arg(help="address of an OpenAI-compatible endpoint that judges free answers")] = None,
    judge_model: Annotated[str | None, arg(help="its model (default: the first it lists)")] = None,
    allow_code_execution: Annotated[bool, arg(help="let tasks run what the model writes, in a sandbox")] = False,
    beside_paper: Annotated[bool, arg(help="set the paper's numbers of the same tasks beside")] = False,
    output: Annotated[str, arg(help="folder of the result files; a run started again goes on")] = "runs/eval",
) -> None:
    """Score a model on tasks at every depth asked for; each result file carries its recipe."""
    from pathlib import Path

    from rich.console import Console

    from looplm.commands import command_line
    from looplm.model.loading import load_config

    _check_counts(limit, batch_size)
    names, trained = split_names(tasks), load_config(model).total_ut_steps
    depths = _depths(loops, split_names(exit), exit_mode, prefill, trained)
    need_harness()
    from looplm.evaluation.running import Settings, run_tasks
    from looplm.evaluation.showing import paper_table, results_table

    settings = Settings(
        names, depths, kv_policy=kv_policy, limit=limit, num_fewshot=num_fewshot, chat_template=chat_template,
        batch_size=batch_size, seed=seed, allow_code=allow_code_execution, judge=judge, judge_model=judge_model,
        command=command_line(),
    )  # fmt: skip
    results = run_tasks(model, settings, Path(output))
    console = Console()
    console.print(results_table(results, trained).rich())
    if beside_paper:
        console.print(paper_table(results).rich())
    console.print(f"results {output}", markup=False, highlight=False, soft_wrap=True)


def _check_counts(limit: int | None, batch_size: int | None) -> None:
    for flag, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")


def _depths(
    loops: str | None,
    rules: Sequence[str],
    mode: Literal["select", "freeze"],
    prefill: Literal["full", "adaptive"],
    trained: int,
) -> "tuple[Depth, ...]":
    """The fixed depths, then the rules; the trained depth where neither is given."""
    from looplm.evaluation.depths import Depth, parse_loops

    fixed = parse_loops(loops) if loops is not None else [] if rules else [trained]
    return (*(Depth(loop) for loop in fixed), *(Depth.of_rule(rule, trained, mode, prefill) for rule in rules))


def compare(
    first: Annotated[Positional[str], arg(help="a result file of `looplm eval`")],
    second: Annotated[Positional[str], arg(help="another one")],
    metric: Annotated[str | None, arg(help="e.g. exact_match,strict-match (default: the task's main one)")] = None,
    second_metric: Annotated[str | None, arg(help="of the second file, where it is another one")] = None,
    anyway: Annotated[bool, arg(help="compare results that were measured in different ways")] = False,
    seed: Annotated[int, arg(help="of the resamples")] = 0,
    json: Annotated[str | None, arg(help="write the comparison as JSON")] = None,
) -> None:
    """Explain the difference between two results by their recipes, and test it item by item."""
    from pathlib import Path

    from rich.console import Console

    from looplm.evaluation.compare import compare_results
    from looplm.evaluation.results import Result
    from looplm.files import write_json

    left, right = Result.load(Path(first)), Result.load(Path(second))
    found = compare_results(left, right, metric, second_metric, anyway=anyway, seed=seed)
    if json is not None:
        write_json(json, found.as_dict())
    console = Console()
    console.print(found.text(), markup=False, highlight=False, soft_wrap=True)


def need_harness() -> None:
    """Refuse to go on without lm-eval; raises ValueError with how to get it."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'looplm[eval]'")


def split_names(written: Sequence[str]) -> tuple[str, ...]:
    """Names given one by one or separated by commas. Raises ValueError where one is empty."""
    names = [name.strip() for part in written for name in part.split(",")]
    if not all(names):
        raise ValueError(f"a name is empty in {', '.join(written)!r}")
    return tuple(names)


def report(
    folder: Annotated[Positional[str], arg(metavar="DIR", help="results of `looplm eval` and `looplm study`")],
) -> None:
    """Gather the results of a folder on one HTML page a model: tables, figures, recipes, the calibrated exit."""
    from looplm.evaluation.reporting import report_pages

    for page in report_pages(folder):
        print(f"page {page}")


RUN = Annotated[Any, subcommand("run", constructor=run_eval)]
COMPARE = Annotated[Any, subcommand("compare", constructor=compare)]
REPORT = Annotated[Any, subcommand("report", constructor=report)]
SUBCOMMANDS = ("run", "compare", "report")
"""What may stand behind `looplm eval`; anything else is a model, as if `run` stood before it."""


def evaluate(command: OmitArgPrefixes[OmitSubcommandPrefixes[RUN | COMPARE | REPORT]]) -> None:
    """Tasks at any depth with their recipe: `looplm eval MODEL --tasks ...`; what two results differ in."""


def completed(arguments: Sequence[str]) -> list[str]:
    """The command line with the `run` that `looplm eval MODEL` leaves out."""
    left_out = len(arguments) > 1 and arguments[0] == "eval" and arguments[1] not in (*SUBCOMMANDS, "-h", "--help")
    return ["eval", "run", *arguments[1:]] if left_out else list(arguments)

"""Results on the screen: a table of scores by task and depth, and the paper's numbers beside them."""

from collections.abc import Sequence

from looplm.evaluation.intervals import FEWEST
from looplm.evaluation.paper import Published, published, unlike_paper
from looplm.evaluation.results import Result
from looplm.evaluation.tables import Table

PASS_10 = "pass@10,none"
"""As a result file names it."""


def results_table(results: Sequence[Result], trained: int) -> Table:
    """One row a task, depth and metric; what the depth cost in loops beside it."""
    rows, notes = [], set()
    for result in results:
        if len(result.items) < FEWEST:
            notes.add(f"Fewer than {FEWEST} items say little: no error is given for those.")
        if result.recipe.loops > trained:
            notes.add(f"* beyond the {trained} loops that the model was trained with.")
        if result.recipe.exit_mode == "select":
            notes.add("Exits that select run every loop: they save nothing.")
        for name, metric in result.metrics.items():
            enough = metric.stderr is not None and len(result.items) >= FEWEST
            error = f"{metric.stderr:.4f}" if enough else "–"
            cost = tuple(_loops(result.cost.get(key)) for key in ("loops_read", "loops_processed"))
            shown = (result.recipe.task, depth_label(result, trained), name, f"{metric.value:.4f}", error)
            rows.append((*shown, str(len(result.items)), *cost))
    header = ("task", "depth", "metric", "score", "± stderr", "items", "loops read", "loops processed")
    return Table("Scores", header, tuple(rows), tuple(sorted(notes)))


def depth_label(result: Result, trained: int) -> str:
    """The depth in words: "4 loops", "8 loops *" beyond training, "q=0.8 freeze"."""
    recipe = result.recipe
    policy = "" if recipe.kv_policy == "per_loop" else f", keys {recipe.kv_policy}"
    if recipe.exit_rule is not None:
        prompt = ", prompt too" if recipe.exit_mode == "freeze" and recipe.prefill == "adaptive" else ""
        return f"{recipe.exit_rule} {recipe.exit_mode}{prompt}{policy}"
    plural = "" if recipe.loops == 1 else "s"
    return f"{recipe.loops} loop{plural}{' *' if recipe.loops > trained else ''}{policy}"


def _loops(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def paper_table(results: Sequence[Result]) -> Table:
    """Results of tasks that the paper has numbers of, and those numbers, in percent.

    The tasks of a group are taken together where they were measured alike and read at one depth.
    """
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for group in dict.fromkeys(result.group for result in results):
        known = published(group)
        if not known:
            notes.append(f"{group}: the paper has no number for it.")
            continue
        alike: dict[tuple[str, str], list[Result]] = {}
        for result in results:
            if result.group == group:
                alike.setdefault((_depth(result), _measured(result)), []).append(result)
        for (depth, measured), part in alike.items():
            recipe = part[0].recipe
            rows.append((group, recipe.model, depth, f"{100 * _mean(part, part[0].main_metric):.2f}", measured))
            if PASS_10 in part[0].metrics:
                rows.append((group, recipe.model, depth, f"{100 * _mean(part, PASS_10):.2f}", f"{measured}, pass@10"))
            unlike = unlike_paper(group, recipe.num_fewshot, part[0].main_metric, recipe.chat_template)
            notes += [f"{group}: measured with {fault}." for fault in unlike]
        rows += [
            (group, p.model, "–" if p.loops is None else str(p.loops), f"{p.score:.2f}", _source(p)) for p in known
        ]
    header = ("task", "model", "loops", "score", "from")
    return Table("Beside the paper (percent)", header, tuple(rows), tuple(dict.fromkeys(notes)))


def _source(number: Published) -> str:
    """The table, and the measure where it is not the usual one."""
    return f"Table {number.table}" + (f", {number.measure}" if number.measure else "")


def _depth(result: Result) -> str:
    """The loops, or the exit rule, with the policy where it is not the usual one."""
    recipe = result.recipe
    depth = str(recipe.loops) if recipe.exit_rule is None else f"{recipe.exit_rule} {recipe.exit_mode}"
    return depth if recipe.kv_policy == "per_loop" else f"{depth}, keys {recipe.kv_policy}"


def _measured(result: Result) -> str:
    """What tells a measurement from another one of the same task, in words."""
    recipe = result.recipe
    chat = "" if recipe.chat_template is None else ", chat template"
    limit = "" if recipe.limit is None else f", first {recipe.limit} items"
    return f"here: {recipe.num_fewshot} examples{chat}{limit}"


def _mean(results: Sequence[Result], metric: str) -> float:
    """The mean score over the items of all tasks, as lm-eval weighs the tasks of MMLU and of BBH."""
    total = sum(result.metrics[metric].value * len(result.items) for result in results)
    return total / sum(len(result.items) for result in results)

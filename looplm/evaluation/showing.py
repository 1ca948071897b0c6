"""Results on the screen: a table of scores by task and depth, and the paper's numbers beside them."""

from collections.abc import Sequence

from looplm.evaluation.intervals import FEWEST
from looplm.evaluation.paper import published, unlike_paper
from looplm.evaluation.results import Result
from looplm.evaluation.tables import Table


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
    """Results of tasks that the paper has numbers of, and those numbers, in percent."""
    rows: list[tuple[str, ...]] = []
    notes = []
    for group in dict.fromkeys(result.group for result in results):
        part = [result for result in results if result.group == group]
        known = published(group)
        if not known:
            notes.append(f"{group}: the paper has no number for it.")
            continue
        recipe = part[0].recipe
        unlike = unlike_paper(group, recipe.num_fewshot, part[0].main_metric, recipe.chat_template)
        notes += [f"{group}: measured with {fault}." for fault in unlike]
        for result in part:
            value = 100 * result.metrics[result.main_metric].value
            rows.append((group, result.recipe.model, str(result.recipe.loops), f"{value:.2f}", "this run"))
        rows += [
            (group, p.model, "–" if p.loops is None else str(p.loops), f"{p.score:.2f}", f"Table {p.table}")
            for p in known
        ]
    return Table("Beside the paper (percent)", ("task", "model", "loops", "score", "from"), tuple(rows), tuple(notes))

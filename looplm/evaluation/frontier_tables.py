"""The exit frontier for people: its tables and its charts."""

from collections.abc import Mapping, Sequence
from typing import Any

from looplm.evaluation.exit_frontier import SAVES_NOTHING
from looplm.evaluation.tables import Table
from looplm.training.charts import frontier_chart
from looplm.training.frontier import STATIC

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def text_table(found: Mapping[str, Any], name: str) -> Table:
    """Every point on text: loops twice, FLOPs, loss above full depth, share of right next tokens."""
    header = ("rule", "setting", "mean loops", "of all processed", "FLOPs", "nats a token", "above full depth", "right")
    rows = []
    for curve, points in found["curves"].items():
        for point in points:
            low, high = point["above_full_interval"]
            rows.append(
                (
                    curve,
                    f"{point['setting']:.4g}",
                    f"{point['loops']:.2f}",
                    f"{point['processed_loops']:.2f}",
                    f"{point['flops_share']:.0%}",
                    f"{point['loss']:.4f}",
                    f"{point['above_full']:+.4f} [{low:+.4f}, {high:+.4f}]",
                    f"{point['right']:.3f}",
                )
            )
    for oracle in found["oracles"]:
        loops, loss, right = (
            f"{oracle[key]:{form}}" for key, form in (("loops", ".2f"), ("loss", ".4f"), ("right", ".3f"))
        )
        rows.append((f"oracle: {oracle['oracle']}", "", loops, "", "", loss, "", right))
    notes = (
        f"{found['windows']} windows, {found['tokens']:,} tokens; 95 % intervals over windows. FLOPs: share of full "
        "depth, vocabulary products included. Oracles choose among the states of the full pass, and know the answer.",
    )
    return Table(f"loss against cost on {name}", header, tuple(rows), notes)


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Rules that freeze against static depth, and against the first of them, at equal mean loops."""
    rows = []
    for c in found["comparisons"]:
        low, high = c["interval"]
        verdict = "better" if high < 0 else "worse" if low > 0 else "level"
        difference = f"{c['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        rows.append((c["curve"], c["baseline"], f"{c['loops']:g}", difference, verdict))
    header = ("rule", "against", "mean loops", "nats a token", "verdict")
    return Table("at equal mean loops (below 0 is better)", header, tuple(rows))


def item_table(found: Mapping[str, Any], name: str) -> Table:
    """Every point on items: loops twice, FLOPs, accuracy."""
    header = ("rule", "setting", "mean loops", "of all processed", "FLOPs", "accuracy")
    rows = []
    for curve, points in found["curves"].items():
        for point in points:
            low, high = point["accuracy_interval"]
            costs = (f"{point['loops']:.2f}", f"{point['processed_loops']:.2f}", f"{point['flops_share']:.0%}")
            rows.append((curve, f"{point['setting']:.4g}", *costs, f"{point['accuracy']:.3f} [{low:.3f}, {high:.3f}]"))
    for oracle in found["oracles"]:
        rows.append((f"oracle: {oracle['oracle']}", "", f"{oracle['loops']:.2f}", "", "", f"{oracle['right']:.3f}"))
    notes = (f"{found['items']} items; 95 % intervals (Wilson). Prompts stop by the rule too.",)
    return Table(f"accuracy against cost on {name}", header, tuple(rows), notes)


def frozen_curves(curves: Curves) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The curves that save something: static depth, and the rules that freeze."""
    return {name: points for name, points in curves.items() if not name.endswith(SAVES_NOTHING)}


def text_chart(found: Mapping[str, Any], marked: Mapping[str, Any] | None = None) -> str:
    """Loss above full depth against mean loops; `marked` is ringed."""
    return frontier_chart(frozen_curves(found["curves"]), marked=marked)


def item_chart(found: Mapping[str, Any]) -> str:
    """Accuracy against mean loops over the positions that are read."""
    return frontier_chart(frozen_curves(found["curves"]), "accuracy", "share of items right")


def flops_chart(found: Mapping[str, Any], measure: str, unit: str) -> str:
    """A measure against FLOPs, in loops of full-depth cost: share of the full FLOPs times T."""
    loops = len(found["curves"][STATIC])
    moved = {
        name: [{**point, "loops": point["flops_share"] * loops} for point in points]
        for name, points in frozen_curves(found["curves"]).items()
    }
    return frontier_chart(moved, measure, unit, "FLOPs, in units of a loop of the full pass")


def shown(values: Mapping[str, Any]) -> tuple[list[Table], dict[str, str]]:
    """The tables and the charts by caption of a whole study: its `text` and its `items`, whichever there are."""
    tables, figures = [], {}
    if "text" in values:
        text = values["text"]
        tables += [text_table(text, text["name"]), comparison_table(text)]
        figures[f"Loss above full depth against mean loops on {text['name']}"] = text_chart(text)
        above = flops_chart(text, "above_full", "nats a token above full depth")
        figures[f"Loss above full depth against FLOPs on {text['name']}"] = above
    if "items" in values:
        items = values["items"]
        named = f"on {items['items']} items of {items['name']}"
        tables.append(item_table(items, items["name"]))
        figures[f"Accuracy against mean loops {named}"] = item_chart(items)
        figures[f"Accuracy against FLOPs {named}"] = flops_chart(items, "accuracy", "share of items right")
    return tables, figures

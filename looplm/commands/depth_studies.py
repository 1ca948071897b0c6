"""`looplm study exit-frontier`, `kv-sharing` and `perplexity`: what depth costs and what it buys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from looplm.commands import command_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from looplm.evaluation.recipe import Recipe
    from looplm.evaluation.tables import Table


@contextmanager
def steps() -> Iterator[Callable[[str, float], None]]:
    """A function that is told what is being done and the share of it: a bar in a terminal, a line a step elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console, said = Console(stderr=True), set[str]()
    if not console.is_terminal:

        def line(what: str, share: float) -> None:
            if what not in said:
                console.print(f"{what} ...", markup=False, highlight=False, soft_wrap=True)
                said.add(what)

        yield line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def exit_frontier(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="a model folder or hub name")],
    data: Annotated[
        str | None,
        arg(help="for the loss: text file, or prepared data, its validation side; without it and items: a short text"),
    ] = None,
    items: Annotated[
        str | None, arg(help="for the accuracy: multiple choice, as JSON lines or a BIG-bench task")
    ] = None,
    untrained_gate: Annotated[
        str | None, arg(help="model folder of the stage before the gate was fitted, for its gate")
    ] = None,
    rules: Annotated[
        str | None, arg(help="of q, difference, max_probability, entropy, kl; without: all that the model can run")
    ] = None,
    settings: Annotated[int, arg(help="of each rule, spread over the depths")] = 6,
    window: Annotated[int, arg(help="tokens of a window of text")] = 128,
    limit: Annotated[int, arg(help="windows of text, and items, at most")] = 96,
    batch_size: Annotated[int, arg(help="rows in one pass")] = 8,
    seed: Annotated[int, arg(help="of the bootstrap")] = 0,
    output: Annotated[str, arg(help="folder for JSON, table and figures")] = "runs/study/exit-frontier",
) -> None:
    """Loss or accuracy against cost: static depth, exit rules and two oracles (Ouro Figure 5)."""
    from pathlib import Path

    from looplm.evaluation.exit_frontier import check_items, earlier_gate, run_frontier
    from looplm.evaluation.frontier_tables import shown
    from looplm.evaluation.items import load_choices
    from looplm.evaluation.rules import check_rules, rules_for
    from looplm.evaluation.saving import study_recipe
    from looplm.evaluation.texts import load_windows
    from looplm.model.loading import load_model

    if settings < 1:
        raise ValueError(f"--settings is {settings}; it must be at least 1")
    looped, tokenizer = load_model(model)
    names = rules.split(",") if rules is not None else rules_for(looped.config)
    check_rules(names if untrained_gate is None else list(dict.fromkeys([*names, "q"])), looped.config)
    gate = earlier_gate(looped, load_model(untrained_gate)[0], untrained_gate) if untrained_gate is not None else None
    asked: dict[str, Any] = {"rules": names, "settings": settings, "limit": limit}
    chosen, windows = [], None
    if items is not None:
        chosen, asked["items"] = load_choices(items)[:limit], Path(items).name
        check_items(chosen)
    if data is not None or items is None:
        windows = load_windows(looped, tokenizer, data, window, limit)
        asked |= {"window": window, "data": windows.name}
    with steps() as report:
        values, sent = run_frontier(
            looped, tokenizer, windows, chosen, asked.get("items", ""), names, gate, settings=settings,
            batch_size=batch_size, seed=seed, report=report,
        )  # fmt: skip
    recipe = study_recipe(
        model, looped, "exit-frontier", data=sent, settings=asked, seed=seed, batch_size=batch_size,
        command=command_line(),
    )  # fmt: skip
    finish(output, recipe, values, *shown(values))


def kv_sharing(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="a model folder or hub name")],
    data: Annotated[str | None, arg(help="text file or prepared data; without: a short text")] = None,
    items: Annotated[
        str | None, arg(help="also exact match, on questions with answers of 16 tokens or more: JSON lines")
    ] = None,
    prompt_tokens: Annotated[int, arg(help="of each text")] = 64,
    new_tokens: Annotated[int, arg(help="that are fed and written behind it, at least 16")] = 48,
    limit: Annotated[int, arg(help="texts, and questions, at most")] = 48,
    batch_size: Annotated[int, arg(help="texts at once")] = 16,
    seed: Annotated[int, arg(help="of the bootstrap")] = 0,
    output: Annotated[str, arg(help="folder for JSON, table and figures")] = "runs/study/kv-sharing",
) -> None:
    """What one set of keys and values for all loops costs: the four policies of Ouro Table 14."""
    from pathlib import Path

    from looplm.evaluation.items import Question, load_items
    from looplm.evaluation.saving import study_recipe
    from looplm.evaluation.sharing import check_new_tokens, measure_sharing, table_14
    from looplm.evaluation.texts import load_windows
    from looplm.model.loading import load_model

    check_new_tokens(new_tokens)
    looped, tokenizer = load_model(model)
    windows = load_windows(looped, tokenizer, data, prompt_tokens + new_tokens - 1, limit)
    questions = [item for item in load_items(items) if isinstance(item, Question)][:limit] if items else []
    if items and not questions:
        raise ValueError(f"{items} has multiple choice; exact match needs questions with free answers")
    with steps() as report:
        found = measure_sharing(
            looped, windows.requests, new_tokens, batch_size=batch_size, seed=seed, questions=questions,
            tokenizer=tokenizer, report=lambda share: report("running four policies", share),
        )  # fmt: skip
    asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "data": windows.name, "limit": limit}
    asked |= {"items": Path(items).name} if items else {}
    recipe = study_recipe(
        model, looped, "kv-sharing", data=[*windows.requests, *(q.prompt for q in questions)], settings=asked,
        seed=seed, batch_size=batch_size, command=command_line(), kv_policy="all",
    )  # fmt: skip
    finish(output, recipe, found.as_dict(), [found.table(windows.name), table_14()], found.charts())


def perplexity(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="a model folder or hub name")],
    text: Annotated[str | None, arg(help="UTF-8 text file; without: a short text")] = None,
    loops: Annotated[str | None, arg(help="such as 1..8; without: two beyond the training")] = None,
    window: Annotated[int | None, arg(help="tokens that a pass sees; without: 512 or the context")] = None,
    stride: Annotated[int | None, arg(help="new tokens of a window; without: half of it")] = None,
    batch_size: Annotated[int, arg(help="windows in one pass")] = 4,
    seed: Annotated[int, arg(help="of the bootstrap")] = 0,
    output: Annotated[str, arg(help="folder for JSON, table and figure")] = "runs/study/perplexity",
) -> None:
    """Nats a token, perplexity and bits a byte after every loop, the trained ones and beyond, on any text."""
    from dataclasses import asdict
    from pathlib import Path

    from looplm.data.texts import read_text
    from looplm.evaluation.depths import parse_loops
    from looplm.evaluation.perplexity import measure_perplexity
    from looplm.evaluation.saving import study_recipe
    from looplm.model.loading import load_model

    words = read_text(text)
    name = "the shipped text" if text is None else Path(text).name
    looped, tokenizer = load_model(model)
    wide = min(512, looped.config.max_position_embeddings) if window is None else window
    new = max(wide // 2, 1) if stride is None else stride
    asked = parse_loops(loops or f"1..{looped.config.total_ut_steps + 2}")
    with steps() as report:
        found = measure_perplexity(
            looped, tokenizer, words, loops=asked, window=wide, stride=new, batch_size=batch_size, seed=seed,
            report=lambda share: report("scoring", share),
        )  # fmt: skip
    settings = {"loops": asked, "window": wide, "stride": new, "text": name}
    recipe = study_recipe(
        model, looped, "perplexity", data=[words], settings=settings, seed=seed, batch_size=batch_size,
        command=command_line(),
    )  # fmt: skip
    finish(output, recipe, asdict(found), [found.table(name)], {f"Loss by loop on {name}": found.chart()})


def finish(
    output: str, recipe: "Recipe", values: "Mapping[str, Any]", tables: "Sequence[Table]", figures: "Mapping[str, str]"
) -> None:
    """Write the files of a study and show its tables."""
    from rich.console import Console

    from looplm.evaluation.saving import save_study

    path, console = save_study(output, recipe.task, recipe, values, tables, figures), Console()
    for table in tables:
        console.print(table.rich())
    beside = "tables and figures" if figures else "tables"
    console.print(f"results {path}, with {beside} beside it", markup=False, highlight=False, soft_wrap=True)

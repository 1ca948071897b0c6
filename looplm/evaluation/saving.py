"""The files of a study: NAME.json with every number and the recipe, NAME.md with its tables, NAME.svg with its figure.

Figures are those of `looplm.training.charts`, whose colours come from the page; as a file of its own a figure brings
the style sheet along, for light and for dark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from looplm.evaluation.recipe import Recipe, fingerprint_model, model_title, prompts_digest, versions
from looplm.evaluation.tables import Table
from looplm.files import plain, write_json, write_text
from looplm.model.modeling import OuroForCausalLM

STYLE = """
svg{--page:#fbfaf8;--ink:#16181d;--soft:#5b6069;--rule:#dedad3;--grid:#e9e6e0;background:var(--page)}
@media(prefers-color-scheme:dark){svg{--page:#14161a;--ink:#eceae6;--soft:#a2a6ae;--rule:#33373f;--grid:#262a31}}
text{font:13px system-ui,sans-serif;fill:var(--soft)}text.label{fill:var(--line);font-weight:600}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}.curve{fill:none;stroke:var(--line);stroke-width:1.75}
.point{fill:var(--page);stroke:var(--line);stroke-width:1.75}.leader{stroke:var(--line);fill:none}
.ring{fill:none;stroke:var(--ink);stroke-width:2}
"""
"""What the charts' classes mean outside a page; the page of a report has the same ones."""


def standalone(chart: str) -> str:
    """A chart as the text of an SVG file, with a margin; "" for no chart."""
    if not chart:
        return ""
    head, _, body = chart.partition(">")
    size = head.partition('viewBox="0 0 ')[2].partition('"')[0]
    width, height = (int(number) for number in size.split())
    head = head.replace(f'viewBox="0 0 {size}"', f'viewBox="-12 -24 {width + 24} {height + 36}"')
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}><style>{STYLE}</style>{body}\n"


def save_study(
    folder: str | Path,
    study: str,
    recipe: Recipe,
    values: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, str],
) -> Path:
    """Write a study into `folder`, each file whole or not at all; returns the path of the JSON.

    Args:
        values: every number of the study, as plain JSON.
        figures: charts by their caption; the first is STUDY.svg, later ones STUDY-2.svg, ...
    """
    folder = Path(folder)
    drawn = {caption: chart for caption, chart in figures.items() if chart}
    names = [f"{study}.svg" if number == 1 else f"{study}-{number}.svg" for number in range(1, len(drawn) + 1)]
    for name, chart in zip(names, drawn.values(), strict=True):
        write_text(folder / name, standalone(chart))
    shown = [f"![{caption}]({name})\n" for caption, name in zip(drawn, names, strict=True)]
    head = f"# {study}: {recipe.model}\n\n`{recipe.command}`\n"
    write_text(folder / f"{study}.md", "\n".join([head, *(table.markdown() for table in tables), *shown]))
    record = {"study": study, "recipe": recipe.as_dict(), "tables": [table.as_dict() for table in tables]}
    path = folder / f"{study}.json"
    write_json(path, plain({**record, **values}))
    return path


def study_recipe(
    name_or_path: str,
    model: OuroForCausalLM,
    study: str,
    *,
    data: Sequence[Any],
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int,
    command: str,
    kv_policy: str = "per_loop",
) -> Recipe:
    """The recipe of a study: of the model folder as it lies there, with what was sent to the model as `data`."""
    return Recipe(
        model=model_title(name_or_path),
        fingerprint=fingerprint_model(name_or_path),
        dtype=str(model.dtype).removeprefix("torch."),
        loops=model.config.total_ut_steps,
        kv_policy=kv_policy,
        task=study,
        prompts=prompts_digest(data),
        settings=dict(settings),
        seed=seed,
        batch_size=batch_size,
        versions=versions(),
        command=command,
    )

"""`looplm calibrate`: the threshold of every exit rule for a mean depth or a bounded loss, kept beside the weights."""

from typing import Annotated

from tyro.conf import Positional, arg

from looplm.commands import command_line
from looplm.commands.depth_studies import steps


def calibrate(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="a model folder; calibration.json is written into it")],
    target: Annotated[str, arg(help="mean-loops=2.5, or loss-increase=0.5%% (of the loss at full depth)")],
    data: Annotated[
        str | None, arg(help="held-out text file, or prepared data of which the validation side is read")
    ] = None,
    rules: Annotated[
        str | None, arg(help="of q, difference, max_probability, entropy, kl; without: all that the model can run")
    ] = None,
    settings: Annotated[int, arg(help="of each rule, spread over the depths")] = 12,
    delta: Annotated[float, arg(help="how often the bound of loss-increase may fail, in (0, 1)")] = 0.1,
    window: Annotated[int, arg(help="tokens of a window")] = 128,
    limit: Annotated[int, arg(help="windows at most; half calibrate, half test")] = 256,
    batch_size: Annotated[int, arg(help="rows in one pass")] = 8,
    seed: Annotated[int, arg(help="of free-running texts and intervals")] = 0,
    output: Annotated[str | None, arg(help="also write JSON, table and figure into this folder")] = None,
) -> None:
    """Fit the threshold of every exit rule on held-out text, for `depth_budget` and for you; again after tuning."""
    from dataclasses import asdict
    from pathlib import Path

    from rich.console import Console

    from looplm.evaluation.calibration import calibrate_rules, parse_target
    from looplm.evaluation.rules import check_rules, rules_for
    from looplm.evaluation.saving import save_study, study_recipe
    from looplm.evaluation.texts import load_windows
    from looplm.files import write_json
    from looplm.model.calibration import CALIBRATION, weights_fingerprint
    from looplm.model.loading import load_model

    if not Path(model).is_dir():
        raise ValueError(f"{model} is no folder here; calibration is kept beside the weights: give a local copy")
    if settings < 2 or not 0 < delta < 1:
        raise ValueError(f"--settings is {settings} and --delta {delta}; give at least 2, and one in (0, 1)")
    looped, tokenizer = load_model(model)
    aim = parse_target(target, looped.config.total_ut_steps)
    names = rules.split(",") if rules is not None else rules_for(looped.config)
    check_rules(names, looped.config)
    windows = load_windows(looped, tokenizer, data, window, limit)
    with steps() as report:
        found = calibrate_rules(
            looped, windows, aim, names, settings=settings, delta=delta, batch_size=batch_size, seed=seed, report=report
        )
    kept = Path(model) / CALIBRATION
    write_json(kept, {"weights": weights_fingerprint(looped), **asdict(found)})
    console, table = Console(), found.tabulate()
    console.print(table.rich())
    console.print(f"written {kept}; `depth_budget` begins with it", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        asked = {"target": target, "rules": names, "settings": settings, "delta": delta, "data": windows.name}
        recipe = study_recipe(
            model, looped, "calibrate", data=windows.requests, settings={**asked, "window": window, "limit": limit},
            seed=seed, batch_size=batch_size, command=command_line(),
        )  # fmt: skip
        figure = {f"Settings tried for {target}, and the choice on other text": found.chart()}
        path = save_study(output, "calibrate", recipe, asdict(found), [table], figure)
        console.print(f"results {path}, with table and figure beside it", markup=False, highlight=False, soft_wrap=True)

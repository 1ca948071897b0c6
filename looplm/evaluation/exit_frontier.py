"""The exit frontier (Ouro Figure 5, A.11): loss or accuracy against cost, each setting of a rule a point.

Adaptive curves are run under `freeze`, as generation stops positions, prompt positions included (a one-token answer
behind a full-depth prompt is always read at the last loop). Rules that `select` are told apart: all loops run, so they
save nothing. Static depths, selecting rules and both oracles come from the same passes.

What a point costs is said twice:

    loops   the mean over the positions that are read, and over all that are processed (prompts of items are run too)
    FLOPs   a processed position, with the vocabulary products: a confidence rule pays one after every loop, the others
            one where a position is read (`looplm.training.planning`)

Intervals are over windows of text (bootstrap) or items (Wilson). Text is compared at equal mean loops as in
`looplm.training.frontier`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from looplm.evaluation.depths import Depth
from looplm.evaluation.intervals import FEWEST, wilson
from looplm.evaluation.items import Item
from looplm.evaluation.oracles import agreement_depths, hindsight_depths, read_at
from looplm.evaluation.rules import GATE, PlainPass, plain_pass, reads_every_loop
from looplm.evaluation.scoring import Request, Scores, choice_requests, chosen, score
from looplm.evaluation.texts import TextWindows
from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM
from looplm.training.frontier import STATIC, Gate, ScoredWindows, gate_of, lent_gate, summarise
from looplm.training.planning import token_flops

UNTRAINED = "untrained gate"
"""The curve of the gate of an earlier stage."""

SAVES_NOTHING = "selects: saves nothing"
"""What a selecting curve is labelled with."""

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Reading:
    """One curve's readings: its name, its rule's name, and a depth for each setting."""

    curve: str
    rule: str | None
    depths: tuple[Depth, ...]


@dataclass(frozen=True)
class Readings:
    """What was scored: every curve with its settings, and the scores of their depths in that order."""

    readings: list[Reading]
    scores: Scores
    plain: PlainPass

    def parts(self) -> list[tuple[Reading, slice]]:
        """Each curve with its places among the depths of the scores."""
        ends = np.cumsum([len(reading.depths) for reading in self.readings]).tolist()
        return [(r, slice(end - len(r.depths), end)) for r, end in zip(self.readings, ends, strict=True)]


def run_frontier(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    windows: TextWindows | None,
    items: Sequence[Item],
    items_name: str,
    rules: Sequence[str],
    untrained: Gate | None,
    *,
    settings: int,
    batch_size: int,
    seed: int,
    report: Report = lambda what, share: None,
) -> tuple[dict[str, Any], list[Request]]:
    """The study on text and on items, whichever there are: its `text` and `items` as plain JSON, and what was sent.

    Raises:
        ValueError: as `check_items`.
    """
    read = partial(
        read_curves, model, rules=rules, untrained=untrained, settings=settings, batch_size=batch_size, report=report
    )
    values: dict[str, Any] = {}
    sent: list[Request] = []
    if windows is not None:
        text = text_frontier(read(windows.requests), model.config, (windows.length + 1) / 2, seed)
        values["text"] = {**text, "name": windows.name, "window": windows.length}
        sent += windows.requests
    if items:
        check_items(items)
        requests = choice_requests(tokenizer, items)
        keys = sum(len(context) + len(target) for context, target in requests) / len(requests) / 2
        values["items"] = {**item_frontier(read(requests), items, model.config, keys), "name": items_name}
        sent += requests
    return values, sent


def read_curves(
    model: OuroForCausalLM,
    requests: Sequence[Request],
    rules: Sequence[str],
    untrained: Gate | None,
    *,
    settings: int,
    batch_size: int,
    report: Report = lambda what, share: None,
) -> Readings:
    """Score the requests at every static depth and at `settings` settings of every rule, frozen and selecting.

    Args:
        rules: names that `looplm.evaluation.rules.check_rules` has accepted.
        untrained: another gate of the same model, whose Q-exit makes a curve of its own.
        settings: of each rule, spread over the depths between 1 and T.
        report: told what is being done, and the share of it.
    """
    most = model.config.total_ut_steps
    aims = np.linspace(1, most, settings + 2)[1:-1].tolist()
    plain = plain_pass(model, requests, rules, lambda share: report("looking at every loop", share))
    readings = [Reading(STATIC, None, tuple(Depth(loops) for loops in range(1, most + 1)))]
    readings += [_reading(name, name, plain.settings(name, aims), most, frozen=True) for name in rules]
    readings += [
        _reading(f"{name}, {SAVES_NOTHING}", name, plain.settings(name, aims), most, frozen=False) for name in rules
    ]
    readings = [reading for reading in readings if reading.depths]
    scores = _scored(model, requests, readings, batch_size, report)
    if untrained is not None:
        with lent_gate(model):
            model.model.early_exit_gate.load_state_dict(dict(untrained))
            aimed = plain_pass(model, requests, [GATE]).settings(GATE, aims)
            reading = _reading(UNTRAINED, GATE, aimed, most, frozen=True)
            more = _scored(model, requests, [reading], batch_size, report) if reading.depths else None
        if more is not None:
            readings, scores = [*readings, reading], _joined(scores, more)
    return Readings(readings, scores, plain)


def _reading(curve: str, rule: str, settings: Sequence[float], loops: int, frozen: bool) -> Reading:
    mode = "freeze" if frozen else "select"
    depths = (Depth.of_rule(f"{rule}={setting!r}", loops, mode, "adaptive") for setting in settings)  # type: ignore[arg-type]
    return Reading(curve, rule, tuple(depths))


def _scored(
    model: OuroForCausalLM, requests: Sequence[Request], readings: Sequence[Reading], batch_size: int, report: Report
) -> Scores:
    depths = [depth for reading in readings for depth in reading.depths]
    what = f"scoring {len(depths)} readings"
    return score(model, requests, depths, batch_size=batch_size, report=lambda share: report(what, share))


def _joined(first: Scores, second: Scores) -> Scores:
    """The same requests at the depths of both."""
    fields = ("log_probabilities", "greedy", "read_depths", "loops_run")
    requests = tuple(
        replace(a, **{name: torch.cat((getattr(a, name), getattr(b, name))) for name in fields})  # type: ignore[arg-type]
        for a, b in zip(first.requests, second.requests, strict=True)
    )
    return Scores((*first.depths, *second.depths), requests)


def text_frontier(found: Readings, config: OuroConfig, keys: float, seed: int) -> dict[str, Any]:
    """Loss against cost over windows of text, with every point's costs and share of right tokens, as plain JSON.

    Args:
        keys: that each attention sees on average.
        seed: of the bootstrap.
    """
    sums = _window_sums(found.scores)
    frozen: ScoredWindows = {}
    selecting: ScoredWindows = {}
    for reading, part in found.parts():
        rows = [(_setting(depth), sums[place]) for depth, place in zip(reading.depths, _places(part), strict=True)]
        (selecting if _selects(reading) else frozen)[reading.curve] = rows
    result = asdict(summarise(frozen, seed))
    chosen_too = asdict(summarise({STATIC: frozen[STATIC], **selecting}, seed))["curves"]
    result["curves"] |= {name: points for name, points in chosen_too.items() if name != STATIC}
    right = torch.cat([scored.greedy for scored in found.scores.requests], dim=1).double().mean(1).tolist()
    _add_costs(result["curves"], found, config, keys)
    for reading, part in found.parts():
        for point, place in zip(result["curves"][reading.curve], _places(part), strict=True):
            point["right"] = right[place]
    return {**result, "oracles": _text_oracles(found)}


def check_items(items: Sequence[Item]) -> None:
    """Refuse fewer items than an interval needs; raises ValueError."""
    if len(items) < FEWEST:
        raise ValueError(f"{len(items)} items; an interval needs {FEWEST} or more")


def item_frontier(found: Readings, items: Sequence[Item], config: OuroConfig, keys: float) -> dict[str, Any]:
    """Accuracy against cost over multiple-choice items, as plain JSON; intervals are Wilson's.

    Raises:
        ValueError: fewer items than an interval needs.
    """
    check_items(items)
    picked = chosen(found.scores, items)
    right = picked == torch.tensor([item.answer for item in items])
    depth = found.scores.mean_read_depth.tolist()
    curves: dict[str, list[dict[str, Any]]] = {}
    for reading, part in found.parts():
        curves[reading.curve] = [
            {
                "setting": _setting(reading.depths[number]),
                "loops": depth[place],
                "accuracy": float(right[place].double().mean()),
                "accuracy_interval": list(wilson(int(right[place].sum()), len(items))),
            }
            for number, place in enumerate(_places(part))
        ]
    _add_costs(curves, found, config, keys)
    static = slice(0, config.total_ut_steps)
    return {"curves": curves, "items": len(items), "oracles": _oracles(picked[static].T, right[static].T)}


def _selects(reading: Reading) -> bool:
    return reading.rule is not None and reading.depths[0].mode == "select"


def _places(part: slice) -> range:
    return range(part.start, part.stop)


def _setting(depth: Depth) -> float:
    return float(depth.written.partition("=")[2]) if depth.rule is not None else float(depth.loops)


def _window_sums(scores: Scores) -> NDArray[np.float64]:
    """Tokens, nats and loops of every window at every depth, (D, W, 3)."""
    windows = [
        torch.stack(
            (
                torch.full((len(scores.depths),), scored.greedy.shape[1], dtype=torch.float64),
                -scored.log_probabilities.double().sum(1),
                scored.read_depths.double().sum(1),
            ),
            dim=1,
        )
        for scored in scores.requests
    ]
    return torch.stack(windows, dim=1).numpy()


def _add_costs(curves: Mapping[str, list[dict[str, Any]]], found: Readings, config: OuroConfig, keys: float) -> None:
    """Put `processed_loops`, `flops` a processed position, and their share of full depth into every point."""
    run = found.scores.mean_loops_run.tolist()
    read = sum(scored.greedy.shape[1] for scored in found.scores.requests)
    share = read / sum(scored.positions for scored in found.scores.requests)
    full = token_flops(config, config.total_ut_steps, share, keys)
    for reading, part in found.parts():
        for point, place in zip(curves[reading.curve], _places(part), strict=True):
            reads = run[place] if reading.rule is not None and reads_every_loop(reading.rule) else share
            point["processed_loops"] = run[place]
            point["flops"] = token_flops(config, run[place], reads, keys)
            point["flops_share"] = point["flops"] / full


def _text_oracles(found: Readings) -> list[dict[str, Any]]:
    """Both oracles over the target tokens, from the plain pass and the static depths."""
    loops = len(found.readings[0].depths)
    log_p = torch.cat([scored.log_probabilities[:loops] for scored in found.scores.requests], dim=1).T
    right = torch.cat([scored.greedy[:loops] for scored in found.scores.requests], dim=1).T
    return _oracles(found.plain.predictions, right, -log_p)


def _oracles(predictions: Tensor, right: Tensor, nats: Tensor | None = None) -> list[dict[str, Any]]:
    """Agreement and hindsight of (N, T) predictions: mean loops, share right, and the loss where given."""
    depths = {"agreement": agreement_depths(predictions), "hindsight": hindsight_depths(right)}
    rows = []
    for name, chosen_loops in depths.items():
        row: dict[str, Any] = {"oracle": name, "loops": float(chosen_loops.double().mean())}
        row["right"] = float(read_at(right, chosen_loops).double().mean())
        if nats is not None:
            row["loss"] = float(read_at(nats, chosen_loops).double().mean())
        rows.append(row)
    return rows


def earlier_gate(model: OuroForCausalLM, earlier: OuroForCausalLM, name: str) -> Gate:
    """The gate of an earlier stage of the same model.

    Raises:
        ValueError: the other model is not this one but for its gate.
    """
    others = dict(earlier.named_parameters())
    for key, weight in model.named_parameters():
        other = others.get(key)
        gate = "early_exit_gate" in key
        if other is None or other.shape != weight.shape or not (gate or torch.equal(other, weight)):
            raise ValueError(
                f"{name} is not an earlier stage of this model: {key} differs; a gate reads the states of its own "
                "model only (give the folder of the stage before the gate was fitted)"
            )
    return gate_of(earlier)

"""The frontier of an exit rule: loss against mean loops, each setting of a rule a point (after Ouro Figure 5).

Every point scores the same windows in one freezing pass (`exit_mode="freeze"`), so a position past its exit is frozen
for later ones too, as in generation. Loss is nats a target token; cost is the mean depth of the target positions.
Static depths 1..T come from one plain pass, which is what freezing every position at one depth gives.

Intervals are 95 % percentile bootstrap intervals over windows, and all points share their resamples, so differences
are paired. Two rules are compared at equal mean loops by linear interpolation between the points of each. That is
attainable: choosing between the two neighbouring settings by a coin for each text has that loss at that depth. Windows
of one document are not independent, and intervals over them too narrow: let the windows come from many documents.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from looplm.exits import Confidence, ExitRule, QExit, StateDifference, exit_cdf
from looplm.model.modeling import OuroForCausalLM
from looplm.model.outputs import OuroCausalLMOutput
from looplm.objectives.token_losses import IGNORED
from looplm.training.bootstrap import Interval, interval, resampled
from looplm.training.tracking import Progress

STATIC = "static depth"
"""The curve of fixed depths."""

SPACING = 0.5
"""Mean loops between the comparisons of two rules."""

CONFIDENCE_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Thresholds of the largest probability."""

Batches = Sequence[Mapping[str, Tensor]]
Gate = Mapping[str, Tensor]
_Sums = NDArray[np.float64]
ScoredWindows = dict[str, list[tuple[float, _Sums]]]
"""Of every curve its settings, and for each the tokens, nats and loops of every window, (W, 3)."""


@dataclass(frozen=True)
class Curve:
    """One rule at several settings, under the model's own gate or another one (see `gate_of`)."""

    rules: Sequence[ExitRule]
    gate: Gate | None = None


@dataclass(frozen=True)
class Point:
    """One setting of a rule, with 95 % intervals; loops are means over positions, losses nats a token.

    How far texts differ in difficulty makes up most of `loss_interval`. It falls out of `above_full`, the loss less
    that of the deepest static depth on the same windows: rules are told apart there.
    """

    setting: float
    loops: float
    loops_interval: Interval
    loss: float
    loss_interval: Interval
    above_full: float
    above_full_interval: Interval


@dataclass(frozen=True)
class Comparison:
    """Loss of `curve` less that of `baseline` at equal mean loops, nats a token: negative is better."""

    curve: str
    baseline: str
    loops: float
    difference: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval leaves 0 out, else `level`."""
        return "better" if self.interval[1] < 0 else "worse" if self.interval[0] > 0 else "level"


@dataclass(frozen=True)
class Frontier:
    """Curves over the same windows, and how they compare; `dataclasses.asdict` of it is plain JSON."""

    curves: dict[str, list[Point]]
    comparisons: list[Comparison]
    windows: int
    tokens: int

    def table(self) -> Table:
        """Every point, for the screen."""
        table = Table(title=f"Loss against loops over {self.windows} windows, {self.tokens} tokens")
        for name in ("rule", "setting", "mean loops", "nats a token", "above full depth"):
            table.add_column(name, justify="left" if name == "rule" else "right")
        for curve, points in self.curves.items():
            for number, p in enumerate(points):
                name = curve if number == 0 else ""
                loops, loss = _shown(p.loops, p.loops_interval, 2), _shown(p.loss, p.loss_interval, 3)
                above = _shown(p.above_full, p.above_full_interval, 4, "+")
                last = number == len(points) - 1
                table.add_row(name, f"{p.setting:.3g}", loops, loss, above, end_section=last)
        return table

    def comparison_table(self) -> Table:
        """Every comparison at equal mean loops, for the screen."""
        table = Table(title="Loss difference at equal mean loops, nats a token (negative: better)")
        for name in ("rule", "against", "mean loops", "difference", "verdict"):
            table.add_column(name, justify="right" if name in ("mean loops", "difference") else "left")
        for c in self.comparisons:
            table.add_row(c.curve, c.baseline, f"{c.loops:g}", _shown(c.difference, c.interval, 4, "+"), c.verdict)
        return table


def gate_of(model: OuroForCausalLM) -> Gate:
    """A copy of a model's gate, to compare or to put back."""
    return {name: value.detach().clone() for name, value in model.model.early_exit_gate.state_dict().items()}


@contextmanager
def lent_gate(model: OuroForCausalLM) -> Iterator[Gate]:
    """The model in eval mode; its mode and its gate, which is given here, are as they were afterwards."""
    own, was_training = gate_of(model), model.training
    model.eval()
    try:
        yield own
    finally:
        model.model.early_exit_gate.load_state_dict(own)
        model.train(was_training)


def compare_gates(model: OuroForCausalLM, batches: Batches, gates: Mapping[str, Gate], *, seed: int = 0) -> Frontier:
    """The frontiers of several gates of one frozen model, of static depth and of one confidence rule.

    Every gate is scored at thresholds of its own that bring it to the depths where rules are compared, and between
    them and the ends (`thresholds_for`). The confidence rule, the largest probability, is left out for a model with a
    coda, whose read-out has no parallel form while positions freeze.

    Args:
        gates: by name, see `gate_of`; the later ones are compared with the first (say, Stage I's).
        model, batches, seed: as in `frontier`.

    Raises:
        ValueError: as `frontier`.
    """
    most, curves = model.config.total_ut_steps, {}
    depths = [1 + SPACING / 2, *_compared_depths(most), most - SPACING / 2] if most > 1 else []
    with lent_gate(model):
        for name, gate in gates.items():
            model.model.early_exit_gate.load_state_dict(gate)
            curves[name] = Curve([QExit(q) for q in thresholds_for(model, batches, depths)], gate)
    if not model.config.num_coda_layers:
        curves["max probability"] = Curve([Confidence("max_probability", p) for p in CONFIDENCE_THRESHOLDS])
    return frontier(model, batches, curves, seed=seed)


@torch.no_grad()
def thresholds_for(model: OuroForCausalLM, batches: Batches, depths: Sequence[float]) -> list[float]:
    """Q-exit thresholds at which the mean depth of the target positions is about each of `depths`.

    Found on a plain pass, in which no position is frozen, so that a freezing pass comes out near them; equal and
    neighbouring ones where the gate can do no better. The gate is the model's, the batches are as in `frontier`; their
    losses are not looked at.

    Returns:
        Ascending thresholds in (0, 1], without repetition.

    Raises:
        ValueError: no target position.
    """
    reached = []
    with lent_gate(model):
        for batch in batches:
            ids, places = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
            cdf = exit_cdf(model(ids, position_ids=places, skip_logits=True).gate_logits)[..., :-1]
            reached.append(cdf[batch["labels"].to(model.device) != IGNORED].cpu())
    cdf = torch.cat(reached)
    if not len(cdf):
        raise ValueError("the batches hold no target token; a threshold needs some to be found on")
    return [q for q in thresholds_at(cdf, depths) if q > 0]


def thresholds_at(levels: Tensor, depths: Sequence[float]) -> list[float]:
    """Thresholds at which the mean depth of N positions is about each of `depths`.

    Args:
        levels: (N, T - 1), after each loop but the last the level that a threshold has to exceed for the position to
            go on; not falling along a row, -inf where nothing stops it.

    Returns:
        Ascending finite thresholds, without repetition, each half-way between two neighbouring levels where it can be:
        rounding of another pass then moves no position over it.
    """
    # a position goes on after every loop whose level is below, so the mean depth is 1 + (number of those) / N
    ordered = levels.flatten().double().sort().values
    below = [min(max(round((depth - 1) * len(levels)), 0), len(ordered) - 1) for depth in depths]
    highs = ordered[below].unique()
    highs = highs[highs.isfinite()]
    before = torch.searchsorted(ordered, highs) - 1  # the last level that is smaller, where there is one
    lows = torch.where(before >= 0, ordered[before.clamp(min=0)], highs)
    return torch.where(lows.isfinite(), (lows + highs) / 2, highs).tolist()


@torch.no_grad()
def frontier(
    model: OuroForCausalLM,
    batches: Batches,
    curves: Mapping[str, Curve],
    *,
    loops: int | None = None,
    seed: int = 0,
) -> Frontier:
    """Score static depths and every setting of every curve on the same windows, and compare them.

    Every curve is compared with static depth and every later one with the first, at each half loop both reach. The
    intervals are of one comparison each, not corrected for their number.

    Args:
        model: run in eval mode under the caller's autocast; its mode and its gate are given back.
        batches: `input_ids`, `labels` (already shifted, -100 is ignored) and `position_ids`, each (B, S); a row is a
            window, what the bootstrap draws. Rows without a target count for nothing.
        loops: the most; `total_ut_steps` by default.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two windows with a target, or what `forward` refuses.
    """
    most = loops or model.config.total_ut_steps
    passes = [(name, curve.gate, rule) for name, curve in curves.items() for rule in curve.rules]
    with lent_gate(model) as own, Progress(len(passes) + 1, "frontier") as bar:
        scored: ScoredWindows = {STATIC: _static(model, batches, most), **{name: [] for name in curves}}
        for done, (name, gate, rule) in enumerate(passes, start=2):
            model.model.early_exit_gate.load_state_dict(own if gate is None else gate)
            sums = np.concatenate([_frozen(model, batch, rule, most) for batch in batches])
            scored[name].append((_setting(rule), sums))
            tokens, nats, depth = sums.sum(0)
            bar.update(done, int(done * tokens), nats / tokens, depth / tokens)
    return summarise(scored, seed)


def _static(model: OuroForCausalLM, batches: Batches, loops: int) -> list[tuple[float, _Sums]]:
    """Depths 1..loops from one pass a batch."""
    parts: list[list[_Sums]] = [[] for _ in range(loops)]
    for batch in batches:
        out, tokens = _forward(model, batch, num_loop_steps=loops)
        assert out.token_losses is not None
        for loop in range(1, loops + 1):
            nats = out.token_losses[..., loop - 1].double().sum(1)
            parts[loop - 1].append(torch.stack((tokens, nats, tokens * loop), dim=1).cpu().numpy())
    return [(float(loop), np.concatenate(part)) for loop, part in enumerate(parts, start=1)]


def _frozen(model: OuroForCausalLM, batch: Mapping[str, Tensor], rule: ExitRule, loops: int) -> _Sums:
    """Tokens, nats and loops of each row under a rule that stops positions for good, (B, 3)."""
    out, tokens = _forward(model, batch, num_loop_steps=loops, exit_mode="freeze", exit_rule=rule)
    assert out.token_losses is not None and out.exit_depths is not None
    targets = batch["labels"].to(model.device) != IGNORED
    depths = (out.exit_depths * targets).double().sum(1)
    return torch.stack((tokens, out.token_losses.double().sum(1), depths), dim=1).cpu().numpy()


def _forward(model: OuroForCausalLM, batch: Mapping[str, Tensor], **how: Any) -> tuple[OuroCausalLMOutput, Tensor]:
    """A pass without logits, and the target tokens of each row (B,) fp64."""
    ids, places, labels = (batch[name].to(model.device) for name in ("input_ids", "position_ids", "labels"))
    out = model(ids, position_ids=places, shift_labels=labels, skip_logits=True, **how)
    return out, (labels != IGNORED).double().sum(1)


def _setting(rule: ExitRule) -> float:
    """The number that a curve varies."""
    if isinstance(rule, QExit | Confidence):
        return float(rule.threshold)
    if isinstance(rule, StateDifference):
        return float(rule.epsilon)
    raise ValueError(f"{type(rule).__name__} has no setting to vary; use QExit, Confidence or StateDifference")


def summarise(scored: ScoredWindows, seed: int) -> Frontier:
    """Points, intervals and comparisons from the tokens, nats and loops of every window (W, 3) of every setting.

    Raises:
        ValueError: fewer than two windows with a target.
    """
    first = scored[STATIC][0][1]
    kept = first[:, 0] > 0
    windows, tokens = int(kept.sum()), int(first[:, 0].sum())
    weights = resampled(windows, seed)
    lines = {
        name: np.stack([_means(weights @ sums[kept]) for _, sums in settings], axis=-1)
        for name, settings in scored.items()
        if settings
    }
    full = lines[STATIC][1, :, -1]
    curves = {
        name: [_point(scored[name][i][0], line[..., i], full) for i in range(line.shape[-1])]
        for name, line in lines.items()
    }
    others = [name for name in lines if name != STATIC]
    pairs = [(name, STATIC) for name in others] + [(name, others[0]) for name in others[1:]]
    comparisons = [c for name, baseline in pairs for c in _compared(name, baseline, lines)]
    return Frontier(curves, comparisons, windows, tokens)


def _means(sums: _Sums) -> _Sums:
    """Mean loops and mean loss (2, 1 + R) of sums (1 + R, 3)."""
    tokens, nats, loops = sums.T
    return np.stack((loops / tokens, nats / tokens))


def _point(setting: float, drawn: _Sums, full: _Sums) -> Point:
    """The point of means (2, 1 + R), the first of which is the sample's own; `full` is the loss at full depth."""
    loops, loss, above = ((float(x[0]), interval(x[1:])) for x in (*drawn, drawn[1] - full))
    return Point(setting, *loops, *loss, *above)


def _compared_depths(most: float) -> list[float]:
    """Every half loop between 1 and `most`."""
    return np.arange(1 + SPACING, most, SPACING).tolist()


def _compared(curve: str, baseline: str, lines: Mapping[str, _Sums]) -> list[Comparison]:
    """Differences at every half loop that both curves reach, but for the ends 1 and T, where all rules are the same."""
    pair, found = (lines[curve], lines[baseline]), []
    for loops in _compared_depths(lines[STATIC][0, 0].max()):
        if not all(line[0, 0].min() <= loops <= line[0, 0].max() for line in pair):
            continue
        ours, theirs = (np.array([loss_at(loops, *drawn) for drawn in line.transpose(1, 0, 2)]) for line in pair)
        difference = ours - theirs
        found.append(Comparison(curve, baseline, loops, float(difference[0]), interval(difference[1:])))
    return found


def loss_at(loops: float, depths: _Sums, losses: _Sums) -> float:
    """Loss at a mean depth between the points (P,) of a curve, linear; the nearest end outside them."""
    order = np.argsort(depths, kind="stable")
    return float(np.interp(loops, depths[order], losses[order]))


def _shown(value: float, interval: Interval, digits: int, sign: str = "") -> str:
    low, high = (f"{end:{sign}.{digits}f}" for end in interval)
    return f"{value:{sign}.{digits}f} ({low} to {high})"

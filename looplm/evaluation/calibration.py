"""Fitting the threshold of every exit rule on held-out text, under `freeze` (what generation does to positions).

Two targets. `mean-loops=D`: the setting whose mean depth on the calibration half is D, between two settings that were
run by linear interpolation, then run itself. `loss-increase=P%`: the most economical setting for which, with
probability at least 1 - delta over the calibration text, the expected loss is at most (1 + P/100) of that at full
depth; see `looplm.evaluation.risk` for the theorem and the bound. The increase of a window is
x = l - (1 + P/100) l_full, in nats a token, so nothing has to be known about l_full.

The other half of the text, which no setting was chosen on, tells what came of it: teacher-forced (the text's own
tokens) and free-running (what the model writes by itself behind the text's beginnings, temperature 1; the first new
token is read off the prompt at full depth and left out). Free-running depth may differ: the text is another one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from looplm.evaluation.costs import TokenCosts, measure_costs
from looplm.evaluation.depths import Depth, parse_rule
from looplm.evaluation.risk import CUT, passed
from looplm.evaluation.rules import GATE, plain_pass, reads_every_loop
from looplm.evaluation.scoring import Request, score
from looplm.evaluation.tables import Table
from looplm.evaluation.texts import TextWindows
from looplm.model.modeling import OuroForCausalLM
from looplm.training.bootstrap import interval, resampled
from looplm.training.charts import frontier_chart

Numbers = NDArray[np.float64]
Report = Callable[[str, float], None]

FEWEST_WINDOWS = 20
"""Windows of the calibration half, at least: fewer carry no bound worth having."""

FREE_TEXTS, FREE_TOKENS = 16, 48
"""Free-running texts, and new tokens of each."""


@dataclass(frozen=True)
class Target:
    """What is asked for: `mean-loops` (loops) or `loss-increase` (a share, 0.005 for half a percent)."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"mean-loops={self.value:g}" if self.kind == "mean-loops" else f"loss-increase={100 * self.value:g}%"


def parse_target(written: str, loops: int) -> Target:
    """A target from how it is written.

    Raises:
        ValueError: anything but mean-loops=D with D in (1, T), or loss-increase=P% with P above 0.
    """
    kind, _, value = written.partition("=")
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = float("nan")
    if kind == "mean-loops" and 1 < number < loops and not value.endswith("%"):
        return Target(kind, number)
    if kind == "loss-increase" and 0 < number < 1:
        return Target(kind, number)
    raise ValueError(
        f"target is {written!r}; give mean-loops=D with D between 1 and {loops}, or loss-increase=P% with P above 0"
    )


@dataclass(frozen=True)
class Measured:
    """One setting on windows of text: per-window nats a token (W,), and mean depth over all tokens."""

    setting: float
    losses: Numbers
    depth: float


@dataclass(frozen=True)
class RuleCalibration:
    """One rule.

    Attributes:
        setting: chosen; None where none can be, `why` says so.
        table: [mean depth, setting] of everything that was run, ascending in depth, full depth included for the gate.
        curve: the same runs on the calibration half: `setting`, `loops` and nats a token `above_full` depth with its
            95 % interval over windows, ascending in loops.
        depth, increase, increase_interval: teacher-forced, on the other half: mean loops, and the loss over that of
            full depth less 1, with its 95 % interval over windows.
        free_depth: mean loops of new tokens.
        saved: share of a token's time, from the measured costs at `free_depth`.
        cut_windows: share of the calibration windows whose increase at the chosen setting was cut.
    """

    rule: str
    setting: float | None
    table: list[list[float]]
    why: str = ""
    depth: float | None = None
    increase: float | None = None
    increase_interval: tuple[float, float] | None = None
    increase_nats: float | None = None
    free_depth: float | None = None
    saved: float | None = None
    cut_windows: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Calibration:
    """All rules, and what they were fitted on."""

    target: str
    delta: float
    loops: int
    window: int
    data: str
    calibration_windows: int
    test_windows: int
    full_loss: float
    cost_shares: dict[str, float]
    rules: dict[str, RuleCalibration] = field(default_factory=dict)

    def tabulate(self) -> Table:
        """A row a rule."""
        header = ("rule", "setting", "loops on test text", "loss increase", "loops free-running", "time saved")
        rows = [_cells(rule) for rule in self.rules.values()]
        shares = self.cost_shares
        notes = [
            f"{self.calibration_windows} windows of {self.window} tokens of {self.data} to choose on, another "
            f"{self.test_windows} to test on; the loss at full depth is {self.full_loss:.4f} nats a token there.",
            f"A token's time at full depth: {shares['loop']:.0%} each loop, {shares['head']:.0%} the head, "
            f"{shares['rest']:.0%} the rest, on this machine.",
        ]
        if self.target.startswith("loss"):
            sure = 1 - self.delta
            notes.append(
                f"With probability {sure:g} over the calibration text the expected increase is within the target."
            )
        cut = max((rule.cut_windows for rule in self.rules.values()), default=0.0)
        if cut:
            notes.append(f"Increases beyond {CUT} nats a token were cut, in up to {cut:.1%} of the windows of a rule.")
        return Table(f"calibrated for {self.target}", header, tuple(rows), tuple(notes))

    def chart(self) -> str:
        """Loss above full depth against mean loops: every setting on the calibration half; the choice, ringed, on the
        test half."""
        full = {"setting": self.loops, "loops": self.loops, "above_full": 0.0, "above_full_interval": (0.0, 0.0)}
        lines = {rule.rule: rule.curve for rule in self.rules.values() if rule.curve}
        ring = calibrated_point(asdict(self)["rules"].values(), self.target)
        return frontier_chart({"full depth": [full], **lines}, marked=ring) if lines else ""


def calibrated_point(rules: Iterable[Mapping[str, Any]], target: str) -> dict[str, Any] | None:
    """The point of the first rule that has a setting, the gate's first, as a chart marks it; None without one.

    Args:
        rules: the fields of `RuleCalibration`, as they stand in a result file.
    """
    for rule in sorted(rules, key=lambda rule: rule["rule"] != GATE):
        if rule["setting"] is not None:
            label = f"calibrated for {target}: {rule['rule']}={rule['setting']:.3g}"
            return {"loops": rule["depth"], "above_full": rule["increase_nats"], "label": label}
    return None


def _cells(rule: RuleCalibration) -> tuple[str, ...]:
    if rule.setting is None or rule.depth is None or rule.increase is None or rule.increase_interval is None:
        return (rule.rule, f"none: {rule.why}", "", "", "", "")
    low, high = rule.increase_interval
    return (
        rule.rule,
        f"{rule.setting:.4g}",
        f"{rule.depth:.2f}",
        f"{rule.increase:+.2%} [{low:+.2%}, {high:+.2%}]",
        f"{rule.free_depth:.2f}",
        f"{rule.saved:.0%}",
    )


def calibrate_rules(
    model: OuroForCausalLM,
    windows: TextWindows,
    target: Target,
    rules: Sequence[str],
    *,
    settings: int,
    delta: float,
    batch_size: int,
    seed: int = 0,
    report: Report = lambda what, share: None,
) -> Calibration:
    """Fit every rule on the first half of the windows, and measure it on the second.

    Args:
        rules: names that `looplm.evaluation.rules.check_rules` has accepted.
        settings: of each rule, spread over the depths between 1 and T.
        delta: how often the bound of `loss-increase` may fail.

    Raises:
        ValueError: too few windows.
    """
    first, second = windows.halves()
    fit, test = first.requests, second.requests
    if len(fit) < FEWEST_WINDOWS:
        raise ValueError(
            f"{len(fit)} windows of {windows.length} tokens to calibrate on; it takes {FEWEST_WINDOWS} or more: give "
            "more text or a shorter window"
        )
    report("measuring costs", 0.0)
    most = model.config.total_ut_steps
    costs = measure_costs(model, fit[0][1][: min(64, windows.length)])
    plain = plain_pass(model, fit, rules, lambda share: report("looking at every loop", share))
    aims = np.linspace(1, most, settings + 2)[1:-1].tolist()
    full_fit, full_test = (_run(model, part, Depth(most), most, batch_size) for part in (fit, test))
    fitting = _Fitting(model, fit, test, full_fit, full_test, target, delta, costs, batch_size, seed)
    found = {}
    for number, name in enumerate(rules):
        report(f"calibrating {name}", number / len(rules))
        found[name] = fitting.fit_rule(name, plain.settings(name, aims))
    return Calibration(
        target=str(target),
        delta=delta,
        loops=most,
        window=windows.length,
        data=windows.name,
        calibration_windows=len(fit),
        test_windows=len(test),
        full_loss=float(full_test.losses.mean()),
        cost_shares=costs.shares(),
        rules=found,
    )


@dataclass(frozen=True)
class _Fitting:
    """What fitting one rule needs: the model, both halves with what full depth does on them, and the target."""

    model: OuroForCausalLM
    fit: Sequence[Request]
    test: Sequence[Request]
    full_fit: Measured
    full_test: Measured
    target: Target
    delta: float
    costs: TokenCosts
    batch_size: int
    seed: int

    def fit_rule(self, rule: str, settings: Sequence[float]) -> RuleCalibration:
        """Try the settings on the first half, choose, and measure the choice on the second."""
        tried = [self._try(rule, setting, self.fit) for setting in settings]
        if self.target.kind == "mean-loops":
            setting, why = choose_by_depth(self.target.value, tried)
        else:
            setting, why = choose_by_loss(self.target.value, tried, self.full_fit, self.delta)
        if setting is not None and setting not in [run.setting for run in tried]:
            tried.append(self._try(rule, setting, self.fit))
        full = [[float(self.costs.loops), 1.0]] if rule == GATE else []
        table = sorted([[run.depth, run.setting] for run in tried] + full)
        curve = sorted((self._point(run) for run in tried), key=lambda point: point["loops"])
        result = RuleCalibration(rule, setting, table, why, curve=curve)
        return result if setting is None else self._told(result, setting, tried)

    def _try(self, rule: str, setting: float, requests: Sequence[Request]) -> Measured:
        depth = Depth.of_rule(f"{rule}={setting!r}", self.costs.loops, "freeze", "adaptive")
        return _run(self.model, requests, depth, setting, self.batch_size)

    def _point(self, run: Measured) -> dict[str, Any]:
        """A setting on the calibration half, as a chart takes it."""
        draws = resampled(len(self.fit), self.seed) @ (run.losses - self.full_fit.losses) / len(self.fit)
        above = {"above_full": float(draws[0]), "above_full_interval": interval(draws[1:])}
        return {"setting": run.setting, "loops": run.depth, **above}

    def _told(self, result: RuleCalibration, setting: float, tried: Sequence[Measured]) -> RuleCalibration:
        """What the chosen setting does on the other half."""
        run = self._try(result.rule, setting, self.test)
        weights = resampled(len(self.test), self.seed)
        ratio = (weights @ run.losses) / (weights @ self.full_test.losses) - 1
        fitted = next(each for each in tried if each.setting == setting)
        free = free_depth(self.model, self.test, result.rule, setting, self.seed)
        return replace(
            result,
            depth=run.depth,
            increase=float(ratio[0]),
            increase_interval=interval(ratio[1:]),
            increase_nats=float((run.losses - self.full_test.losses).mean()),
            free_depth=free,
            saved=self.costs.saved(free, free if reads_every_loop(result.rule) else 1.0),
            cut_windows=float((np.abs(fitted.losses - self.full_fit.losses) > CUT).mean()),
        )


def _run(
    model: OuroForCausalLM, requests: Sequence[Request], depth: Depth, setting: float, batch_size: int
) -> Measured:
    """Score windows of equal length at one depth."""
    scores = score(model, requests, [depth], batch_size=batch_size)
    losses = np.array([-float(scored.log_probabilities.double().mean()) for scored in scores.requests])
    return Measured(float(setting), losses, float(scores.mean_read_depth[0]))


def choose_by_depth(value: float, tried: Sequence[Measured]) -> tuple[float | None, str]:
    """The setting of a mean depth, between those that were run; or None, and why."""
    points = sorted((run.depth, run.setting) for run in tried)
    if len(points) < 2:
        return None, "the rule does not tell positions apart"
    depths, settings = zip(*points, strict=True)
    if not depths[0] <= value <= depths[-1]:
        return None, f"its settings reach {depths[0]:.2f} to {depths[-1]:.2f} loops only"
    return float(np.interp(value, depths, settings)), ""


def choose_by_loss(value: float, tried: Sequence[Measured], full: Measured, delta: float) -> tuple[float | None, str]:
    """The most economical setting that passes, from the deepest down; or None, and why."""
    ordered = sorted(tried, key=lambda run: -run.depth)
    count = passed([run.losses - (1 + value) * full.losses for run in ordered], delta)
    if not count:
        return None, "no setting passes: stay at full depth, or give more text or a larger increase"
    return ordered[count - 1].setting, ""


def free_depth(model: OuroForCausalLM, windows: Sequence[Request], rule: str, setting: float, seed: int) -> float:
    """Mean loops of what the model writes behind the first halves of some windows, without the first tokens."""
    step = max(len(windows) // FREE_TEXTS, 1)
    texts = torch.tensor([context + target for context, target in windows[::step][:FREE_TEXTS]], device=model.device)
    ids = texts[:, : texts.shape[1] // 2]
    room = min(FREE_TOKENS, model.config.max_position_embeddings - ids.shape[1])
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(max_new_tokens=max(room, 2), do_sample=True, top_k=0),
        exit_rule=parse_rule(f"{rule}={setting!r}"),
        return_dict_in_generate=True,
    )
    return float(out.exit_depths[:, 1:].double().mean())

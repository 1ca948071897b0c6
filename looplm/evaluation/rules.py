"""The exit rules that have one number to vary: what each looks at, what it pays for looking, and at which setting it
reaches a depth.

    q                CDF(t) >= q                         the paper's Q-exit (3.2); no read-out before the exit
    difference       ||h_t - h_{t-1}||_2 < epsilon       Figure 5; cannot fire before loop 2
    max_probability  max p_t >= threshold                }
    entropy          H(p_t) <= threshold (nats)          } one vocabulary product a loop
    kl               KL(p_t || p_{t-1}) <= threshold     } cannot fire before loop 2

`plain_pass` gives for every rule, after every loop but the last, the level that its threshold has to pass for a
position to go on: from one plain pass the mean depth of any threshold is read off (`PlainPass.settings`). Levels never
fall along a row: a rule that has fired has fired.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.evaluation.scoring import Request
from looplm.exits import entropy, exit_cdf
from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM
from looplm.model.readout import LoopRun, divergence, run_loops
from looplm.training.frontier import thresholds_at

GATE = "q"
"""The rule that asks the gate, and that `depth_budget` steers."""

NAMES = (GATE, "difference", "max_probability", "entropy", "kl")
"""Every rule that has one number to vary, as `parse_rule` writes it."""

FALLING = ("difference", "entropy", "kl")
"""Rules that fire *below* their threshold: their levels are the negated measure."""


def reads_every_loop(name: str) -> bool:
    """Whether the rule pays a vocabulary product in every loop, and not only at the exit."""
    return name in ("max_probability", "entropy", "kl")


def check_rules(names: Sequence[str], config: OuroConfig) -> None:
    """Refuse rules that this model cannot run while positions freeze.

    Raises:
        ValueError: an unknown or repeated rule, one loop only, a model without a gate for each token, or confidence
            behind a coda.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"rule {name!r} is not known; there are {', '.join(NAMES)}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"rules are {', '.join(names) or 'empty'}; name at least one, and each once")
    if config.total_ut_steps < 2:
        raise ValueError(f"the model has {config.total_ut_steps} loop: there is nothing to leave early")
    if config.exit_gate_pooling != "token" and GATE in names:
        raise ValueError(
            f"the model has no gate for each token (exit_gate_pooling is {config.exit_gate_pooling!r}), so it has no "
            f"gate exits; leave {GATE} out"
        )
    reading = [name for name in names if reads_every_loop(name)]
    if config.num_coda_layers and reading:
        raise ValueError(
            f"{', '.join(reading)} read the coda's output, which has no parallel form while positions freeze; this "
            f"model has {config.num_coda_layers} coda layers: leave them out"
        )


def rules_for(config: OuroConfig) -> list[str]:
    """All rules that the model can run while positions freeze."""
    names = [name for name in NAMES if not (config.num_coda_layers and reads_every_loop(name))]
    return [name for name in names if name != GATE or config.exit_gate_pooling == "token"]


@dataclass(frozen=True)
class PlainPass:
    """What one pass at full depth, in which nothing is frozen, shows at N read positions.

    Attributes:
        predictions: (N, T) int64, the likeliest token after every loop.
        levels: by rule (N, T - 1) fp32 (see the module).
    """

    predictions: Tensor
    levels: dict[str, Tensor]

    def settings(self, name: str, depths: Sequence[float]) -> list[float]:
        """Settings of a rule with about these mean depths over the read positions, shallow ones first, no two equal."""
        found = thresholds_at(self.levels[name], depths)
        settings = [-level for level in found] if name in FALLING else found
        return [setting for setting in settings if setting > 0]


@torch.no_grad()
def plain_pass(
    model: OuroForCausalLM,
    requests: Sequence[Request],
    names: Sequence[str],
    report: Callable[[float], None] | None = None,
) -> PlainPass:
    """Run every request by itself, and keep what the rules compare at the positions that are read.

    Args:
        names: the rules whose levels are wanted.
        report: called with the share that is done.
    """
    predictions: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for number, (context, target) in enumerate(requests, start=1):
        run = run_loops(model, torch.tensor([(context + target)[:-1]]))
        read = slice(len(context) - 1, None)
        predictions.append(_predictions(run)[read].cpu())
        for name, level in _levels(run, names).items():
            parts[name].append(level[read].cpu())
        if report is not None:
            report(number / len(requests))
    return PlainPass(torch.cat(predictions), {n: torch.cat(level).cummax(1).values for n, level in parts.items()})


def _predictions(run: LoopRun) -> Tensor:
    """The likeliest token after every loop, (S, T)."""
    loops = range(1, len(run.reads) + 1)
    chunks = ([run.log_probabilities(loop, part).argmax(-1) for loop in loops] for part in run.chunks())
    return torch.cat([torch.stack(chunk, dim=1) for chunk in chunks])


def _levels(run: LoopRun, names: Sequence[str]) -> dict[str, Tensor]:
    """What each rule compares, higher meaning nearer to an exit, at every position (B S, T - 1)."""
    found: dict[str, Tensor] = {}
    if GATE in names:
        found[GATE] = exit_cdf(run.gate_logits).flatten(0, 1)[:, :-1]
    if "difference" in names:
        pairs = zip(run.states[:-2], run.states[1:-1], strict=True)  # the last loop's change stops nobody
        moved = [(after.float() - before.float()).norm(dim=-1).flatten() for before, after in pairs]
        found["difference"] = _from_loop_2(moved, run.gate_logits[..., 0].flatten())
    reading = [name for name in names if reads_every_loop(name)]
    if reading:
        chunks = [_confidence(run, part) for part in run.chunks()]
        found |= {name: torch.cat([chunk[name] for chunk in chunks]) for name in reading}
    return found


def _confidence(run: LoopRun, part: slice) -> dict[str, Tensor]:
    """The levels of the three confidence rules at some of the flattened positions, (n, T - 1)."""
    largest, spread, change = [], [], []
    previous = None
    for loop in range(1, len(run.reads)):
        log_p = run.log_probabilities(loop, part)
        largest.append(log_p.amax(-1).exp())
        spread.append(-entropy(log_p))
        if previous is not None:
            change.append(divergence(log_p, previous))
        previous = log_p
    found = {"max_probability": torch.stack(largest, 1), "entropy": torch.stack(spread, 1)}
    return {**found, "kl": _from_loop_2(change, largest[0])}


def _from_loop_2(measures: Sequence[Tensor], first: Tensor) -> Tensor:
    """Negated measures of loops 2..T-1 behind a loop 1 at which nothing fires, (n, T - 1); `first` (n,) is any."""
    return torch.stack([torch.full_like(first, -torch.inf), *(-measure for measure in measures)], dim=1)

"""Depth arguments, gathered once: `DepthOptions` says how deep the tokens of a generation go, `DepthSession` runs one.

Full depth is `max_loops`, else `num_loop_steps`, else the trained `total_ut_steps`. Prompts run to full depth (Ouro
Table 14: sharing keys during prefill costs ten points), or each position by its own rule (`prefill="adaptive"`).
A depth belongs to the position whose state is read, so under a full-depth prompt the first new token is read at full
depth. `depth_budget` is ours: an integral controller on the Q-exit threshold, which begins where a calibration of the
model says (`looplm.model.calibration`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from looplm.exits import ExitRule, FixedDepth, QExit, check_rows
from looplm.model.cache import KV_POLICIES, KVPolicy
from looplm.model.calibration import UNCALIBRATED

if TYPE_CHECKING:
    from looplm.model.cache import LoopCache
    from looplm.model.configuration import OuroConfig
    from looplm.model.context import PassContext
    from looplm.model.outputs import OuroCausalLMOutput

BUDGET_GAIN = 0.2
"""Threshold per loop that a row has under-spent: after n tokens its mean is within about 1 / (BUDGET_GAIN n) loops."""


def budget_threshold(spare: Tensor, start: float | Tensor = UNCALIBRATED) -> Tensor:
    """The Q-exit threshold of rows that have spent `spare` loops less than their budget, and began with `start`."""
    return (start + BUDGET_GAIN * spare).clamp(1e-3, 1.0)


@dataclass(frozen=True)
class DepthOptions:
    """How deep the tokens of one generation go; values are numbers or (B,) with one a row.

    Attributes:
        rule: when a position stops; None runs to full depth.
        budget: mean depth to steer a Q-exit threshold to, in loops; excludes `rule`.
        min_loops, max_loops: limits; `max_loops` is full depth.
        prefill: `full`, or `adaptive`: prompt positions freeze by the rule too.
        kv_policy: what a position offers to later ones (see `looplm.model.cache`).
        budget_start: the threshold that a budget begins with.
    """

    rule: ExitRule | None = None
    budget: float | Tensor | None = None
    min_loops: int | Tensor = 1
    max_loops: int | Tensor = 4
    prefill: Literal["full", "adaptive"] = "full"
    kv_policy: KVPolicy = "per_loop"
    budget_start: float | Tensor = UNCALIBRATED

    def __post_init__(self) -> None:
        for name in ("budget", "min_loops", "max_loops"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and not value.ndim:
                object.__setattr__(self, name, value.item())
        least, most = torch.as_tensor(self.min_loops), torch.as_tensor(self.max_loops)
        if bool((most < 1).any()):
            raise ValueError(f"max_loops (or num_loop_steps) is {self.max_loops}; it must be at least 1")
        if bool(((least < 1) | (least > most)).any()):
            raise ValueError(f"min_loops is {self.min_loops}; it must lie in 1..max_loops = {self.max_loops}")
        if self.budget is not None:
            budget = torch.as_tensor(self.budget, dtype=torch.float64)
            if not bool(((budget >= least) & (budget <= most)).all()):
                limits = f"{self.min_loops}..{self.max_loops}"
                raise ValueError(f"depth_budget is {self.budget}; it must lie in min_loops..max_loops = {limits}")
        if self.prefill not in ("full", "adaptive"):
            raise ValueError(f"prefill is {self.prefill!r}; it must be full or adaptive")
        if self.kv_policy not in KV_POLICIES:
            raise ValueError(f"kv_policy is {self.kv_policy!r}; it must be one of {', '.join(KV_POLICIES)}")
        if self.prefill == "adaptive" and not self.adaptive:
            raise ValueError(
                "prefill is 'adaptive', but no exit rule is given; pass exit_threshold, exit_rule or depth_budget"
            )

    def check_rows(self, batch: int) -> None:
        """Refuse values one a row that do not fit the batch.

        Raises:
            ValueError: a tensor with other than `batch` values.
        """
        if self.rule is not None:
            check_rows(self.rule, batch)
        given = {"depth_budget": self.budget, "min_loops": self.min_loops, "max_loops": self.max_loops}
        for name, value in given.items():
            if isinstance(value, Tensor) and value.shape != (batch,):
                shape = "x".join(map(str, value.shape))
                raise ValueError(f"{name} has {shape} values; the batch has {batch} rows")

    @property
    def adaptive(self) -> bool:
        """Whether positions may stop before full depth."""
        return self.rule is not None or self.budget is not None

    @property
    def num_loops(self) -> int:
        """T of the generation: the deepest row's full depth."""
        return int(torch.as_tensor(self.max_loops).max())

    @classmethod
    def gather(
        cls,
        config: OuroConfig,
        *,
        adaptive_loop: bool | None = None,
        num_loop_steps: int | Tensor | None = None,
        exit_threshold: float | Tensor | None = None,
        exit_rule: ExitRule | None = None,
        depth_budget: float | Tensor | None = None,
        min_loops: int | Tensor = 1,
        max_loops: int | Tensor | None = None,
        prefill: Literal["full", "adaptive"] = "full",
        kv_policy: KVPolicy = "per_loop",
        budget_start: float | Tensor = UNCALIBRATED,
    ) -> DepthOptions:
        """Options from the arguments of `generate`.

        Raises:
            ValueError: contradicting arguments, values out of range, or a gate that cannot run token by token.
        """
        given = {"exit_threshold": exit_threshold, "exit_rule": exit_rule, "depth_budget": depth_budget}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are both given; pass one of them")
        if adaptive_loop is False and names:
            raise ValueError(f"adaptive_loop is False, but {names[0]} is given; drop one of them")
        rule = QExit(exit_threshold) if exit_threshold is not None else exit_rule
        if not names and adaptive_loop is not False and (adaptive_loop or config.early_exit_threshold < 1):
            rule = QExit(config.early_exit_threshold)
        if (rule is not None or depth_budget is not None) and config.exit_gate_pooling != "token":
            raise ValueError("exit_gate_pooling is 'causal_mean': adaptive decoding needs 'token'; use num_loop_steps")
        full = num_loop_steps if max_loops is None else max_loops
        full = config.total_ut_steps if full is None else full
        return cls(rule, depth_budget, min_loops, full, prefill, kv_policy, budget_start)


@dataclass
class DepthSession:
    """One call of `generate`: its options, where its prompt ends, which rows have ended, and what it has recorded."""

    options: DepthOptions
    prompt_end: int
    eos_token_id: int | list[int] | None = None
    one_token_a_pass: bool = True
    cache: LoopCache | None = None
    ended: Tensor | None = None
    errors: dict[int, str] = field(default_factory=dict)
    steps: list[tuple[Tensor, ...]] = field(default_factory=list)

    def decodes(self, context: PassContext) -> bool:
        """Whether this pass is one new token behind the prompt (a prompt's last chunk may be one token long too)."""
        return self.one_token_a_pass and context.cache is not None and context.past_length >= self.prompt_end

    @property
    def freezes_prompt(self) -> bool:
        """Whether prompt positions stop on their own: by the rule, or at their row's own full depth."""
        return self.options.prefill == "adaptive" or isinstance(self.options.max_loops, Tensor)

    def rule(self) -> ExitRule:
        """The rule of the next token; under a budget its threshold follows what each row has spent so far."""
        options = self.options
        if options.budget is None:
            return options.rule if options.rule is not None else FixedDepth(options.max_loops)
        if not self.steps:
            return QExit(options.budget_start)
        spent = torch.cat([depths for depths, *_ in self.steps], dim=1).cpu()
        budget = torch.as_tensor(options.budget, dtype=torch.float64).cpu().reshape(-1, 1)
        spare = ((budget - spent) * (spent > 0)).sum(1)
        start = options.budget_start
        return QExit(budget_threshold(spare, start.cpu() if isinstance(start, Tensor) else start))

    def prompt_rule(self) -> ExitRule:
        """The rule of prompt positions in a freezing prefill."""
        return self.rule() if self.options.prefill == "adaptive" else FixedDepth(self.options.max_loops)

    def limits(self, rows: Tensor) -> tuple[int | Tensor, int | Tensor]:
        """Least and most loops of the given rows."""
        least, most = self.options.min_loops, self.options.max_loops
        return tuple(x.to(rows.device)[rows] if isinstance(x, Tensor) and x.ndim else x for x in (least, most))  # type: ignore[return-value]

    def running(self, batch: int, device: torch.device) -> Tensor:
        """(B,) bool: the rows that have not ended."""
        return torch.ones(batch, dtype=torch.bool, device=device) if self.ended is None else ~self.ended.to(device)

    def end(self, rows: Tensor) -> None:
        """Rows (B,) bool that the stopping criteria have ended."""
        self.ended = rows.bool() if self.ended is None else self.ended | rows.bool()

    def guard(self, output: OuroCausalLMOutput, context: PassContext, finite: Tensor) -> None:
        """End rows whose gate (`finite` (B,) False) or next-token logits are not finite, each with its own error."""
        assert output.logits is not None
        good = finite & output.logits[:, -1].isfinite().all(-1)
        if not self.one_token_a_pass or bool(good.all()):
            return
        for row in (~good).nonzero()[:, 0].tolist():
            place = context.past_length + context.length - 1
            what = "logits are" if bool(finite[row]) else "exit gate is"
            self.errors.setdefault(row, f"row {row}: the {what} not finite at position {place}; check the weights")
        self.end(~good)
        ends = torch.as_tensor(0 if self.eos_token_id is None else self.eos_token_id).reshape(-1)
        output.logits[~good] = 0.0
        output.logits[~good, :, ends[0]] = 1e4

    def record(self, output: OuroCausalLMOutput) -> None:
        """Keep what the newest token was read at."""
        if output.exit_depths is None:
            return
        parts = (output.exit_depths, output.exit_probabilities, output.survival)
        self.steps.append(tuple(part[:, -1:] for part in parts if part is not None))

    def recorded(self, new: Tensor) -> dict[str, Tensor]:
        """What the result of `generate` holds beside transformers' fields, for new tokens (B, N)."""
        number = new.shape[1]  # transformers may run on past the end
        depths = torch.cat([step[0] for step in self.steps], dim=1).to(new.device)[:, :number]
        if not self.one_token_a_pass:  # beams and drafts: full depth, the same for every token
            return {"exit_depths": self._until_end(torch.full_like(new, int(depths.max())), new)}
        depths = self._until_end(depths, new)
        found = {"exit_depths": depths, "reached_depth": depths.sum(1) / (depths > 0).sum(1).clamp(min=1)}
        if all(len(step) == 3 for step in self.steps):
            found["exit_probabilities"] = torch.cat([step[1] for step in self.steps], dim=1)[:, :number]
            found["survival"] = torch.cat([step[2] for step in self.steps], dim=1)[:, :number]
        if self.cache is not None and self.cache.depths is not None:
            found["position_depths"] = self.cache.depths[:, : self.prompt_end + number - 1]
        return found

    def _until_end(self, depths: Tensor, new: Tensor) -> Tensor:
        """0 where a row had already ended."""
        if self.eos_token_id is None:
            return depths
        ended = torch.isin(new, torch.as_tensor(self.eos_token_id, device=new.device)).cumsum(1).roll(1, dims=1)
        ended[:, 0] = 0
        return depths.masked_fill(ended > 0, 0)

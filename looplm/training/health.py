"""Warnings that matter while a looped model trains, each said once in plain words.

Two ways in which looped models go wrong without the loss of the last loop showing it:

- the gate collapses: it stops (or goes on) for every token alike, and the loops it never reads get no gradient. Seen
  as the entropy of the exit distribution (section 3.3's reason for its entropy term), against the ln T of the uniform.
- shallow loops get worse while deep ones improve: models that are too small trade them away (appendix D.3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from looplm.training.evaluation import LoopEvaluation

COLLAPSED = 0.05
"""Part of ln T below which the gate's entropy counts as a collapse."""

RISE = 0.05
"""Nats by which the first loop's validation loss may rise above its lowest."""


@dataclass
class Health:
    """What the warnings remember; plain numbers, part of the training state.

    Attributes:
        said: the warnings given.
        entropy: running mean of the gate's entropy as a part of ln T, over about the last 20 steps.
        lowest: of the first and the last loop's validation losses, the lowest of each so far.
    """

    said: list[str] = field(default_factory=list)
    entropy: float = 1.0
    lowest: list[float] = field(default_factory=list)

    def after_step(self, record: Mapping[str, Any]) -> list[str]:
        """New warnings that a step's record gives rise to."""
        loops = len(record["exit_probabilities"])
        if loops == 1:
            return []
        self.entropy += (record["gate_entropy"] / math.log(loops) - self.entropy) / 20
        if self.entropy >= COLLAPSED:
            return []
        return self._once(
            "gate collapse",
            f"the exit gate decides alike for every token (entropy {self.entropy:.0%} of uniform, expected depth "
            f"{record['expected_depth']:.2f} of {loops} loops): loops it does not read are not trained; "
            "raise exit_beta, or exit_beta_start for a short run",
        )

    def after_evaluation(self, result: LoopEvaluation, loops: int) -> list[str]:
        """New warnings that an evaluation gives rise to."""
        first, last = result.losses[0], result.losses[loops - 1]
        lowest = self.lowest or [first, last]
        rising = loops > 1 and first > lowest[0] + RISE and last < lowest[1]
        self.lowest = [min(lowest[0], first), min(lowest[1], last)]
        if not rising:
            return []
        return self._once(
            "shallow loops",
            f"loop 1 gets worse ({lowest[0]:.3f} to {first:.3f} nats) while loop {loops} gets better: the model is "
            "small for its loops and trades shallow ones away; use fewer loops, more layers or a larger exit_beta",
        )

    def forget_losses(self) -> None:
        """At a new stage: other text, lengths or loops make other losses."""
        self.lowest = []

    def _once(self, name: str, text: str) -> list[str]:
        if name in self.said:
            return []
        self.said.append(name)
        return [text]

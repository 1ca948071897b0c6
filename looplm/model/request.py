"""What a forward pass is asked for: which state each position is read at, what is returned, and what the loss is.

`OuroForCausalLM.forward` gathers its arguments into these three and checks there what contradicts itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from looplm.exits import ExitRule, FixedDepth, QExit
from looplm.model.configuration import OuroConfig
from looplm.objectives.expected_loss import Objective
from looplm.objectives.token_losses import IGNORED


@dataclass(frozen=True)
class Reading:
    """Which state of a position meets the head.

    Attributes:
        rule, exit_at_step, threshold: the exit, in this order of precedence; `exit_at_step` is 0-based, as released.
        weighted: the states of all loops mixed by their exit probabilities, where none of the three is given.
        mode: `select`: all loops run and each position reads at its exit, which saves nothing; `freeze`: a position
            past its exit is frozen for later ones too, as in generation.
        depths: (B, S) recorded depths to replay, 0 on padding and after the end; implies `freeze`.
        min_loops: of a freezing pass, a number or (B,): hazards before it are 0, as in generation; the most loops are
            those of the pass, where the hazard is 1.
    """

    rule: ExitRule | None = None
    exit_at_step: int | None = None
    threshold: float | Tensor | None = None
    weighted: bool = False
    mode: Literal["select", "freeze"] = "select"
    depths: Tensor | None = None
    min_loops: int | Tensor = 1

    def __post_init__(self) -> None:
        if self.mode not in ("select", "freeze"):
            raise ValueError(f"exit_mode is {self.mode!r}; it must be select or freeze")
        if self.freezes and self.weighted:
            raise ValueError("use_weighted_exit mixes all loops; it goes with exit_mode='select' only")
        if self.depths is not None and self.selects:
            raise ValueError("exit_depths replays recorded depths; drop exit_rule, exit_at_step and exit_threshold")
        if not self.freezes and not (isinstance(self.min_loops, int) and self.min_loops == 1):
            raise ValueError(f"min_loops is {self.min_loops}, but goes with exit_mode='freeze' or exit_depths only")

    @property
    def selects(self) -> bool:
        """Whether an exit is asked for by name, and not left to the configuration."""
        return self.rule is not None or self.exit_at_step is not None or self.threshold is not None

    @property
    def freezes(self) -> bool:
        """Whether positions stop for good."""
        return self.mode == "freeze" or self.depths is not None

    def rule_in_force(self, config: OuroConfig, num_loops: int) -> ExitRule | None:
        """The rule by the released precedence; None reads the last loop.

        Raises:
            ValueError: `exit_at_step` (0-based) outside the loops, a threshold outside (0, 1].
        """
        if self.rule is not None:
            return self.rule
        if self.exit_at_step is not None:
            if not 0 <= self.exit_at_step < num_loops:
                raise ValueError(
                    f"exit_at_step is {self.exit_at_step}; it is 0-based and must lie in 0..{num_loops - 1}"
                )
            return FixedDepth(self.exit_at_step + 1)
        threshold = config.early_exit_threshold if self.threshold is None else self.threshold
        return None if isinstance(threshold, int | float) and threshold == 1.0 else QExit(threshold)


@dataclass(frozen=True)
class Wanted:
    """What is returned beside the loss.

    Attributes:
        logits_to_keep: the last so many positions, or indices; 0 keeps all.
        skip_logits: leave the logits out; None: while training with labels on a selecting pass.
        hidden_states: return the core's input and the state after every loop; not of a freezing pass.
    """

    logits_to_keep: int | Tensor = 0
    skip_logits: bool | None = None
    hidden_states: bool = False


@dataclass(frozen=True)
class Goal:
    """What the loss is.

    Attributes:
        targets: (B, S) already shifted, -100 is ignored; None: no loss.
        objective: `expected` (Stage I, equation 4), `last` or `mean` of the loops. A freezing pass has one loss of
            its own, the cross entropy at the exits.
        beta: weight of Stage I's entropy term; None: the configuration's.
        num_items: what the sum over tokens is divided by instead of the number of valid targets.
    """

    targets: Tensor | None = None
    objective: Objective = "expected"
    beta: float | None = None
    num_items: int | Tensor | None = None


def shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """Targets of each position (B, S): `shift_labels`, or the next label and -100 at the end."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return pad(labels[:, 1:], (0, 1), value=IGNORED)

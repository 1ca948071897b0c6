"""What recipes say about objectives, and nothing heavier: reading a recipe loads no torch."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from looplm.settings import NotNegative, Positive, Section

GateTarget = Literal["published", "lookahead"]


class GateSettings(Section):
    """Stage II: what the gate is taught, and for how long (see `looplm.training.gate`)."""

    target: GateTarget = "lookahead"
    """`lookahead`: gate t learns what loop t + 1 will gain; `published`: what loop t has gained (equation 5)."""
    k: Positive = 50.0
    """Steepness of the continuation target, per nat."""
    gamma: NotNegative = 0.005
    """Gain in nats that is worth a loop."""
    tokens: PositiveInt = 65_536
    """Target tokens whose states are kept (not in the paper)."""
    epochs: PositiveInt = 20
    """Passes over them (not in the paper)."""
    batch_size: PositiveInt = 4096
    """Tokens an optimizer step (not in the paper)."""
    learning_rate: Positive = 3e-3
    """Of Adam, falling to 0 over the fit (not in the paper)."""


class LoopRegulariserSettings(Section):
    """Draws layers `block` apart together (paper: weight 10, block 4 of 24 layers did best)."""

    block: PositiveInt
    """k, layers of the block that the stack should resemble looped; it divides the number of layers."""
    weight: Positive = 10.0
    """lambda_reg, what the term is multiplied by."""


class LoopCountSettings(Section):
    """Loops of a training step, drawn for each (see `looplm.training.loop_counts`)."""

    distribution: Literal["uniform", "poisson_lognormal"]
    least: PositiveInt = 1
    most: PositiveInt
    """Bounds memory and time of a step."""
    mean: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """Mean number of loops before it is held to the range; for poisson_lognormal only."""
    sigma: NotNegative = 0.5
    """Spread of the logarithm of the rate; for poisson_lognormal only."""

    @model_validator(mode="after")
    def _fits(self) -> "LoopCountSettings":
        if self.least > self.most:
            raise ValueError(f"least is {self.least}; it must be at most most = {self.most}")
        if (self.mean is not None) != (self.distribution == "poisson_lognormal"):
            raise ValueError("mean goes with distribution poisson_lognormal, and that needs it")
        return self

"""The state of a training run in one object: what a checkpoint holds, and nothing else has to survive.

A batch is a pure function of (seed, sample number) and the schedules are pure functions of the step, so the model's
parameters, the optimizer's moments and a few plain numbers are all.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from looplm.model.modeling import OuroForCausalLM
from looplm.training.checkpoint import Checkpoint
from looplm.training.health import Health


@dataclass
class TrainingState:
    """Everything a run needs to go on as if it had never stopped: two sets of tensors, and plain numbers.

    Samples, loop counts and schedules are pure functions of the recipe's seed and these numbers, and nothing else is
    random in a step (there is no dropout), so no generator's state is kept.

    Attributes:
        model, optimizer: trained in place; between them they hold all tensors.
        stage: number of the stage, counted from 1.
        step: optimizer steps done in it.
        first_sample: number of its first sample in its view (see `PlannedStage.view`).
        minutes: spent on it.
        evaluated: evaluations done on its way.
        tokens, source_tokens: seen by the whole run, in all and by source.
        autocast: whether products are in bf16; measured once a run where the recipe says `auto`.
        recent_losses: of the last steps, where the stage watches for spikes.
        skipped: steps of the stage whose batch is passed over, because the loss spiked there.
        health: what the warnings remember.
    """

    model: OuroForCausalLM
    optimizer: torch.optim.AdamW
    stage: int = 1
    step: int = 0
    first_sample: int = 0
    minutes: float = 0.0
    evaluated: int = 0
    tokens: int = 0
    source_tokens: dict[str, int] = field(default_factory=dict)
    autocast: bool | None = None
    recent_losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    health: Health = field(default_factory=Health)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors: `model.NAME`, and `optimizer.NAME.FIELD` for a parameter that has been updated.

        Tied parameters come once. A parameter without a moment yet has none here either: AdamW counts its updates.
        """
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def plain(self) -> dict[str, Any]:
        """All but the tensors, for JSON; the keys are the field names."""
        values = {name: value for name, value in vars(self).items() if name not in ("model", "optimizer", "health")}
        return copy.deepcopy({**values, "health": asdict(self.health)})

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take back what `plain` gave."""
        for name, value in values.items():
            setattr(self, name, Health(**value) if name == "health" else value)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take back everything from a checkpoint of `tensors` and, as "training", `plain`.

        The model has its shape already, and the optimizer its rates, decay and betas: the recipe gives them.

        Raises:
            ValueError: the checkpoint is of a model of another shape.
        """
        shapes = checkpoint.shapes()
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            fields = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
            if fields:
                self.optimizer.state[parameter] = {key: _room(parameter, shape) for key, shape in fields.items()}
        checkpoint.load(self.tensors())
        self.restore(checkpoint.state["training"])


def _room(parameter: Tensor, shape: torch.Size) -> Tensor:
    """For a moment of a parameter, or for AdamW's count of updates (fp32, where the fused optimizer wants it)."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False)
    return torch.empty(shape, dtype=torch.float32, device=parameter.device)

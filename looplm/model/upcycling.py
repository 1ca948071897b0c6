"""Upcycling: a deeper looped model out of a trained one, by duplicating the layers of its core (Ouro section 4.3).

Stage 1b (Table 1) makes 48 layers of 24 by duplication; the paper does not say in which order. Both orders are here,
for K times the layers:

    ABAB   the whole stack K times: layer i of the new core is layer i mod L of the old
    AABB   every layer K times:     layer i of the new core is layer i div K of the old

Prelude, coda, norms, gate and head stay as they are; the loops may change with the layers or by themselves. What stays
the same function, and what does not:

- Loops alone: the states after the loops that both have are the same, bit for bit. Only the exit distribution changes,
  because the last of T' loops takes the remaining mass (equation 3).
- ABAB with K times the layers and a K-th of the loops runs the same layers in the same order, but the old model
  applies its final norm after every copy of the stack and the new one only after the K-th: N(M(M(h))) instead of
  N(M(N(M(h)))). The two are equal where that norm leaves the state between the copies as it is, and nothing is injected
  there (`input_injection="add"` adds the core's input between the copies, too). A trained norm does not leave it.
- AABB never runs the layers in the old order. It, and ABAB at the same number of loops, keep the function only where
  the added layers add nothing to the residual stream.

So the loss rises at first and training goes on from there: `looplm upcycle` prints by how much.
"""

import copy
import re
from typing import Literal, get_args

import torch
from torch import Tensor

from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM

Arrangement = Literal["ABAB", "AABB"]

_CORE_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)")


def upcycle(
    model: OuroForCausalLM,
    *,
    num_hidden_layers: int | None = None,
    arrangement: Arrangement = "ABAB",
    total_ut_steps: int | None = None,
) -> OuroForCausalLM:
    """A new model of a multiple of the core's layers, or of another number of loops; the weights are copies.

    Args:
        num_hidden_layers: layers of the new core, a multiple of the old number; the old number by default.
        arrangement: the order of the duplicates, see above.
        total_ut_steps: loops of the new model, any number of at least 1; the old number by default.

    Returns:
        A model of the same dtype, device and mode, with the weight names of the released architecture.

    Raises:
        ValueError: fewer layers, no multiple, fewer than one loop, or an unknown arrangement.
    """
    origins = layer_origins(model.config.num_hidden_layers, num_hidden_layers, arrangement)
    config = _configuration(model.config, len(origins), total_ut_steps)
    with torch.device("meta"):  # nothing is initialised, and no random number is drawn
        deeper = OuroForCausalLM(config)
    deeper.load_state_dict(_duplicated(model.state_dict(), origins), assign=True)
    deeper.tie_weights()
    deeper.generation_config = copy.deepcopy(model.generation_config)
    return deeper.train(model.training)


def layer_origins(num_layers: int, wanted: int | None, arrangement: Arrangement) -> list[int]:
    """For each layer of the new core the (0-based) layer of the old one that it copies.

    Raises:
        ValueError: as `upcycle`.
    """
    if arrangement not in get_args(Arrangement):
        raise ValueError(f"arrangement is {arrangement!r}; it must be ABAB (stack by stack) or AABB (layer by layer)")
    wanted = num_layers if wanted is None else wanted
    if wanted < num_layers:
        raise ValueError(f"num_hidden_layers is {wanted}; upcycling only adds layers, and the model has {num_layers}")
    if wanted % num_layers:
        raise ValueError(
            f"num_hidden_layers is {wanted}; it must be a multiple of the model's {num_layers}, "
            f"such as {wanted - wanted % num_layers + num_layers}: layers are duplicated equally often"
        )
    times = wanted // num_layers
    return [index % num_layers if arrangement == "ABAB" else index // times for index in range(wanted)]


def _configuration(old: OuroConfig, num_hidden_layers: int, total_ut_steps: int | None) -> OuroConfig:
    config = copy.deepcopy(old)
    config.num_hidden_layers = num_hidden_layers
    if total_ut_steps is not None:
        if total_ut_steps < 1:
            raise ValueError(f"total_ut_steps is {total_ut_steps}; it must be at least 1")
        config.total_ut_steps = total_ut_steps
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * num_hidden_layers
    return config


def _duplicated(weights: dict[str, Tensor], origins: list[int]) -> dict[str, Tensor]:
    """Copies of all weights, those of core layer i from layer `origins[i]`."""
    places: dict[int, list[int]] = {}
    for place, origin in enumerate(origins):
        places.setdefault(origin, []).append(place)
    copies = {}
    for name, weight in weights.items():
        core = _CORE_WEIGHT.fullmatch(name)
        names = [name] if core is None else [f"model.layers.{i}.{core[2]}" for i in places[int(core[1])]]
        copies.update({new: weight.detach().clone() for new in names})
    return copies

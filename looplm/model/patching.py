"""Interchange interventions: put the state that another input had after a loop into a run, and let it go on.

A probe on a loop's state says what can be read there; patching says what the later loops use (Geiger et al., 2021,
arXiv 2106.02997). Looped models make it plain: the state after loop t is all that goes from loop t to loop t + 1, so
with every position patched the run *is* the source's from there on. (Not so with `input_injection` = `add`, where the
target's own input goes on flowing into every loop.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.model.hooks import loop_hook
from looplm.model.modeling import OuroForCausalLM
from looplm.model.readout import LoopRun, check_ids, divergence, run_loops


@dataclass(frozen=True)
class Patched:
    """A patched run beside the two it was made of.

    Attributes:
        source: the run that the states come from.
        target: the run without the patch.
        patched: the target's run with the patch.
        loop: the loop after which the states were replaced, counted from 1.
        kl: (B, S, T) fp32, KL(target || patched) of the read-outs after every loop in nats; 0 before `loop`.
    """

    source: LoopRun
    target: LoopRun
    patched: LoopRun
    loop: int
    kl: Tensor

    def logit_effect(self, token: int, other: int) -> Tensor:
        """How far the patch moved the logit of `token` over that of `other` after every loop, (B, S, T) fp32.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self.patched.logit_difference(token, other) - self.target.logit_difference(token, other)


def patch(
    model: OuroForCausalLM,
    source: Tensor,
    target: Tensor,
    *,
    loop: int,
    positions: Sequence[int],
    loops: int | None = None,
) -> Patched:
    """Run `target` with its states after `loop` at `positions` replaced by the source run's.

    Args:
        source, target: (B, S) int64 token ids without padding. The lengths may differ.
        loop: counted from 1; the gate and the read-out of this loop see the patch too.
        positions: counted from 0 in both inputs, or from each one's end where negative (-1 is the last token).
        loops: of all runs, the configuration's `total_ut_steps` by default.

    Raises:
        ValueError: a loop that is not run, a position outside one of the inputs or given twice, inputs of unequal
            numbers of rows, or ids that the model cannot run (see `looplm.model.readout.run_loops`).
    """
    number = model.config.total_ut_steps if loops is None else loops
    if not 1 <= loop <= number:
        raise ValueError(f"loop is {loop}; it must lie in 1..{number}, the loops that are run")
    inputs = {"source": source, "target": target}
    for name, ids in inputs.items():
        check_ids(ids, model, name)
    if len(source) != len(target):
        raise ValueError(f"source has {len(source)} rows and target {len(target)}; give one source a target")
    taken, put = (_places([int(place) for place in positions], ids.shape[1], name) for name, ids in inputs.items())
    donor, unpatched = (run_loops(model, ids, loops) for ids in inputs.values())

    def replace(state: Tensor, _: int) -> Tensor:
        state = state.clone()
        state[:, put] = donor.states[loop - 1][:, taken]
        return state

    with loop_hook(model, replace, loop):
        patched = run_loops(model, target, loops)
    return Patched(donor, unpatched, patched, loop, _effects(unpatched, patched, loop))


def _places(positions: list[int], length: int, name: str) -> list[int]:
    """Positions counted from the start, checked against an input's length."""
    if not positions:
        raise ValueError("positions is empty; name at least one position to patch")
    for position in positions:
        if not -length <= position < length:
            raise ValueError(
                f"positions holds {position}, but {name} has {length} tokens; positions must lie in "
                f"{-length}..{length - 1} (negative ones count from the end)"
            )
    places = [position % length for position in positions]
    if len(set(places)) < len(places):
        raise ValueError(f"positions is {positions}, which names a position of {name} twice")
    return places


def _effects(target: LoopRun, patched: LoopRun, loop: int) -> Tensor:
    """KL(target || patched) in nats, (B, S, T); the loops before the patch are the same run."""
    shape = target.gate_logits.shape
    kl = torch.zeros(shape[0] * shape[1], shape[2], device=target.gate_logits.device)
    for part in target.chunks():
        for later in range(loop, shape[2] + 1):
            change = divergence(target.log_probabilities(later, part), patched.log_probabilities(later, part))
            kl[part, later - 1] = change.float()
    return kl.view(shape)

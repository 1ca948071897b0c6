"""Forward hooks per loop: look at the state after a loop, or replace it.

`OuroModel.loop` (Ouro section 3.1) is no module of its own, so torch's hooks cannot see it. A loop hook stands where
the paper's h^(t) stands: at the end of a loop (behind its norm), before the gate, the head and the next loop read it.

Every path that runs loops has them: `forward`, `generate`, replay, tracing and patching. In decoding a hook sees the
rows in flight. In a pass that freezes positions it sees the frozen states as they stand, and what it returns for them
is dropped; so a hook that treats every position by itself leaves replay exact. Gradient checkpointing runs a loop
again in backward, when the hook may be gone: it is refused while hooks are set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    from looplm.model.context import PassContext
    from looplm.model.modeling import OuroForCausalLM
    from looplm.model.stack import OuroModel

LoopHook = Callable[[Tensor, int], Tensor | None]
"""Takes the state after a loop (R, S, D) and that loop, counted from 1; gives a new state, or None to look on."""


@contextmanager
def loop_hook(model: OuroForCausalLM | OuroModel, fn: LoopHook, loop: int | None = None) -> Iterator[None]:
    """Call `fn(state, loop)` after a loop of every pass within the `with` block; hooks run in the order they were set.

    Args:
        fn: gets the state (R, S, D) in the model's dtype. R is B, but in `generate` behind the prompt (S = 1) it is the
            rows that run this loop at all: those that have neither ended nor left. What it returns (not None) takes
            the state's place for the gate, the read-out and the next loop; keys and values of the loop are already
            written. It should not write into the state it was given.
        loop: the loop to call it after, counted from 1; None for every loop. A loop that is not run calls nothing.

    Raises:
        ValueError: `loop` below 1; in the pass: a returned state of another shape, dtype or device, or gradient
            checkpointing in training.
    """
    if loop is not None and loop < 1:
        raise ValueError(f"loop is {loop}; loops are counted from 1")
    core = cast("OuroModel", getattr(model, "model", model))  # either of the two classes

    def hook(state: Tensor, now: int) -> Tensor | None:
        return fn(state, now) if loop is None or loop == now else None

    core.loop_hooks.append(hook)
    try:
        yield
    finally:
        core.loop_hooks.remove(hook)


def apply_hooks(core: OuroModel, before: Tensor, state: Tensor, context: PassContext, loop: int) -> Tensor:
    """The state after `loop` as the hooks leave it; `before` is the state that went into the loop (both (R, S, D))."""
    if core.gradient_checkpointing and core.training:
        raise ValueError(
            "gradient checkpointing is on: it runs loops again in backward, when a loop hook may be gone; "
            "call gradient_checkpointing_disable() or eval() first"
        )
    for hook in core.loop_hooks:
        new = hook(state, loop)
        if new is None:
            continue
        wanted, got = ((x.shape, x.dtype, x.device) for x in (state, new))
        if wanted != got:
            raise ValueError(
                f"the hook after loop {loop} returned a state {_described(new)}; it must be {_described(state)}"
            )
        state = new
    return state if context.packing is None else context.packing.unpack(context.packing.pack(state), before)


def _described(state: Tensor) -> str:
    return f"{tuple(state.shape)} {state.dtype} on {state.device}"

"""What the looped model returns: transformers' outputs with depth added."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from looplm.model.cache import LoopCache


@dataclass
class OuroModelOutput(ModelOutput):
    """Output of the stack.

    Attributes:
        last_hidden_state: (B, S, D), the state after the last loop.
        past_key_values: the cache, where one is used.
        loop_states: T tensors (B, S, D): the normed state after every loop, what head and gate read.
        gate_logits: (B, S, T) fp32; None where a pooled gate cannot be computed (cached decoding).
        hidden_states: with `output_hidden_states`, the core's input followed by `loop_states`.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: LoopCache | None = None
    loop_states: tuple[Tensor, ...] | None = None
    gate_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class OuroCausalLMOutput(ModelOutput):
    """Output of the language model.

    Attributes:
        loss: scalar, where labels are given: the Stage I objective (equation 4), or the one asked for; of a freezing
            pass the cross entropy at the exits.
        logits: (B, S kept, V) of the exit rule in force; None while training with labels (see `skip_logits`).
        past_key_values: the cache, where one is used.
        loop_losses: (T,) mean cross entropy of each loop in nats, where labels are given.
        token_losses: (B, S, T) cross entropy of each target after each loop in nats, 0 where it is ignored; of a
            freezing pass (B, S), at the exits. fp32 (fp64 for fp64 states), detached.
        exit_probabilities: (B, S, T) fp32, equation 3; NaN beyond the exit where positions stop for good.
        gate_logits: (B, S, T) fp32.
        exit_depths: (B, S kept) int64, the loop that `logits` were read at; None for weighted exits.
        survival: (B, S) fp32, the probability of having gone on at the exit, where positions stop for good.
        expected_depth: scalar, mean of sum_t t p_t over the valid positions, in loops.
        hidden_states: with `output_hidden_states`, the core's input and the state after every loop.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: LoopCache | None = None
    loop_losses: Tensor | None = None
    token_losses: Tensor | None = None
    exit_probabilities: Tensor | None = None
    gate_logits: Tensor | None = None
    exit_depths: Tensor | None = None
    survival: Tensor | None = None
    expected_depth: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

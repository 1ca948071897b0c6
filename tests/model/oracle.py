"""The depth-exact contract, written as slowly and plainly as it reads: one position, one loop, one layer at a time.

What a position that left after loop e offers to later positions in loop t is `Sweep.offered`, one line a KV policy.
No cache, no batch, no mask, no attention backend: nothing of the package but its weights and norms is used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from looplm.model.layers import OuroDecoderLayer
from looplm.model.modeling import OuroForCausalLM


@dataclass
class Look:
    """What a rule may look at after a loop: everything that this position has computed so far."""

    position: int
    loop: int
    gates: list[float]
    states: list[Tensor]
    read: Callable[[Tensor], Tensor]

    @property
    def hazards(self) -> list[float]:
        return [1 / (1 + math.exp(-gate)) for gate in self.gates]


Stop = Callable[[Look], bool]


@dataclass
class Sweep:
    """One sequence, position by position. `logits` and `depths` are of each position's exit.

    Positions before `prompt_end` see each other per loop, whatever the policy.
    """

    model: OuroForCausalLM
    stop: Stop
    max_loops: int
    policy: str = "per_loop"
    prompt_end: int = 0
    logits: list[Tensor] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)
    memory: dict[tuple[OuroDecoderLayer, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, token: int) -> None:
        """Run the next position until its rule stops it."""
        core, position = self.model.model, len(self.depths)
        start = core.embed_tokens.weight[token]
        for layer in getattr(core, "prelude", []):
            start = self.layer(layer, start, position, 1)
        state, states, gates = start, [], []
        for loop in range(1, self.max_loops + 1):
            if loop > 1 and core.config.input_injection == "add":
                state = state + start
            for layer in core.layers:
                state = self.layer(layer, state, position, loop)
            normed = core.norm(state)
            state = normed if core.config.loop_norm else state
            states.append(state)
            gates.append(float(core.early_exit_gate(normed)))
            if loop == self.max_loops or self.stop(Look(position, loop, gates, states, self.log_probabilities)):
                break
        self.logits.append(self.model.lm_head(self.read(state, position)))
        self.depths.append(len(states))
        self.gates.append(gates)

    def log_probabilities(self, state: Tensor) -> Tensor:
        return self.model.lm_head(self.read(state, len(self.depths))).log_softmax(-1)

    def read(self, state: Tensor, position: int) -> Tensor:
        """What the head reads; the coda keeps the keys of the last state that it was given, the exit's."""
        if hasattr(self.model.model, "coda"):
            for layer in self.model.model.coda:
                state = self.layer(layer, state, position, 1)
            return self.model.model.coda_norm(state)
        return state if self.model.config.loop_norm else self.model.model.norm(state)

    def layer(self, layer: OuroDecoderLayer, state: Tensor, position: int, loop: int) -> Tensor:
        mixed = self.attention(layer, layer.input_layernorm(state), position, loop)
        state = state + (layer.input_layernorm_2(mixed) if layer.sandwich else mixed)
        mixed = layer.mlp(layer.post_attention_layernorm(state))
        return state + (layer.post_attention_layernorm_2(mixed) if layer.sandwich else mixed)

    def attention(self, layer: OuroDecoderLayer, x: Tensor, position: int, loop: int) -> Tensor:
        config, attention = self.model.config, layer.self_attn
        query, key = (p(x).view(-1, config.head_dim) for p in (attention.q_proj, attention.k_proj))
        if config.qk_norm:
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = self.turn(query, position), self.turn(key, position)
        self.memory[layer, loop, position] = key, attention.v_proj(x).view(-1, config.head_dim)
        looped = layer in list(self.model.model.layers)
        policy = "per_loop" if position < self.prompt_end else self.policy
        seen = [self.offered(layer, j, loop if looped else 1, policy if looped else "first") for j in range(position)]
        seen.append(self.memory[layer, loop, position])
        group = config.num_attention_heads // config.num_key_value_heads
        keys, values = (torch.stack(x).repeat_interleave(group, dim=1) for x in zip(*seen, strict=True))
        weights = ((query * keys).sum(-1) / math.sqrt(config.head_dim)).softmax(0)  # (positions, H)
        return attention.o_proj((weights[..., None] * values).sum(0).flatten())

    def offered(self, layer: OuroDecoderLayer, j: int, loop: int, policy: str) -> tuple[Tensor, Tensor]:
        """Keys and values of position j, which left after loop e, to a query in `loop`."""
        e = self.depths[j]
        keys, values = zip(
            *(self.memory[layer, t, j] for t in range(1, (1 if policy == "first" else e) + 1)), strict=True
        )
        if policy == "average":
            return sum(keys) / e, sum(values) / e
        chosen = {"per_loop": min(loop, e), "last": e, "first": 1}[policy]
        return keys[chosen - 1], values[chosen - 1]

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotate-half rotary positions of (H, D_h)."""
        half = self.model.config.head_dim // 2
        angle = position * torch.tensor(
            [self.model.config.rope_theta ** (-i / half) for i in range(half)], dtype=x.dtype
        )
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=1
        )


@torch.no_grad()
def sweep(
    model: OuroForCausalLM, ids: list[int], stop: Stop, max_loops: int, policy: str = "per_loop", prompt_end: int = 0
) -> Sweep:
    """Run a whole sequence."""
    result = Sweep(model, stop, max_loops, policy, prompt_end)
    for token in ids:
        result.extend(token)
    return result


@dataclass
class Slow:
    """What `slow_generate` finds.

    New tokens, their logits (steps, V), the depth each was read at, and of all positions the depths and gate logits.
    """

    tokens: list[int]
    logits: Tensor
    depths: list[int]
    position_depths: list[int]
    gates: list[list[float]]

    def probabilities(self, position: int, min_loops: int, max_loops: int) -> tuple[list[float], float]:
        """p_1..p_e of a position and its survival at e; hazards before min_loops are 0 and at max_loops 1."""
        survival, p = 1.0, []
        for loop, gate in enumerate(self.gates[position], start=1):
            hazard = 1 / (1 + math.exp(-gate))
            hazard = 1.0 if loop == max_loops else 0.0 if loop < min_loops else hazard
            p.append(survival * hazard)
            survival *= 1 - hazard
        return p, survival


def slow_generate(
    model: OuroForCausalLM,
    prompt: list[int],
    steps: int,
    stop: Stop,
    max_loops: int,
    policy: str = "per_loop",
    prefill: str = "full",
) -> Slow:
    """Greedy decoding that recomputes everything for every token; the prompt at full depth, or by the rule too."""
    ids, logits, depths = list(prompt), [], []
    judged = 0 if prefill == "adaptive" else len(prompt)
    for _ in range(steps):
        done = sweep(model, ids, lambda look: look.position >= judged and stop(look), max_loops, policy, len(prompt))
        logits.append(done.logits[-1])
        depths.append(done.depths[-1])
        ids.append(int(done.logits[-1].argmax()))
    return Slow(ids[len(prompt) :], torch.stack(logits), depths, done.depths, done.gates)

"""The looped stack (Ouro section 3.1): embedding, prelude, core with its norm and gate, coda; everything but the head.

One primitive, `OuroModel.loop`: one pass of the stack, then the final norm; the *normed* state is what the head and
the gate read and what the next loop starts from. Variants (all off in Ouro): prelude and coda layers around the loop,
no sandwich norms, a state that is the residual stream itself and is normed only where it is read, the core's input
added before every loop, a gate that reads the causal mean of the states.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from looplm.model import few_rows
from looplm.model.cache import LoopCache
from looplm.model.configuration import OuroConfig
from looplm.model.context import PassContext
from looplm.model.hooks import LoopHook, apply_hooks
from looplm.model.layers import OuroDecoderLayer, OuroRMSNorm, OuroRotaryEmbedding
from looplm.model.outputs import OuroModelOutput


class OuroPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config: OuroConfig
    config_class = OuroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OuroDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True


class OuroModel(OuroPreTrainedModel):
    """Embedding, prelude, looped core with its norm and gate, coda: everything but the head."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        # no padding_idx: it pins that embedding to zero, and the norms' gradients overflow at a zero state, which is
        # what a begin token is where bos and pad share an id
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(OuroDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = OuroRMSNorm(width, eps)
        self.early_exit_gate = nn.Linear(width, 1)
        self.rotary_emb = OuroRotaryEmbedding(config)
        if config.num_prelude_layers:
            self.prelude = nn.ModuleList(OuroDecoderLayer(config) for _ in range(config.num_prelude_layers))
        if config.num_coda_layers:
            self.coda = nn.ModuleList(OuroDecoderLayer(config) for _ in range(config.num_coda_layers))
            self.coda_norm = OuroRMSNorm(width, eps)
        self.gradient_checkpointing = False
        self.loop_hooks: list[LoopHook] = []
        self.detached_gate = False
        self.post_init()

    def loop(self, state: Tensor, context: PassContext, loop: int) -> tuple[Tensor, Tensor]:
        """One pass of the stack: the primitive everything else is made of.

        Args:
            state: (R, S, D), the state before this loop.
            context: what all loops of a forward pass share.
            loop: counted from 1.

        Returns:
            The state after the loop (R, S, D), normed unless `loop_norm` is off, and the gate logit (R, S) in fp32.
            Where the context is packed, the layers run on the positions that loop; the others keep their state.
        """
        before = state
        if self.config.input_injection == "add" and loop > 1:
            state = state + context.core_input
        if context.packing is not None:
            state = context.packing.pack(state)
        state = self._through(self.layers, self.config.num_prelude_layers, state, context, loop)
        if self.config.loop_norm:
            state = self.norm(state)
        if context.packing is not None:
            state = context.packing.unpack(state, before)
        if self.loop_hooks:
            state = apply_hooks(self, before, state, context, loop)
        return state, self.gate(state, context)

    def _through(self, layers: nn.ModuleList, first: int, state: Tensor, context: PassContext, loop: int) -> Tensor:
        """(R, S, D) through some layers; `first` is the number of the first, prelude, core and coda counted through."""
        if first not in context.few:
            context.few[first] = None if context.adapt(first) else few_rows.gather(layers, state)
        few = context.few[first] if context.packing is None else None
        if few is not None:
            for index, weights in enumerate(few, start=first):
                state = few_rows.step(weights, state, context.rotary, context.mask, context.few_memory(index, loop))
            return state
        for index, layer in enumerate(layers, start=first):
            memory, adapt = context.memory(index, loop), context.adapt(index)
            state = layer(state, context.rotary, context.mask, memory, adapt, context.packing)
        return state

    def gate(self, state: Tensor, context: PassContext) -> Tensor:
        """Gate logits (R, S) of states (R, S, D), in fp32 under autocast too (section 3.2).

        With `detached_gate` what the gate learns stays in the gate: no gradient goes on into the states.
        """
        read = state if self.config.loop_norm else self.norm(state)
        read = read.detach() if self.detached_gate else read
        read = read.float() if read.dtype != torch.float64 else read
        if self.config.exit_gate_pooling == "causal_mean":
            read = context.causal_mean(read)
        weight, bias = self.early_exit_gate.weight[0].to(read.dtype), self.early_exit_gate.bias.to(read.dtype)
        return (read * weight).sum(-1) + bias

    def begin(self, context: PassContext, embedded: Tensor) -> Tensor:
        """Run the prelude on the embeddings (B, S, D): the core's input, state 0."""
        if self.config.num_prelude_layers:
            embedded = self._through(self.prelude, 0, embedded, context, 1)
        context.core_input = embedded
        return embedded

    def finish(self, state: Tensor, context: PassContext) -> Tensor:
        """What the head reads of a state (R, S, D): the normed state, or the coda's normed output."""
        if self.config.num_coda_layers:
            first = self.config.num_prelude_layers + self.config.num_hidden_layers
            return self.coda_norm(self._through(self.coda, first, state, context, 1))
        return state if self.config.loop_norm else self.norm(state)

    def run(self, embedded: Tensor, context: PassContext, num_loops: int) -> tuple[list[Tensor], Tensor | None]:
        """All loops over all positions.

        Returns:
            The state after each loop, T tensors (B, S, D), and the gate logits (B, S, T): None where a pooled gate
            has no states to average, because earlier positions are in the cache only.
        """
        if context.cache is not None and self.training and torch.is_grad_enabled():
            raise ValueError("use_cache is True in training, but a cache carries no gradients: pass use_cache=False")
        state, states, gates = self.begin(context, embedded), [], []
        for loop in range(1, num_loops + 1):
            if self.gradient_checkpointing and self.training:
                state, gate = self._gradient_checkpointing_func(self.loop, state, context, loop)
            else:
                state, gate = self.loop(state, context, loop)
            states.append(state)
            gates.append(gate)
        context.leave(num_loops, None, num_loops)
        pooled_blind = self.config.exit_gate_pooling == "causal_mean" and context.past_length > 0
        return states, None if pooled_blind else torch.stack(gates, dim=-1)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embeddings (B, S, D) of exactly one of the two inputs."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def num_loops(self, num_loop_steps: int | None) -> int:
        """Loops of a pass: `num_loop_steps`, else `total_ut_steps`; more than trained warns, but not in training."""
        trained = self.config.total_ut_steps
        loops = trained if num_loop_steps is None else num_loop_steps
        if loops < 1:
            raise ValueError(f"num_loop_steps is {loops}; it must be at least 1")
        if loops > trained and not self.training:  # in training one decides how deep it is trained
            warnings.warn(
                f"running {loops} loops, but the model was trained with {trained}: quality usually falls beyond "
                "the trained depth, and the gate has not been trained there",
                stacklevel=2,
            )
        return loops

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LoopCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loop_steps: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> OuroModelOutput:
        """Run all loops over (B, S) tokens; arguments as in `OuroForCausalLM.forward`."""
        embedded, num_loops = self.embed(input_ids, inputs_embeds), self.num_loops(num_loop_steps)
        context = PassContext.build(
            self, embedded, attention_mask, position_ids, past_key_values, bool(use_cache), num_loops
        )
        states, gate_logits = self.run(embedded, context, num_loops)
        last = self.finish(states[-1], context)
        context.advance(torch.full(embedded.shape[:2], num_loops, device=embedded.device))
        return OuroModelOutput(
            last_hidden_state=last,
            past_key_values=context.cache,
            loop_states=tuple(states),
            gate_logits=gate_logits,
            hidden_states=(context.core_input, *states) if output_hidden_states else None,
        )

"""The looped language model (Ouro section 3.1, equation 1): F^(t) = head o M^L o ... o M^L (t times) o embedding.

One primitive, `OuroModel.loop`: one pass of the stack, then the final norm; the *normed* state is what the head and
the gate read and what the next loop starts from. `forward` is built from it. Against the released code: labels give
the paper's objective (equation 4) instead of a cross entropy of mixed logits; exit arithmetic is fp32 in log space;
only the selected states meet the head, so no pass ever holds the logits of all loops; weights load without remote code.

Variants (all off in Ouro): prelude and coda layers around the loop, no sandwich norms, the core's input added before
every loop, a gate that reads the causal mean of the states.
"""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from looplm.exits import ExitRule, exit_probabilities, expected_depth
from looplm.model.cache import LoopCache
from looplm.model.configuration import OuroConfig
from looplm.model.context import PassContext
from looplm.model.exiting import decode, keep, rule_in_force, select
from looplm.model.generation import DepthGenerationMixin, DepthSession
from looplm.model.layers import OuroDecoderLayer, OuroRMSNorm, OuroRotaryEmbedding
from looplm.model.outputs import OuroCausalLMOutput, OuroModelOutput
from looplm.objectives.expected_loss import Prior, stage_one_loss


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
        self.post_init()

    def loop(self, state: Tensor, context: PassContext, loop: int) -> tuple[Tensor, Tensor]:
        """One pass of the stack: the primitive everything else is made of.

        Args:
            state: (R, S, D), the state before this loop.
            context: what all loops of a forward pass share.
            loop: counted from 1.

        Returns:
            The normed state after the loop (R, S, D) and the gate logit (R, S) in fp32.
        """
        if self.config.input_injection == "add" and loop > 1:
            state = state + context.core_input
        for index, layer in enumerate(self.layers, start=self.config.num_prelude_layers):
            state = layer(state, context.rotary, context.mask, context.memory(index, loop))
        state = self.norm(state)
        return state, self.gate(state, context)

    def gate(self, state: Tensor, context: PassContext) -> Tensor:
        """Gate logits (R, S) of states (R, S, D), in fp32 under autocast too (section 3.2)."""
        read = state.float() if state.dtype != torch.float64 else state
        if self.config.exit_gate_pooling == "causal_mean":
            read = context.causal_mean(read)
        weight, bias = self.early_exit_gate.weight[0].to(read.dtype), self.early_exit_gate.bias.to(read.dtype)
        return (read * weight).sum(-1) + bias

    def begin(self, context: PassContext, embedded: Tensor) -> Tensor:
        """Run the prelude on the embeddings (B, S, D): the core's input, state 0."""
        if self.config.num_prelude_layers:
            for index, layer in enumerate(self.prelude):
                embedded = layer(embedded, context.rotary, context.mask, context.memory(index, 1))
        context.core_input = embedded
        return embedded

    def finish(self, state: Tensor, context: PassContext) -> Tensor:
        """What the head reads of a state (R, S, D): the state itself, or the coda's output."""
        if self.config.num_coda_layers:
            first = self.config.num_prelude_layers + self.config.num_hidden_layers
            for index, layer in enumerate(self.coda, start=first):
                state = layer(state, context.rotary, context.mask, context.memory(index, 1))
            state = self.coda_norm(state)
        return state

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
        if context.cache is not None:
            context.leave(num_loops, torch.arange(len(state), device=state.device))
        pooled_blind = self.config.exit_gate_pooling == "causal_mean" and context.past_length > 0
        return states, None if pooled_blind else torch.stack(gates, dim=-1)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embeddings (B, S, D) of exactly one of the two inputs."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def num_loops(self, num_loop_steps: int | None) -> int:
        """Loops of this pass: `num_loop_steps`, else `total_ut_steps`; more than trained warns once."""
        trained = self.config.total_ut_steps
        loops = trained if num_loop_steps is None else num_loop_steps
        if loops < 1:
            raise ValueError(f"num_loop_steps is {loops}; it must be at least 1")
        if loops > trained:
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
        context.advance()
        return OuroModelOutput(
            last_hidden_state=last,
            past_key_values=context.cache,
            loop_states=tuple(states),
            gate_logits=gate_logits,
            hidden_states=(context.core_input, *states) if output_hidden_states else None,
        )


class OuroForCausalLM(OuroPreTrainedModel, DepthGenerationMixin):
    """The language model: loops, exit gate and head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LoopCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loop_steps: int | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        use_weighted_exit: bool = False,
        exit_rule: ExitRule | None = None,
        depth: DepthSession | None = None,
        exit_beta: float | None = None,
        num_items_in_batch: int | Tensor | None = None,
        skip_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> OuroCausalLMOutput:
        """Run the loops and read the logits of the exit rule in force.

        Args:
            input_ids: (B, S) int64; or `inputs_embeds` (B, S, D).
            attention_mask: (B, S_past + S), 1 for tokens and 0 for padding on either side, or a prepared 4D mask.
            position_ids: (B, S); restarting ones (without mask and cache) keep packed documents apart.
            labels: (B, S), -100 is ignored, shifted inside as in transformers; `shift_labels` is already shifted.
            num_loop_steps: T of this pass; the configuration's `total_ut_steps` by default.
            exit_rule, exit_at_step, exit_threshold, use_weighted_exit: which state is read, in this order of
                precedence. `exit_at_step` is 0-based, as released. All loops run and each position reads at its
                exit ("select"). Without any, the configuration's `early_exit_threshold`; 1.0 reads the last loop.
            depth: how a single new token behind a cache leaves the loop (set by `generate`); later loops are not run.
            exit_beta: weight of the entropy term, the configuration's by default.
            num_items_in_batch: the loss is summed and divided by it instead of the number of valid tokens.
            skip_logits: by default the logits are left out (None) while training with labels.

        Raises:
            ValueError: contradicting inputs, a rule outside its range, a cache of another configuration.
        """
        embedded = self.model.embed(input_ids, inputs_embeds)
        num_loops = self.model.num_loops(num_loop_steps if depth is None else depth.options.max_loops)
        context = PassContext.build(
            self.model, embedded, attention_mask, position_ids, past_key_values, bool(use_cache), num_loops
        )
        if depth is not None and depth.leaves_early(context):
            return decode(self, embedded, context, depth)
        states, gate_logits = self.model.run(embedded, context, num_loops)
        output = OuroCausalLMOutput(past_key_values=context.cache, gate_logits=gate_logits)
        if gate_logits is not None:
            output.exit_probabilities = exit_probabilities(gate_logits)
            output.expected_depth = context.mean(expected_depth(output.exit_probabilities.detach()))
        if labels is not None or shift_labels is not None:
            targets = shift_labels if shift_labels is not None else _shift(labels)
            self._add_loss(output, states, targets, context, exit_beta, num_items_in_batch)
            skip_logits = self.training if skip_logits is None else skip_logits
        if not skip_logits:
            if depth is not None and not use_weighted_exit:  # prompts, and full depth
                exit_threshold = 1.0
            asked = exit_rule is not None or exit_at_step is not None or exit_threshold is not None
            weighted = use_weighted_exit and not asked
            rule = None
            if not weighted:
                rule = rule_in_force(exit_rule, exit_at_step, exit_threshold, self.config, num_loops)
            self._add_logits(output, states, rule, context, logits_to_keep, weighted)
        if output_hidden_states:
            output.hidden_states = (context.core_input, *states)
        context.advance()
        return OuroCausalLMOutput(**output)  # in the order of its fields: [0] is the loss, or else the logits

    def _add_loss(
        self,
        output: OuroCausalLMOutput,
        states: list[Tensor],
        targets: Tensor,
        context: PassContext,
        beta: float | None,
        num_items: int | Tensor | None,
    ) -> None:
        """Stage I (equation 4); the coda, where there is one, reads every loop."""
        if context.past_length:
            raise ValueError(f"labels with {context.past_length} cached positions; pass the whole sequence instead")
        assert output.gate_logits is not None and output.exit_probabilities is not None  # nothing is cached
        prior = cast("Prior", self.config.exit_prior)  # the configuration has checked it
        stage_one = stage_one_loss(
            [self.model.finish(state, context) for state in states],
            self.lm_head.weight,
            targets,
            output.gate_logits,
            beta=self.config.exit_beta if beta is None else beta,
            prior=prior,
            num_items=num_items,
        )
        valid = targets != -100
        depths = expected_depth(output.exit_probabilities.detach())
        output.loss, output.loop_losses = stage_one.loss, stage_one.loop_losses
        output.expected_depth = (depths * valid).sum() / valid.sum().clamp(min=1)

    def _add_logits(
        self,
        output: OuroCausalLMOutput,
        states: list[Tensor],
        rule: ExitRule | None,
        context: PassContext,
        logits_to_keep: int | Tensor,
        weighted: bool,
    ) -> None:
        """Read one state a position, then the head: by linearity a weighted exit is the head of the mixed state."""
        gate_logits = output.gate_logits
        if not self.config.num_coda_layers:  # a coda attends to every position, so it cannot be cut first
            states = [slice_logits_to_keep(state, logits_to_keep) for state in states]
        if weighted:
            if output.exit_probabilities is None:
                raise ValueError(
                    "use_weighted_exit needs the gate: exit_gate_pooling='causal_mean' has none behind a cache"
                )
            weights = keep(self, output.exit_probabilities, logits_to_keep)
            read = [self.model.finish(state, context) for state in states]
            mixed = sum(w[..., None].to(s.dtype) * s for w, s in zip(weights.unbind(-1), read, strict=True))
        else:
            mixed = states[-1]
            if rule is not None:
                mixed, output.exit_depths = select(self, states, gate_logits, rule, context, logits_to_keep)
            else:
                output.exit_depths = torch.full(mixed.shape[:2], len(states), device=mixed.device)
            mixed = self.model.finish(mixed, context)
        if self.config.num_coda_layers:
            mixed = slice_logits_to_keep(mixed, logits_to_keep)
        output.logits = self.lm_head(mixed)

    def log_probabilities(self, read: Tensor) -> Tensor:
        """The read-out of states (N, D) in fp32 (N, V): what confidence rules look at."""
        return self.lm_head(read).float().log_softmax(-1)


def _shift(labels: Tensor | None) -> Tensor:
    """Targets of each position: the next label, -100 at the end."""
    assert labels is not None
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


AutoModel.register(OuroConfig, OuroModel, exist_ok=True)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM, exist_ok=True)

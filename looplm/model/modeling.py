"""The looped language model (Ouro section 3.1, equation 1): F^(t) = head o M^L o ... o M^L (t times) o embedding.

`forward` is built from `OuroModel.loop`. Against the released code: labels give the paper's objective (equation 4)
instead of a cross entropy of mixed logits; exit arithmetic is fp32 in log space; only the selected states meet the
head, so no pass ever holds the logits of all loops; early exit saves the loops; weights load without remote code.
"""

from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from looplm.exits import ExitRule, FixedDepth, RecordedDepth, exit_probabilities, expected_depth
from looplm.files import write_text
from looplm.model.cache import LoopCache
from looplm.model.configuration import OuroConfig
from looplm.model.context import PassContext
from looplm.model.decoding import decode
from looplm.model.depth import DepthSession
from looplm.model.exiting import keep, rule_in_force, select
from looplm.model.freezing import check_depths, freeze
from looplm.model.generation import DepthGenerationMixin
from looplm.model.outputs import OuroCausalLMOutput
from looplm.model.projections import OuroLinear
from looplm.model.saving import model_card
from looplm.model.stack import OuroModel, OuroPreTrainedModel
from looplm.objectives.expected_loss import Prior, stage_one_loss
from looplm.objectives.token_losses import weighted_token_losses


class OuroForCausalLM(OuroPreTrainedModel, DepthGenerationMixin):
    """The language model: loops, exit gate and head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = OuroLinear(config.hidden_size, config.vocab_size)
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
        exit_mode: Literal["select", "freeze"] = "select",
        exit_depths: Tensor | None = None,
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
                precedence. `exit_at_step` is 0-based, as released. Without any, the configuration's
                `early_exit_threshold`; 1.0 reads the last loop.
            exit_mode: `select`: all loops run and each position reads at its exit, which saves nothing; `freeze`:
                a position past its exit is frozen for later ones too, as in generation.
            exit_depths: (B, S) recorded depths to replay, 0 on padding and after the end; implies `freeze`. The loss
                of a freezing pass is the cross entropy at the exits.
            depth: a running `generate` (which sets it): new tokens behind its prompt leave early for real.
            exit_beta: weight of the entropy term, the configuration's by default.
            num_items_in_batch: the loss is summed and divided by it instead of the number of valid tokens.
            skip_logits: by default the logits are left out (None) while training with labels.

        Raises:
            ValueError: contradicting inputs, a rule outside its range, a cache of another configuration.
        """
        embedded = self.model.embed(input_ids, inputs_embeds)
        num_loops = self.model.num_loops(num_loop_steps if depth is None else depth.options.num_loops)
        context = PassContext.build(
            self.model, embedded, attention_mask, position_ids, past_key_values, bool(use_cache), num_loops
        )
        selects = exit_rule is not None or exit_at_step is not None or exit_threshold is not None
        if depth is not None and depth.decodes(context) and not (selects or use_weighted_exit or self._pooled):
            return decode(self, embedded, context, depth)
        targets = shift_labels if shift_labels is not None else None if labels is None else _shift(labels)
        if depth is not None and depth.freezes_prompt:
            limits = (depth.options.min_loops, depth.options.max_loops)
            return self._freeze(embedded, context, depth.prompt_rule(), limits, logits_to_keep, None, None, depth)
        if exit_mode not in ("select", "freeze"):
            raise ValueError(f"exit_mode is {exit_mode!r}; it must be select or freeze")
        if exit_depths is not None or exit_mode == "freeze":
            if use_weighted_exit:
                raise ValueError("use_weighted_exit mixes all loops; it goes with exit_mode='select' only")
            if exit_depths is not None:
                stop = _recorded(exit_depths, context, num_loops, selects)
            else:
                asked = rule_in_force(exit_rule, exit_at_step, exit_threshold, self.config, num_loops)
                stop = FixedDepth(num_loops) if asked is None else asked
            limits = (1, num_loops)
            return self._freeze(embedded, context, stop, limits, logits_to_keep, targets, num_items_in_batch, None)
        states, gate_logits = self.model.run(embedded, context, num_loops)
        output = OuroCausalLMOutput(past_key_values=context.cache, gate_logits=gate_logits)
        if gate_logits is not None:
            output.exit_probabilities = exit_probabilities(gate_logits)
            output.expected_depth = context.mean(expected_depth(output.exit_probabilities.detach()))
        if targets is not None:
            self._add_loss(output, states, targets, context, exit_beta, num_items_in_batch)
            skip_logits = self.training if skip_logits is None else skip_logits
        if not skip_logits:
            if depth is not None and not selects:  # a prompt is read at full depth
                exit_threshold = 1.0
            weighted = use_weighted_exit and not selects
            rule = None
            if not weighted:
                rule = rule_in_force(exit_rule, exit_at_step, exit_threshold, self.config, num_loops)
            self._add_logits(output, states, rule, context, logits_to_keep, weighted)
        if output_hidden_states:
            output.hidden_states = (context.core_input, *states)
        context.advance(torch.full(embedded.shape[:2], num_loops, device=embedded.device))
        if depth is not None:
            self._end_prompt(output, context, depth)
        return OuroCausalLMOutput(**output)  # in the order of its fields: [0] is the loss, or else the logits

    @property
    def _pooled(self) -> bool:
        return self.config.exit_gate_pooling != "token"

    def _freeze(
        self,
        embedded: Tensor,
        context: PassContext,
        rule: ExitRule,
        limits: tuple[int | Tensor, int | Tensor],
        logits_to_keep: int | Tensor,
        targets: Tensor | None,
        num_items: int | Tensor | None,
        depth: DepthSession | None,
    ) -> OuroCausalLMOutput:
        """A pass in which positions stop for good (see `looplm.model.freezing`)."""
        if self._pooled and not isinstance(rule, RecordedDepth | FixedDepth):
            raise ValueError(
                "exit_gate_pooling is 'causal_mean': a rule that freezes needs 'token'; use exit_mode='select'"
            )
        if context.cache is not None and context.cache.policy != "per_loop":
            raise ValueError(
                f"past_key_values is collapsed (kv_policy {context.cache.policy!r}); positions cannot freeze behind "
                "it, because a query in loop 1 needs the last loop of the token before: use kv_policy 'per_loop'"
            )
        if context.cache is not None and torch.is_grad_enabled() and self.training:
            raise ValueError("use_cache is True in training, but a cache carries no gradients: pass use_cache=False")
        frozen = freeze(self, embedded, context, rule, *limits)
        read = self.model.finish(frozen.state, context)
        output = OuroCausalLMOutput(
            logits=self.lm_head(slice_logits_to_keep(read, logits_to_keep)),
            past_key_values=context.cache,
            gate_logits=frozen.gate_logits,
            exit_probabilities=frozen.exit_probabilities,
            exit_depths=slice_logits_to_keep(frozen.depths[..., None], logits_to_keep)[..., 0],
            survival=frozen.survival,
            expected_depth=context.mean(frozen.depths.float()),
        )
        if targets is not None:
            ones = torch.ones(1, *targets.shape, device=targets.device)
            total, _ = weighted_token_losses([read], self.lm_head.weight, targets, ones)
            items = (targets != -100).sum() if num_items is None else torch.as_tensor(num_items)
            output.loss = total / items.to(total.device).clamp(min=1)
        context.advance(frozen.depths)
        if depth is not None:
            self._end_prompt(output, context, depth)
        return OuroCausalLMOutput(**output)

    def _end_prompt(self, output: OuroCausalLMOutput, context: PassContext, depth: DepthSession) -> None:
        """After the last chunk of a prompt its keys are collapsed, and its last token's numbers are checked."""
        if context.cache is not None and context.past_length + context.length >= depth.prompt_end:
            context.cache.collapse(depth.options.kv_policy)
        if output.survival is None and output.exit_depths is not None:
            output.survival = torch.zeros(output.exit_depths.shape, device=output.exit_depths.device)
        if output.logits is not None:
            depth.guard(output, context, torch.ones(context.batch, dtype=torch.bool, device=output.logits.device))

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

    def save_pretrained(
        self, save_directory: str | PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, and a model card (README.md) where the folder has none."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        card = Path(save_directory) / "README.md"
        if is_main_process and not card.exists():
            write_text(card, model_card(self))

    def log_probabilities(self, read: Tensor) -> Tensor:
        """The read-out of states (N, D) in fp32 (N, V): what confidence rules look at."""
        return self.lm_head(read).float().log_softmax(-1)


def _recorded(depths: Tensor, context: PassContext, num_loops: int, selects: bool) -> ExitRule:
    """The rule that replays `exit_depths`, checked."""
    if selects:
        raise ValueError("exit_depths replays recorded depths; drop exit_rule, exit_at_step and exit_threshold")
    check_depths(depths, context.batch, context.length, num_loops)
    return RecordedDepth(depths.to(context.positions.device))


def _shift(labels: Tensor | None) -> Tensor:
    """Targets of each position: the next label, -100 at the end."""
    assert labels is not None
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


AutoModel.register(OuroConfig, OuroModel, exist_ok=True)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM, exist_ok=True)

"""The looped language model (Ouro section 3.1, equation 1): F^(t) = head o M^L o ... o M^L (t times) o embedding.

`forward` is built from `OuroModel.loop`. Against the released code: labels give the paper's objective (equation 4)
instead of a cross entropy of mixed logits; exit arithmetic is fp32 in log space; only the selected states meet the
head, so no pass ever holds the logits of all loops; early exit saves the loops; weights load without remote code.
"""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from looplm.exits import ExitRule, exit_probabilities, expected_depth
from looplm.files import write_text
from looplm.model.cache import LoopCache
from looplm.model.configuration import OuroConfig
from looplm.model.context import PassContext
from looplm.model.decoding import decode
from looplm.model.depth import DepthSession
from looplm.model.exiting import add_logits
from looplm.model.freezing import freezing_pass, freezing_rule
from looplm.model.generation import DepthGenerationMixin
from looplm.model.outputs import OuroCausalLMOutput
from looplm.model.projections import OuroLinear
from looplm.model.request import Goal, Reading, Wanted, shifted
from looplm.model.saving import model_card
from looplm.model.stack import OuroModel, OuroPreTrainedModel
from looplm.objectives.expected_loss import Objective, Prior, fixed_loss, stage_one_loss
from looplm.objectives.token_losses import IGNORED


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
        min_loops: int | Tensor = 1,
        depth: DepthSession | None = None,
        objective: Objective = "expected",
        exit_beta: float | None = None,
        num_items_in_batch: int | Tensor | None = None,
        skip_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> OuroCausalLMOutput:
        """Run the loops and read the logits of the exit rule in force (see `looplm.model.request`).

        Args:
            input_ids: (B, S) int64; or `inputs_embeds` (B, S, D).
            attention_mask: (B, S_past + S), 1 for tokens and 0 for padding on either side, or a prepared 4D mask.
            position_ids: (B, S); restarting ones (without mask and cache) keep packed documents apart.
            labels: (B, S), -100 is ignored, shifted inside as in transformers; `shift_labels` is already shifted.
            num_loop_steps: T of this pass, `total_ut_steps` by default; the exit distribution is over these T loops.
            exit_rule, exit_at_step, exit_threshold, use_weighted_exit: which state is read, in this order of
                precedence; without any, the configuration's `early_exit_threshold`, of which 1.0 is the last loop.
            exit_mode, exit_depths, min_loops: whether positions stop for good, or where they are recorded to have
                stopped, and the limit below; with the exits, see `Reading`.
            depth: a running `generate` (which sets it): new tokens behind its prompt leave early for real.
            objective, exit_beta, num_items_in_batch: what the loss is, Stage I by default; see `Goal`.
            logits_to_keep, skip_logits, output_hidden_states: what is returned; see `Wanted`.

        Raises:
            ValueError: contradicting inputs, a rule outside its range, a cache of another configuration.
        """
        reading = Reading(exit_rule, exit_at_step, exit_threshold, use_weighted_exit, exit_mode, exit_depths, min_loops)
        wanted = Wanted(logits_to_keep, skip_logits, bool(output_hidden_states))
        goal = Goal(shifted(labels, shift_labels), objective, exit_beta, num_items_in_batch)
        embedded = self.model.embed(input_ids, inputs_embeds)
        num_loops = self.model.num_loops(num_loop_steps if depth is None else depth.options.num_loops)
        context = PassContext.build(
            self.model, embedded, attention_mask, position_ids, past_key_values, bool(use_cache), num_loops
        )
        return self._run(embedded, context, num_loops, reading, wanted, goal, depth)

    def _run(
        self,
        embedded: Tensor,
        context: PassContext,
        num_loops: int,
        reading: Reading,
        wanted: Wanted,
        goal: Goal,
        depth: DepthSession | None,
    ) -> OuroCausalLMOutput:
        """Stop for real (one new token), freeze, or select."""
        token_gate = self.config.exit_gate_pooling == "token"
        if depth is not None and depth.decodes(context) and token_gate and not (reading.selects or reading.weighted):
            return decode(self, embedded, context, depth)
        if depth is not None and depth.freezes_prompt:
            limits = (depth.options.min_loops, depth.options.max_loops)
            keep = Wanted(wanted.logits_to_keep)
            output = freezing_pass(self, embedded, context, depth.prompt_rule(), limits, keep, Goal())
        elif reading.freezes:
            rule = freezing_rule(reading, self.config, context, num_loops)
            limits = (reading.min_loops, num_loops)
            output = freezing_pass(self, embedded, context, rule, limits, wanted, goal)
        else:
            if depth is not None and not (reading.selects or reading.weighted):  # a prompt is read at full depth
                reading = replace(reading, threshold=1.0)
            output = self._select(embedded, context, num_loops, reading, wanted, goal)
        if depth is not None:
            self._end_prompt(output, context, depth)
        return OuroCausalLMOutput(**output)  # in the order of its fields: [0] is the loss, or else the logits

    def _select(
        self,
        embedded: Tensor,
        context: PassContext,
        num_loops: int,
        reading: Reading,
        wanted: Wanted,
        goal: Goal,
    ) -> OuroCausalLMOutput:
        """All loops over all positions (see `looplm.model.exiting`)."""
        states, gate_logits = self.model.run(embedded, context, num_loops)
        output = OuroCausalLMOutput(past_key_values=context.cache, gate_logits=gate_logits)
        if gate_logits is not None:
            output.exit_probabilities = exit_probabilities(gate_logits)
            output.expected_depth = context.mean(expected_depth(output.exit_probabilities.detach()))
        skip = wanted.skip_logits
        if goal.targets is not None:
            self._add_loss(output, states, context, goal, goal.targets)
            skip = self.training if skip is None else skip
        if not skip:
            weighted = reading.weighted and not reading.selects
            rule = None if weighted else reading.rule_in_force(self.config, num_loops)
            add_logits(self, output, states, rule, weighted, context, wanted.logits_to_keep)
        if wanted.hidden_states:
            output.hidden_states = (context.core_input, *states)
        context.advance(torch.full(embedded.shape[:2], num_loops, device=embedded.device))
        return output

    def _end_prompt(self, output: OuroCausalLMOutput, context: PassContext, depth: DepthSession) -> None:
        """After the last chunk of a prompt its keys are collapsed, and its last token's numbers are checked."""
        if context.cache is not None and context.past_length + context.length >= depth.prompt_end:
            context.cache.collapse(depth.options.kv_policy)
        if output.survival is None and output.exit_depths is not None:
            output.survival = torch.zeros(output.exit_depths.shape, device=output.exit_depths.device)
        if output.logits is not None:
            depth.guard(output, context, torch.ones(context.batch, dtype=torch.bool, device=output.logits.device))

    def _add_loss(
        self, output: OuroCausalLMOutput, states: list[Tensor], context: PassContext, goal: Goal, targets: Tensor
    ) -> None:
        """Stage I (equation 4), or a fixed weight of the loops; the coda, where there is one, reads every loop."""
        if context.past_length:
            raise ValueError(f"labels with {context.past_length} cached positions; pass the whole sequence instead")
        assert output.gate_logits is not None and output.exit_probabilities is not None  # nothing is cached
        with torch.set_grad_enabled(torch.is_grad_enabled() and goal.objective != "last"):
            read = [self.model.finish(state, context) for state in states[:-1]]
        read.append(self.model.finish(states[-1], context))
        head, items = self.lm_head.weight, goal.num_items
        if goal.objective == "expected":
            beta = self.config.exit_beta if goal.beta is None else goal.beta
            prior = cast("Prior", self.config.exit_prior)  # the configuration has checked it
            stage_one = stage_one_loss(read, head, targets, output.gate_logits, beta=beta, prior=prior, num_items=items)
            output.loss, losses = stage_one.loss, stage_one.token_losses
        else:
            output.loss, losses = fixed_loss(read, head, targets, objective=goal.objective, num_items=items)
        valid = targets != IGNORED
        count = valid.sum().clamp(min=1)
        output.loop_losses, output.token_losses = losses.flatten(1).sum(1) / count, losses.movedim(0, -1)
        depths = expected_depth(output.exit_probabilities.detach())
        output.expected_depth = (depths * valid).sum() / count

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


AutoModel.register(OuroConfig, OuroModel, exist_ok=True)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM, exist_ok=True)

"""`generate` with depth: a fixed number of loops, or early exit that does not run the loops after the exit.

Depth arguments are gathered once into a frozen `DepthOptions`. Prompts run at full depth (the paper's prefill, Table
14), so the first new token is read at the last loop; every later token leaves by its own rule, row by row, and the
rows that are still looping go on without it. Cache policy: `per_loop` (see `looplm.model.cache`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from looplm.exits import ExitRule, QExit
from looplm.model.cache import LoopCache
from looplm.model.configuration import OuroConfig

if TYPE_CHECKING:
    from looplm.model.context import PassContext

_ONE_TOKEN_A_PASS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass(frozen=True)
class DepthOptions:
    """How deep the tokens of one generation go.

    Attributes:
        rule: when a position stops; None runs every position to `max_loops`.
        min_loops: hazards before it are 0; 1..max_loops.
        max_loops: full depth of this generation; no position goes further.
    """

    rule: ExitRule | None
    min_loops: int
    max_loops: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_loops <= self.max_loops:
            raise ValueError(f"min_loops is {self.min_loops}; it must lie in 1..max_loops = {self.max_loops}")


@dataclass
class DepthSession:
    """One call of `generate`: its options, where its prompt ends, and the depths it has recorded so far."""

    options: DepthOptions
    prompt_end: int
    eos_token_id: int | list[int] | None = None
    one_token_a_pass: bool = True
    depths: list[Tensor] = field(default_factory=list)

    def leaves_early(self, context: PassContext) -> bool:
        """Whether this pass is a new token behind the prompt (a prompt's last chunk may be one token long too)."""
        return self.options.rule is not None and context.past_length >= self.prompt_end

    def recorded(self, new: Tensor) -> Tensor:
        """Depths of the new tokens (B, N), 0 where a row had already ended."""
        depths = torch.cat(self.depths, dim=1).to(new.device)[:, : new.shape[1]]  # transformers may run on past the end
        if not self.one_token_a_pass:  # beams and drafts: full depth, the same for every token
            depths = torch.full_like(new, int(depths.max()))
        if self.eos_token_id is None:
            return depths
        ends = torch.as_tensor(self.eos_token_id, device=new.device)
        ended = torch.isin(new, ends).cumsum(1).roll(1, dims=1)
        ended[:, 0] = 0
        return depths.masked_fill(ended > 0, 0)


class DepthGenerationMixin(GenerationMixin):
    """Overrides of transformers' `GenerationMixin`: depth arguments in, recorded depths out, a `LoopCache` inside."""

    config: OuroConfig

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        adaptive_loop: bool | None = None,
        num_loop_steps: int | None = None,
        exit_threshold: float | Tensor | None = None,
        exit_rule: ExitRule | None = None,
        min_loops: int = 1,
        max_loops: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, at a depth of one's choice.

        Args:
            adaptive_loop: True leaves the loop early; by default it is True when a threshold or a rule is given (or
                the configuration's `early_exit_threshold` is below 1).
            num_loop_steps: loops at full depth; the configuration's `total_ut_steps` by default.
            exit_threshold: q of the paper's Q-exit in (0, 1], or (B,) with one a row; 1.0 means all loops.
            exit_rule: any other rule of `looplm.exits`.
            min_loops, max_loops: limits of the adaptive depth; `max_loops` overrides `num_loop_steps`.
            **kwargs: everything transformers' `generate` takes. With `return_dict_in_generate` the result also has
                `exit_depths` (B, new tokens) int64: the loop that each token was read at, 0 after the end.

        Raises:
            ValueError: contradicting depth arguments or values out of range.
        """
        full = max_loops if max_loops is not None else num_loop_steps
        full = self.config.total_ut_steps if full is None else full
        rule = self._rule(adaptive_loop, exit_threshold, exit_rule)
        if rule is not None and (kwargs.get("exit_at_step") is not None or kwargs.get("use_weighted_exit")):
            raise ValueError("exit_at_step and use_weighted_exit run all loops; pass adaptive_loop=False with them")
        kwargs.pop("depth", None)  # assisted generation hands the main model's arguments to the assistant
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        prompt = kwargs.get("inputs_embeds") if ids is None else ids
        if prompt is not None and prompt.shape[1] == 0:
            raise ValueError("the prompt is empty; give at least one token (the bos token, for instance)")
        start = 1 if prompt is None else prompt.shape[1]  # without a prompt there is the bos token
        session = DepthSession(DepthOptions(rule, min_loops, full), start)
        result = super().generate(inputs, generation_config, depth=session, **kwargs)  # type: ignore[misc]
        if not isinstance(result, Tensor) and session.depths:
            from_embeddings = ids is None and prompt is not None  # then the sequences are the new tokens alone
            result["exit_depths"] = session.recorded(result.sequences[:, 0 if from_embeddings else start :])
        return result

    def _rule(self, adaptive: bool | None, threshold: float | Tensor | None, rule: ExitRule | None) -> ExitRule | None:
        """The rule asked for, None for full depth."""
        default = self.config.early_exit_threshold
        if threshold is not None and rule is not None:
            raise ValueError("exit_threshold and exit_rule are both given; pass one of them")
        asked = rule if rule is not None else None if threshold is None else QExit(threshold)
        if adaptive is False:
            if asked is not None:
                raise ValueError("adaptive_loop is False, but an exit rule is given; drop one of them")
            return None
        if asked is None and (adaptive or default < 1):
            asked = QExit(default)
        if asked is not None and self.config.exit_gate_pooling != "token":
            raise ValueError("exit_gate_pooling is 'causal_mean': adaptive decoding needs 'token'; use num_loop_steps")
        return asked

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        session = model_kwargs.get("depth")
        depths = getattr(outputs, "exit_depths", None)
        if session is not None and depths is not None:
            session.depths.append(depths[:, -1:])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """A `LoopCache` of the right size; caches that know no loops are refused."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}; a looped model needs its own LoopCache: leave it out")
        session: DepthSession = model_kwargs["depth"]
        session.eos_token_id = generation_config.eos_token_id
        session.one_token_a_pass = mode in _ONE_TOKEN_A_PASS
        if session.options.rule is not None and not session.one_token_a_pass:
            raise ValueError("beam search and assisted generation run at full depth; use adaptive_loop=False")
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache:
            cache = model_kwargs["past_key_values"] = LoopCache(self.config)
            cache.plan(session.options.max_loops, max_cache_length)
        elif cache is None and session.options.rule is not None:
            raise ValueError("use_cache is False: early exit needs the cache; use adaptive_loop=False")
        elif cache is not None and not isinstance(cache, LoopCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; a looped model needs a LoopCache")

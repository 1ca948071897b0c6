"""`generate` with depth: full depth, a fixed number of loops, or early exit that does not run the loops after the exit.

The loop over tokens, the logits processors, stopping criteria, streamers and beams are transformers' own. Added here:
depth arguments in (`looplm.model.depth`), a `LoopCache` inside, recorded depths out.
"""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from typing import Any, Literal

from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from looplm.exits import ExitRule
from looplm.model.cache import KVPolicy, LoopCache
from looplm.model.calibration import UNCALIBRATED, starting_threshold
from looplm.model.configuration import OuroConfig
from looplm.model.depth import DepthOptions, DepthSession

_ONE_TOKEN_A_PASS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_SESSION: ContextVar[DepthSession | None] = ContextVar("looplm_depth_session", default=None)


class _WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell the session which rows have ended, so that those are not run any more.

    Rows that the session has ended itself, because their numbers were not finite, end here too; beams change rows.
    """

    session: DepthSession

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.session.end(ended)
        return ~self.session.running(len(ended), ended.device) if self.session.one_token_a_pass else ended


class DepthGenerationMixin(GenerationMixin):
    """Overrides of transformers' `GenerationMixin`: depth arguments in, recorded depths out, a `LoopCache` inside."""

    config: OuroConfig

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        adaptive_loop: bool | None = None,
        num_loop_steps: int | Tensor | None = None,
        exit_threshold: float | Tensor | None = None,
        exit_rule: ExitRule | None = None,
        depth_budget: float | Tensor | None = None,
        min_loops: int | Tensor = 1,
        max_loops: int | Tensor | None = None,
        prefill: Literal["full", "adaptive"] = "full",
        kv_policy: KVPolicy = "per_loop",
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, at a depth of one's choice. Depth values are numbers, or (B,) one a row.

        Args:
            adaptive_loop: leave the loop early; by default where a threshold (here or configured), rule or budget is.
            num_loop_steps: loops at full depth; the configuration's `total_ut_steps` by default.
            exit_threshold, exit_rule: q of the paper's Q-exit in (0, 1], or any other rule of `looplm.exits`.
            depth_budget: mean loops a new token; the Q-exit threshold of each row is steered to it, from where the
                folder's calibration puts it (refused where that is of other weights) or from 0.5.
            min_loops, max_loops: limits of the adaptive depth; `max_loops` overrides `num_loop_steps`.
            prefill: `full` depth for the prompt, or `adaptive`: its positions stop by the rule too.
            kv_policy: `per_loop`, or one slot a layer after the prompt: `last`, `average`, `first`.
            **kwargs: everything transformers' `generate` takes.

        Returns:
            As transformers. With `return_dict_in_generate` also `exit_depths` (B, N) int64, the loop that each new
            token was read at, 0 after the end; `position_depths` (B, P + N - 1), that of every position run, 0 on
            padding and after the end, ready for `model(sequences[:, :-1], exit_depths=...)`; `exit_probabilities`
            (B, N, T), NaN beyond the exit, and `survival` (B, N) at it; `reached_depth` (B,), the mean depth;
            `errors`, a message a row that was ended because its numbers were not finite.

        Raises:
            ValueError: contradicting depth arguments, values out of range; FloatingPointError: no row stayed finite.
        """
        options = DepthOptions.gather(
            self.config,
            adaptive_loop=adaptive_loop,
            num_loop_steps=num_loop_steps,
            exit_threshold=exit_threshold,
            exit_rule=exit_rule,
            depth_budget=depth_budget,
            min_loops=min_loops,
            max_loops=max_loops,
            prefill=prefill,
            kv_policy=kv_policy,
            budget_start=UNCALIBRATED if depth_budget is None else starting_threshold(self, depth_budget),
        )
        return self._generate_at(options, inputs, generation_config, kwargs)

    def _generate_at(
        self,
        options: DepthOptions,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """transformers' `generate` in a session of these options, and what the session recorded."""
        _check_selection(options, kwargs)
        kwargs.pop("depth", None)  # assisted generation hands the main model's arguments to the assistant
        start, new_only = _prompt(inputs, kwargs)
        session = DepthSession(options, start)
        token = _SESSION.set(session)
        try:
            result = super().generate(inputs, generation_config, depth=session, **kwargs)  # type: ignore[misc]
        finally:
            _SESSION.reset(token)
        return _finish(result, session, 0 if new_only else start)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        session = _SESSION.get()
        if session is None:
            return criteria
        watched = _WatchedCriteria(criteria)
        watched.session = session
        return watched

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        session = model_kwargs.get("depth")
        if session is not None:
            session.record(outputs)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """A `LoopCache` of the right size; caches that know no loops are refused."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}; a looped model needs its own LoopCache: leave it out")
        session: DepthSession = model_kwargs["depth"]
        options = session.options
        session.eos_token_id = generation_config.eos_token_id
        session.one_token_a_pass = mode in _ONE_TOKEN_A_PASS
        if not session.one_token_a_pass and (options.adaptive or isinstance(options.max_loops, Tensor)):
            raise ValueError("beam search and assisted generation run at full depth; use adaptive_loop=False")
        if not session.one_token_a_pass and options.kv_policy != "per_loop":
            raise ValueError(
                f"kv_policy {options.kv_policy!r} has no parallel form, which beam search and assisted generation "
                "need; use kv_policy 'per_loop'"
            )
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        options.check_rows(batch_size * copies)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        # transformers drops a mask of ones, and ids may be the new ones only
        session.prompt_end = generation_config._mask_length if mask is None else mask.shape[1]
        if cache is None and generation_config.use_cache:
            cache = model_kwargs["past_key_values"] = LoopCache(self.config)
            cache.plan(options.num_loops, max_cache_length)
        elif cache is None and (options.adaptive or options.kv_policy != "per_loop"):
            raise ValueError("use_cache is False: early exit and KV policies need the cache; use adaptive_loop=False")
        elif cache is not None and not isinstance(cache, LoopCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; a looped model needs a LoopCache")
        if cache is not None:
            cache.check_policy(options.kv_policy)
            _check_filled(cache, mask, session.prompt_end)
        session.cache = cache


def _check_selection(options: DepthOptions, kwargs: dict[str, Any]) -> None:
    """The arguments that read a loop after running all of them do not go with early exit."""
    if kwargs.get("exit_at_step") is None and not kwargs.get("use_weighted_exit"):
        return
    if options.adaptive:
        raise ValueError("exit_at_step and use_weighted_exit run all loops; pass adaptive_loop=False with them")
    if isinstance(options.max_loops, Tensor):
        raise ValueError("exit_at_step and use_weighted_exit take one number of loops, not one a row")


def _prompt(inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[int, bool]:
    """Length of the prompt, and whether the sequences will hold the new tokens alone (a prompt of embeddings)."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    prompt = kwargs.get("inputs_embeds") if ids is None else ids
    if prompt is None:
        return 1, False  # without a prompt there is the bos token
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token (the bos token, for instance)")
    return prompt.shape[1], ids is None


def _check_filled(cache: LoopCache, mask: Tensor | None, prompt_end: int) -> None:
    """Refuse a cache that is no beginning of this prompt."""
    length = cache.get_seq_length()
    if length >= prompt_end:
        raise ValueError(
            f"past_key_values holds {length} positions, but the prompt has {prompt_end}; pass the whole conversation "
            "with at least one new token, or crop the cache"
        )
    if cache.depths is None:
        return
    unfilled = cache.depths == 0
    seen = unfilled if mask is None else unfilled & mask[:, :length].bool().to(unfilled.device)
    if bool(seen.any()):
        row, place = seen.nonzero()[0].tolist()
        raise ValueError(
            f"past_key_values has nothing at position {place} of row {row}, which had ended; "
            "put 0 there in attention_mask, or start from an empty cache"
        )


def _finish(result: Any, session: DepthSession, start: int) -> Any:
    """Add what was recorded to a result, blank rows that failed, and say so."""
    sequences = result if isinstance(result, Tensor) else result.sequences
    if session.errors:
        if len(session.errors) == len(sequences):
            raise FloatingPointError("; ".join(session.errors.values()))
        warnings.warn("; ".join(session.errors.values()), stacklevel=3)
    if isinstance(result, Tensor) or not session.steps:
        return result
    for name, value in session.recorded(sequences[:, start:]).items():
        result[name] = value
    result["errors"] = [session.errors.get(row) for row in range(len(sequences))]
    return result

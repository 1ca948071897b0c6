"""lm-eval's model class for looped models: every task at every depth, log-likelihoods of all depths from one pass.

`LoopedLM` is lm-eval's own `HFLM` with the two things that touch the model replaced: log-likelihoods come from
`looplm.evaluation.scoring` (as many depths as are asked for at once), generation goes through `generate` with its
depth arguments. Tokenising, prompts, stop texts, windows of rolling texts and chat templates stay lm-eval's. At full
depth the numbers are those of `HFLM` itself in fp32. Every answer can be kept on disk, so that a run goes on.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from looplm.evaluation.depths import Depth
from looplm.evaluation.forcing import score_forced
from looplm.evaluation.recipe import digest
from looplm.evaluation.scoring import Request, Scored, score_batches
from looplm.model.cache import KVPolicy
from looplm.model.modeling import OuroForCausalLM
from looplm.training.tracking import MetricsLog

logging.getLogger("lm_eval").setLevel(logging.ERROR)

Answer = dict[str, Any]
"""What is kept of one request at one depth: `sum` and `greedy`, or `text`; `read`, `read_loops`, `run`, `run_loops`."""


class AnswerStore:
    """Answers by list of requests, place in it and depth; one JSON line each in a file, where one is given.

    A line that a crash cut short is dropped, and everything before it counts: a run that is started again skips it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._answers: dict[tuple[str, str, int], Answer] = {}
        self._log = None if path is None else MetricsLog(path)
        if path is None or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the file is cut there before the next line is written
            self._answers[record["list"], record["depth"], record["place"]] = record["answer"]

    def get(self, name: str, depth: Depth, place: int) -> Answer | None:
        """The answer to request `place` of the list `name`, None where there is none."""
        return self._answers.get((name, _written(depth), place))

    def put(self, name: str, depth: Depth, place: int, answer: Answer) -> None:
        """Keep an answer."""
        self._answers[name, _written(depth), place] = answer
        if self._log is not None:
            self._log.write({"list": name, "depth": _written(depth), "place": place, "answer": answer})

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()


def _written(depth: Depth) -> str:
    """A depth with the loops that its rule may use."""
    return f"{depth.name}-of-{depth.loops}"


@dataclass
class Usage:
    """Loops that the answers of one depth took: over read positions, and over all that were processed."""

    read: int = 0
    read_loops: int = 0
    run: int = 0
    run_loops: int = 0

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        for name in ("read", "read_loops", "run", "run_loops"):
            setattr(self, name, getattr(self, name) + answer[name])

    def as_dict(self) -> dict[str, Any]:
        """Mean loops a read and a processed position, and how many there were."""
        return {
            "loops_read": self.read_loops / self.read if self.read else None,
            "loops_processed": self.run_loops / self.run if self.run else None,
            "positions_read": self.read,
            "positions_processed": self.run,
        }


@dataclass
class _Session:
    """What the answers so far took, and where progress is told."""

    usage: Usage = field(default_factory=Usage)
    report: Callable[[float, int], None] | None = None

    def tell(self, share: float, tokens: int) -> None:
        if self.report is not None:
            self.report(share, tokens)


class LoopedLM(HFLM):
    """A looped model for lm-eval, read at one depth at a time.

    Set `depth` to one of `depths` and hand the object to lm-eval; the log-likelihoods of the others are kept from the
    first pass.

    Args:
        model, tokenizer: as `looplm.model.loading.load_model` returns them.
        depths: every depth that will be asked for.
        kv_policy: `per_loop`; any other has no parallel form, so that texts are scored token by token.
        batch_size: rows in one pass.
        store: where answers are kept.
        seed: of sampled texts.
    """

    def __init__(
        self,
        model: OuroForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        depths: Sequence[Depth],
        *,
        kv_policy: KVPolicy = "per_loop",
        batch_size: int = 1,
        store: AnswerStore | None = None,
        seed: int = 0,
    ) -> None:
        if not depths:
            raise ValueError("no depth is given; evaluation needs at least one")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.depths, self.depth = tuple(depths), depths[-1]
        self.kv_policy, self.store, self.seed = kv_policy, store or AnswerStore(), seed
        self.session = _Session()

    @property
    def looped(self) -> OuroForCausalLM:
        """The model."""
        return cast("OuroForCausalLM", self.model)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval's, without bars of its own."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """As lm-eval's, without bars of its own."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """As lm-eval's, which needs a beginning or an end token, for tokenizers that have neither (the lab's) too."""
        if add_special_tokens is None and self.prefix_token_id is None:
            add_special_tokens = False
        return cast("list[int]", super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities and greedy match of each (texts, context tokens, continuation tokens)."""
        pairs = [self._fitting(context, target) for _, context, target in requests]
        name = digest(pairs)[:16]
        places = range(len(pairs))
        done = {n for n in places if all(self.store.get(name, depth, n) is not None for depth in self.depths)}
        tokens, left = 0, len(pairs) - len(done)
        for part in self._scored(pairs, override_bs or self.batch_size, done):
            for place, scored in part.items():
                if place in done:
                    continue
                for answer, depth in zip(_answers(scored), self.depths, strict=True):
                    self.store.put(name, depth, place, answer)
                tokens, left = tokens + scored.positions, left - 1
            self.session.tell(1 - left / len(pairs), tokens)
        return [(answer["sum"], answer["greedy"]) for answer in self._kept(name, places)]

    def _scored(self, pairs: list[Request], batch_size: int, done: set[int]) -> Any:
        if self.kv_policy == "per_loop":
            return score_batches(self.looped, pairs, self.depths, batch_size=batch_size, done=done)
        return score_forced(self.looped, pairs, self.depths, self.kv_policy, batch_size=batch_size, done=done)

    def _fitting(self, context: list[int], target: list[int]) -> Request:
        """Cut from the left to what the model's context holds, as lm-eval does."""
        if len(target) > self.max_length:
            raise ValueError(f"a continuation has {len(target)} tokens, but the context holds {self.max_length}")
        if context == [None]:
            raise ValueError(
                "a request has no context, and the tokenizer neither a beginning nor an end token to put before it: "
                "take another task, or give the tokenizer a bos_token"
            )
        whole = (context + target)[-(self.max_length + 1) :]
        return whole[: -len(target)], target

    def _kept(self, name: str, places: Sequence[int]) -> list[Answer]:
        answers = [self.store.get(name, self.depth, place) for place in places]
        for answer in answers:
            assert answer is not None
            self.session.usage.add(answer)
        return cast("list[Answer]", answers)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts behind prompts at the current depth; batches are fixed by the requests, each with a seed of its own."""
        check_generation([self.depth])
        if self.eot_token_id is None:
            raise ValueError("the tokenizer has no end token, so no text would end: give it an eos_token")
        arguments = [request.args for request in requests]
        self._check_room(arguments)
        name = digest([list(argument) for argument in arguments])[:16]
        order = sorted(range(len(requests)), key=lambda n: (digest(arguments[n][1]), -len(arguments[n][0]), n))
        tokens = 0
        for first in range(0, len(order), self.batch_size):
            part = _same_settings(order[first : first + self.batch_size], arguments)
            for places in part:
                if all(self.store.get(name, self.depth, place) is not None for place in places):
                    continue
                texts, used = self._texts([requests[place] for place in places], f"{name}-{places[0]}")
                for place, text, usage in zip(places, texts, used, strict=True):
                    self.store.put(name, self.depth, place, {"text": text, **vars(usage)})
                    tokens += usage.read
            self.session.tell(min((first + self.batch_size) / len(order), 1.0), tokens)
        return [answer["text"] for answer in self._kept(name, range(len(requests)))]

    def _check_room(self, arguments: Sequence[Any]) -> None:
        """Refuse answers that leave no room for a question; raises ValueError."""
        most = max((int(settings.get("max_gen_toks", self.max_gen_toks)) for _, settings in arguments), default=0)
        if most >= self.max_length:
            raise ValueError(
                f"the task writes up to {most} tokens, but the context of the model holds {self.max_length}, question "
                "included; take a model with a longer one (max_position_embeddings)"
            )

    def _texts(self, requests: list[Instance], name: str) -> tuple[list[str], list[Usage]]:
        """One batch of lm-eval's own generation, with what it took row by row."""
        torch.manual_seed(int(digest([self.seed, name])[:8], 16))
        self._used: list[Usage] = []
        order = sorted(
            range(len(requests)), key=lambda n: (-len(self.tok_encode(requests[n].args[0])), requests[n].args[0])
        )
        texts = super().generate_until(requests, disable_tqdm=True)
        used = [Usage()] * len(requests)
        for place, usage in zip(order, self._used, strict=True):
            used[place] = usage
        return texts, used

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """`generate` with the depth arguments; lm-eval's meaning of temperature 0 and of stop texts."""
        temperature = generation_kwargs.pop("temperature", 0.0)
        sampled = bool(generation_kwargs.pop("do_sample", temperature > 0)) and temperature > 0
        if sampled:
            generation_kwargs |= {"temperature": temperature, "top_k": generation_kwargs.get("top_k", 0)}
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        result = self.looped.generate(
            context,
            max_length=max_length,
            stopping_criteria=criteria,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=sampled,
            return_dict_in_generate=True,
            **self._depth_arguments(),
            **generation_kwargs,
        )
        depths, run = result.exit_depths, result.position_depths
        for row in range(len(depths)):
            read, ran = depths[row], run[row]
            counts = (int((read > 0).sum()), int(read.sum()), int((ran > 0).sum()), int(ran.sum()))
            self._used.append(Usage(*counts))
        return result.sequences

    def _depth_arguments(self) -> dict[str, Any]:
        depth = self.depth
        if depth.rule is None:
            return {"adaptive_loop": False, "num_loop_steps": depth.loops, "kv_policy": self.kv_policy}
        return {
            "exit_rule": depth.rule,
            "max_loops": depth.loops,
            "prefill": depth.prefill,
            "kv_policy": self.kv_policy,
        }


def check_generation(depths: Sequence[Depth]) -> None:
    """Refuse depths that a generation cannot have.

    Raises:
        ValueError: a rule that selects; generated tokens stop for good.
    """
    for depth in depths:
        if depth.rule is not None and depth.mode == "select":
            raise ValueError(
                f"exit rule {depth.written!r} selects, but this task generates text, where positions stop for good: "
                "use exit mode freeze"
            )


def _answers(scored: Scored) -> list[Answer]:
    """What is kept of a scored request, depth by depth."""
    sums = [float(row.sum()) for row in scored.log_probabilities]
    greedy, read = scored.greedy.all(1).tolist(), scored.read_depths.sum(1).tolist()
    run, count = scored.loops_run.tolist(), scored.read_depths.shape[1]
    return [
        {"sum": s, "greedy": g, "read": count, "read_loops": r, "run": scored.positions, "run_loops": n}
        for s, g, r, n in zip(sums, greedy, read, run, strict=True)
    ]


def _same_settings(places: Sequence[int], arguments: Sequence[Any]) -> list[list[int]]:
    """A batch split where the settings of the generation change."""
    parts: dict[str, list[int]] = {}
    for place in places:
        parts.setdefault(digest(arguments[place][1]), []).append(place)
    return list(parts.values())

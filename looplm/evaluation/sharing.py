"""What sharing keys and values between loops costs: the four policies of Ouro Table 14 on the same continuations.

The policies differ only where a new token sees earlier *new* ones, or the collapsed prompt: the first new token is read
off the prompt's own pass, which keeps every loop's keys under every policy. So a task of one token after a full prompt
tests nothing, and is refused; `FEWEST_TOKENS` new ones are the least.

    loss         nats a token of the text's own continuation, fed token by token under the policy (teacher-forced)
    agreement    share of greedily written tokens that equal those of `per_loop` at the same place, and how many come
                 before the first that does not
    exact match  share of questions whose greedy answer holds the right one (with items)
    bytes        keys and values in the cache at the end, all rows together, measured

The first new token is left out of loss and agreement. Intervals are 95 % bootstrap intervals over texts, paired.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from looplm.evaluation.items import Question
from looplm.evaluation.scoring import Request
from looplm.evaluation.tables import Table
from looplm.model.cache import KV_POLICIES, KVPolicy
from looplm.model.modeling import OuroForCausalLM
from looplm.training.bootstrap import interval, resampled

FEWEST_TOKENS = 16
"""New tokens at least."""

_NAMES = {
    "per_loop": "full (every loop's)",
    "last": "last step only",
    "average": "averaged",
    "first": "first step only",
}


@dataclass(frozen=True)
class PolicyRow:
    """One policy; intervals are None where nothing can differ (`per_loop` against itself).

    Attributes:
        loss: nats a token; above: the same less that of `per_loop`.
        agreement: share of tokens; prefix: mean number of equal tokens before the first other one.
        kv_bytes: at the end; reduction: `per_loop`'s over these.
        exact_match: share of questions, where there are any.
    """

    policy: KVPolicy
    loss: float
    above: float
    above_interval: tuple[float, float]
    agreement: float
    agreement_interval: tuple[float, float]
    prefix: float
    kv_bytes: int
    reduction: float
    exact_match: float | None = None


@dataclass(frozen=True)
class Sharing:
    """All policies on the same texts."""

    rows: list[PolicyRow]
    texts: int
    prompt_tokens: int
    new_tokens: int
    questions: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self, name: str) -> Table:
        """Table 14's rows."""
        header = ["policy", "nats a token", "above full", "equal tokens", "equal from the start", "KV bytes", "smaller"]
        header += ["exact match"] if self.questions else []
        rows = [tuple(_cells(row, self.new_tokens, bool(self.questions))) for row in self.rows]
        notes = [
            f"{self.texts} texts from {name}: {self.prompt_tokens} tokens of prompt at full depth, {self.new_tokens} "
            "new ones of which the first counts for nothing; 95 % intervals over texts.",
        ]
        if self.questions:
            notes.append(f"Exact match over {self.questions} questions.")
        return Table(
            "sharing keys and values between loops (as Ouro Table 14)", tuple(header), tuple(rows), tuple(notes)
        )


def _cells(row: PolicyRow, new_tokens: int, questions: bool) -> list[str]:
    low, high = row.above_interval
    least, most = row.agreement_interval
    cells = [
        _NAMES[row.policy],
        f"{row.loss:.4f}",
        f"{row.above:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{row.agreement:.3f} [{least:.3f}, {most:.3f}]",
        f"{row.prefix:.1f} of {new_tokens - 1}",
        f"{row.kv_bytes:,}",
        f"{row.reduction:.2f}x",
    ]
    return cells + ([f"{row.exact_match:.3f}" if row.exact_match is not None else "–"] if questions else [])


class _Forced(LogitsProcessor):
    """Feeds given tokens (B, N) to a greedy generation and keeps the log-probability each would have had."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.found = tokens, list[Tensor]()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with all but the given token impossible."""
        wanted = self.tokens[:, len(self.found), None].to(scores.device)
        log_p = (scores if scores.dtype == torch.float64 else scores.float()).log_softmax(-1)
        self.found.append(log_p.gather(1, wanted)[:, 0].cpu())
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, wanted, 0.0)  # type: ignore[return-value]


def check_new_tokens(count: int) -> None:
    """Refuse continuations that test nothing.

    Raises:
        ValueError: fewer than `FEWEST_TOKENS`.
    """
    if count < FEWEST_TOKENS:
        raise ValueError(
            f"new tokens are {count}; give at least {FEWEST_TOKENS}: the first one after a full prompt is read off the "
            "prompt's own keys under every policy, and tests nothing"
        )


def measure_sharing(
    model: OuroForCausalLM,
    windows: Sequence[Request],
    new_tokens: int,
    *,
    batch_size: int,
    seed: int = 0,
    questions: Sequence[Question] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> Sharing:
    """Run every policy on the same texts.

    Args:
        windows: of equal length; their last `new_tokens` tokens are the continuation, what is before them the prompt.
        questions: answered with at most `new_tokens` new tokens; need the tokenizer.

    Raises:
        ValueError: too few new tokens, texts that leave no prompt, or fewer than two texts.
    """
    check_new_tokens(new_tokens)
    texts = torch.tensor([context + target for context, target in windows])
    prompt_tokens = texts.shape[1] - new_tokens
    if prompt_tokens < 2:
        raise ValueError(f"texts of {texts.shape[1]} tokens leave {prompt_tokens} for the prompt; it needs 2 or more")
    parts: dict[KVPolicy, tuple[Tensor, Tensor, int]] = {}
    matches: dict[KVPolicy, float | None] = {}
    for number, policy in enumerate(KV_POLICIES, start=1):
        runs = [_run(model, batch, prompt_tokens, policy) for batch in texts.split(batch_size)]
        nats, written = (torch.cat([run[part] for run in runs]) for part in (0, 1))  # type: ignore[misc]
        parts[policy] = (nats, written, sum(run[2] for run in runs))
        matches[policy] = _exact_match(model, tokenizer, questions, new_tokens, policy)
        report(number / len(KV_POLICIES))
    rows = _rows(parts, matches, seed)
    return Sharing(rows, len(texts), prompt_tokens, new_tokens, len(questions))


def _run(model: OuroForCausalLM, texts: Tensor, prompt: int, policy: KVPolicy) -> tuple[Tensor, Tensor, int]:
    """Nats of the continuation (B, N - 1), what is written greedily (B, N - 1), and the cache's bytes."""
    ids = texts[:, :prompt].to(model.device)
    forced = _Forced(texts[:, prompt:])
    new = texts.shape[1] - prompt
    how: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "generation_config": GenerationConfig(max_new_tokens=new, do_sample=False),  # no end token: texts may hold it
        "adaptive_loop": False,
        "kv_policy": policy,
        "return_dict_in_generate": True,
    }
    result = model.generate(ids, logits_processor=LogitsProcessorList([forced]), **how)
    written = model.generate(ids, **how).sequences
    nats = -torch.stack(forced.found, dim=1)
    return nats[:, 1:].double(), written[:, prompt + 1 :].cpu(), result.past_key_values.num_bytes


def _exact_match(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    questions: Sequence[Question],
    new_tokens: int,
    policy: KVPolicy,
) -> float | None:
    """Share of questions whose greedy answer's first line is a right one, white space aside; None without questions."""
    if not questions:
        return None
    assert tokenizer is not None
    right = 0
    for question in questions:
        ids = torch.tensor([tokenizer.encode(question.prompt)], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            adaptive_loop=False, kv_policy=policy,
        )  # fmt: skip
        answer = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        right += answer.partition("\n")[0].strip() in [wanted.strip() for wanted in question.answers]
    return right / len(questions)


def _rows(
    parts: dict[KVPolicy, tuple[Tensor, Tensor, int]], matches: dict[KVPolicy, float | None], seed: int
) -> list[PolicyRow]:
    """A row a policy, compared with `per_loop` text by text."""
    full_nats, full_written, full_bytes = parts["per_loop"]
    weights = resampled(len(full_nats), seed)
    weights = weights / weights.sum(1, keepdims=True)
    rows = []
    for policy, (nats, written, size) in parts.items():
        same = written == full_written
        above = weights @ (nats - full_nats).mean(1).numpy()
        equal = weights @ same.double().mean(1).numpy()
        rows.append(
            PolicyRow(
                policy=policy,
                loss=float(nats.mean()),
                above=float(above[0]),
                above_interval=interval(above[1:]),
                agreement=float(equal[0]),
                agreement_interval=interval(equal[1:]),
                prefix=float(same.long().cumprod(1).sum(1).double().mean()),
                kv_bytes=size,
                reduction=full_bytes / size,
                exact_match=matches[policy],
            )
        )
    return rows


def table_14() -> Table:
    """The paper's own numbers, to set beside: Ouro-1.4B base."""
    rows = (
        ("full (every loop's)", "78.92", "82.40", "1.00x"),
        ("first step only", "18.73", "8.43", "4.00x"),
        ("last step only", "78.85", "80.40", "4.00x"),
        ("averaged", "78.73", "78.52", "4.00x"),
    )
    return Table("Ouro Table 14 (1.4B base)", ("policy", "GSM8K", "MATH-500", "smaller"), rows)

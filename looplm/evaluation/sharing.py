"""What sharing keys and values between loops costs: the four policies of Ouro Table 14 on the same continuations.

The policies differ only where a new token sees earlier *new* ones, or the collapsed prompt: the first new token is read
off the prompt's own pass, which keeps every loop's keys under every policy. So a task of one token after a full prompt
tests nothing, and is refused; `FEWEST_TOKENS` new ones are the least.

    loss         nats a token of the text's own continuation, fed token by token under the policy (teacher-forced)
    agreement    share of greedily written tokens that equal those of `per_loop` at the same place, and how many come
                 before the first that does not
    exact match  share of questions behind which the right answer is written (with items), whatever follows it; an
                 answer of fewer than `FEWEST_TOKENS` tokens is refused for the same reason
    bytes        keys and values in the cache at the end, all rows together, measured

The first new token is left out of loss and agreement. Intervals are 95 % bootstrap intervals over texts, paired.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from looplm.evaluation.drawings import Mark, trade_chart
from looplm.evaluation.forcing import Forced
from looplm.evaluation.intervals import Share, share
from looplm.evaluation.items import Question
from looplm.evaluation.paper import paper
from looplm.evaluation.scoring import Request, encode_pair
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
        exact_match: of the questions, with Wilson's interval, where there are any.
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
    exact_match: Share | None = None


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
            notes.append(f"Exact match over {self.questions} questions with answers of {FEWEST_TOKENS} tokens or more.")
        return Table(
            "sharing keys and values between loops (as Ouro Table 14)", tuple(header), tuple(rows), tuple(notes)
        )

    def charts(self) -> dict[str, str]:
        """Loss, equal tokens and, with questions, exact match, each against bytes; by caption."""
        most = max(row.kv_bytes for row in self.rows)
        axis = "bytes of keys and values, percent of the full cache"

        def chart(title: str, unit: str, mark: Callable[[PolicyRow, float], Mark]) -> str:
            marks = {_NAMES[row.policy]: mark(row, 100 * row.kv_bytes / most) for row in self.rows}
            return trade_chart(marks, title, unit, axis)

        loss, equal, exact = "Loss above that of the full cache", "Tokens equal to the full cache's", "Exact match"
        found = {
            loss: chart(loss, "nats a token", lambda row, place: Mark(place, row.above, *row.above_interval)),
            equal: chart(equal, "share of tokens", lambda row, at: Mark(at, row.agreement, *row.agreement_interval)),
        }
        return {**found, exact: chart(exact, "share of questions", _matched)} if self.questions else found


def _matched(row: PolicyRow, place: float) -> Mark:
    part = row.exact_match
    assert part is not None
    return Mark(place, part.hits / part.total, part.low, part.high)


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
    return cells + ([str(row.exact_match)] if questions else [])


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


def check_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], new_tokens: int) -> None:
    """Refuse questions whose answers are too short to test anything, or longer than what is written.

    Raises:
        ValueError: an answer of fewer than `FEWEST_TOKENS` or more than `new_tokens` tokens.
    """
    for question in questions:
        for answer in question.answers:
            count = len(encode_pair(tokenizer, question.prompt, f" {answer}")[1])
            if not FEWEST_TOKENS <= count <= new_tokens:
                raise ValueError(
                    f"question {question.id}: the answer {answer[:40]!r} has {count} tokens; policies are told apart "
                    f"by {FEWEST_TOKENS} or more, and no more than the {new_tokens} new tokens are written"
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
        ValueError: too few new tokens, texts that leave no prompt, fewer than two texts, or as `check_questions`.
    """
    check_new_tokens(new_tokens)
    if questions:
        assert tokenizer is not None
        check_questions(tokenizer, questions, new_tokens)
    texts = torch.tensor([context + target for context, target in windows])
    prompt_tokens = texts.shape[1] - new_tokens
    if prompt_tokens < 2:
        raise ValueError(f"texts of {texts.shape[1]} tokens leave {prompt_tokens} for the prompt; it needs 2 or more")
    parts: dict[KVPolicy, tuple[Tensor, Tensor, int]] = {}
    matches: dict[KVPolicy, Share] = {}
    for number, policy in enumerate(KV_POLICIES, start=1):
        runs = [_run(model, batch, prompt_tokens, policy) for batch in texts.split(batch_size)]
        nats, written = (torch.cat([run[part] for run in runs]) for part in (0, 1))  # type: ignore[misc]
        parts[policy] = (nats, written, sum(run[2] for run in runs))
        if questions:
            assert tokenizer is not None
            answers = _answers(model, tokenizer, questions, new_tokens, policy, batch_size)
            matches[policy] = exact_matches(questions, answers)
        report(number / len(KV_POLICIES))
    rows = _rows(parts, matches, seed)
    return Sharing(rows, len(texts), prompt_tokens, new_tokens, len(questions))


def _run(model: OuroForCausalLM, texts: Tensor, prompt: int, policy: KVPolicy) -> tuple[Tensor, Tensor, int]:
    """Nats of the continuation (B, N - 1), what is written greedily (B, N - 1), and the cache's bytes."""
    ids = texts[:, :prompt].to(model.device)
    forced = Forced(texts[:, prompt:].to(model.device), prompt)
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
    nats = -torch.stack(forced.log_probabilities, dim=1)
    return nats[:, 1:].double().cpu(), written[:, prompt + 1 :].cpu(), result.past_key_values.num_bytes


def _answers(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    new_tokens: int,
    policy: KVPolicy,
    batch_size: int,
) -> list[str]:
    """What is written greedily behind each question."""
    said: list[str] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for first in range(0, len(questions), batch_size):
        prompts = [tokenizer.encode(question.prompt) for question in questions[first : first + batch_size]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad,
            adaptive_loop=False, kv_policy=policy,
        )  # fmt: skip
        said += map(str, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
    return said


def exact_matches(questions: Sequence[Question], said: Sequence[str]) -> Share:
    """How many texts begin with a right answer, to the letter; small models do not stop there, so more may follow."""
    pairs = zip(questions, said, strict=True)
    return share(sum(any(_begins(text, answer) for answer in q.answers) for q, text in pairs), len(questions))


def _begins(text: str, answer: str) -> bool:
    """Whether a text begins with an answer that ends where a word or number does."""
    text, answer = text.strip(), answer.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def _rows(
    parts: dict[KVPolicy, tuple[Tensor, Tensor, int]], matches: dict[KVPolicy, Share], seed: int
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
                exact_match=matches.get(policy),
            )
        )
    return rows


def table_14() -> Table:
    """The paper's own numbers, to set beside: Ouro-1.4B base."""
    rows = tuple(
        (_NAMES[policy], f"{row['gsm8k']:.2f}", f"{row['math500']:.2f}", f"{row['memory']:.2f}x")
        for policy, row in paper()["kv_sharing"].items()
    )
    return Table("Ouro Table 14 (1.4B base)", ("policy", "GSM8K", "MATH-500", "smaller"), rows)

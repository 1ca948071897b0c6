"""What every loop makes of every token of a text: `trace` runs it once at full depth and writes down numbers.

For each token and loop t = 1..T: the read-out's best tokens (logit lens; in a looped model the model's own p^(t), Ouro
equation 1), its entropy, KL(p^(t) || p^(T)), the loss of the token that really follows (equation 2), the gate's hazard
and the exit distribution (equation 3), and how the state moved: ||h_t - h_(t-1)|| / ||h_(t-1)|| and cos(h_t, h_(t-1)).
For the text as a whole: linear CKA between the loops' states (Kornblith et al., 2019, arXiv 1905.00414). Everything
is fp32; logits are taken for a chunk of positions and one loop at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from looplm.exits import entropy, exit_probabilities, log_survival
from looplm.files import write_json
from looplm.model.modeling import OuroForCausalLM
from looplm.model.readout import LoopRun, divergence, run_loops

MEASURES = {
    "next_loss": "Next loss",
    "entropy": "Entropy",
    "kl_to_final": "KL to last",
    "hazard": "Hazard",
    "exit_probability": "Exit prob.",
    "change": "Change",
    "cosine": "Cosine",
}
"""The numbers of a `LoopReading` that tables show, and what they are called there."""


@dataclass(frozen=True)
class Candidate:
    """A token of the vocabulary and its probability in a read-out."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class LoopReading:
    """One token after one loop.

    Attributes:
        top: the read-out's best tokens, best first.
        gate_logit, hazard: of the exit gate, hazard = sigmoid(gate_logit); at the last loop it decides nothing.
        exit_probability: p_t of equation 3 over the loops that were run.
        entropy: of the read-out, nats.
        kl_to_final: KL(read-out of this loop || read-out of the last one), nats.
        next_loss: -log of the probability given to the token that follows in the text, nats; None at its end.
        change: relative L2 change of the state since the loop before; None at loop 1, whose predecessor, the core's
            input, is no loop's state.
        cosine: between the two states; None at loop 1.
    """

    top: tuple[Candidate, ...]
    gate_logit: float
    hazard: float
    exit_probability: float
    entropy: float
    kl_to_final: float
    next_loss: float | None
    change: float | None
    cosine: float | None


@dataclass(frozen=True)
class TokenTrace:
    """One token of the text and what each loop made of it; `loops[0]` is loop 1."""

    id: int
    text: str
    loops: tuple[LoopReading, ...]


@dataclass(frozen=True)
class Trace:
    """A text, token by token and loop by loop.

    Attributes:
        tokens: their texts join to the text; one of a character that several tokens make up stands with the last.
        cka: T x T linear CKA between the states of two loops over the text, in 0..1; None where states do not vary
            over the text (one token). Texts of fewer tokens than the state has dimensions push it towards 1.
        trained_loops: the configuration's `total_ut_steps`; loops beyond it are not what the model was trained for.
    """

    tokens: tuple[TokenTrace, ...]
    cka: tuple[tuple[float | None, ...], ...]
    trained_loops: int

    @property
    def loops(self) -> int:
        """T of the trace: how many loops were run."""
        return len(self.cka)

    def exit_depths(self, threshold: float) -> list[int]:
        """Where the paper's Q-exit stops each token (looplm.exits.QExit): the first loop with CDF(t) >= threshold.

        Raises:
            ValueError: a threshold outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it must lie in (0, 1]")
        gates = torch.tensor([[reading.gate_logit for reading in token.loops] for token in self.tokens])
        stops = log_survival(gates) <= torch.log1p(torch.tensor(-threshold, dtype=torch.float64))
        return (stops.int().argmax(-1) + 1).tolist()

    def mean(self, name: str) -> list[float | None]:
        """Mean of a number of `LoopReading` over the tokens that have it, one a loop; None where none has it."""
        columns = zip(*(token.loops for token in self.tokens), strict=True)
        given = [[getattr(reading, name) for reading in column] for column in columns]
        kept = [[value for value in values if value is not None] for values in given]
        return [sum(values) / len(values) if values else None for values in kept]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON, whole or not at all.

        Raises:
            OSError: a path that cannot be written.
        """
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """The trace that `save` wrote.

        Raises:
            ValueError: a file that holds no trace. OSError: one that cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            tokens = tuple(_token(token) for token in values["tokens"])
            return cls(tokens, tuple(tuple(row) for row in values["cka"]), values["trained_loops"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no trace ({error}); write one with `looplm trace --json`") from None


def _token(values: dict[str, Any]) -> TokenTrace:
    loops = [
        LoopReading(**{**reading, "top": tuple(Candidate(**best) for best in reading["top"])})
        for reading in values["loops"]
    ]
    return TokenTrace(values["id"], values["text"], tuple(loops))


def trace(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    loops: int | None = None,
    top_k: int = 5,
) -> Trace:
    """Run a text once through all loops and write down what each of them reads, decides and changes.

    Args:
        text: tokenised as it is, without special tokens of its own.
        loops: how many to run, the configuration's `total_ut_steps` by default; more than that warns. The exit
            distribution is that of a model which may go as deep as this.
        top_k: candidates kept a token and loop.

    Raises:
        ValueError: a text that is empty, no valid Unicode or longer than the context, `loops` below 1, `top_k` outside
            1..V.
        FloatingPointError: states that are not finite.
    """
    if not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k is {top_k}; it must lie in 1..{model.config.vocab_size}, the vocabulary")
    ids = _encode(tokenizer, text)
    run = run_loops(model, torch.tensor([ids]), loops, "the text")
    for loop, read in enumerate(run.reads, start=1):
        if not bool(torch.isfinite(read).all() and torch.isfinite(run.gate_logits[..., loop - 1]).all()):
            raise FloatingPointError(f"the states after loop {loop} are not finite; check the weights")
    numbers = {**_gates(run), **_motion(run), **_read(run, ids, top_k)}
    texts = _Texts(tokenizer)
    number = len(run.states)
    tokens = tuple(
        TokenTrace(token, piece, tuple(_reading(numbers, texts, place, loop) for loop in range(number)))
        for place, (token, piece) in enumerate(zip(ids, pieces(tokenizer, ids), strict=True))
    )
    return Trace(tokens, linear_cka([state[0] for state in run.states]), model.config.total_ut_steps)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is no valid Unicode at character {error.start}; give it as UTF-8") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the text is empty; give some text to trace")
    return ids


class _Texts:
    """The text of single tokens, each decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = str(self.tokenizer.decode([token]))
        return self.known[token]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token, special ones included; a character of several tokens is shown with the last of them."""
    found, pending = [], []
    for place, token in enumerate(ids, start=1):
        pending.append(token)
        text = str(tokenizer.decode(pending))
        whole = not text.endswith("�") or place == len(ids)
        found.append(text if whole else "")
        pending = [] if whole else pending
    return found


def _reading(numbers: dict[str, list[Any]], texts: _Texts, place: int, loop: int) -> LoopReading:
    """The reading of one token after loop `loop` (here counted from 0) from lists (T, S)."""
    own = {name: values[loop][place] for name, values in numbers.items()}
    best = zip(own.pop("ids"), own.pop("probabilities"), strict=True)
    return LoopReading(top=tuple(Candidate(token, texts(token), p) for token, p in best), **own)


def _gates(run: LoopRun) -> dict[str, list[Any]]:
    gates = run.gate_logits[0]
    found = {"gate_logit": gates, "hazard": gates.sigmoid(), "exit_probability": exit_probabilities(gates)}
    return {name: values.T.tolist() for name, values in found.items()}


def _motion(run: LoopRun) -> dict[str, list[Any]]:
    """Change and cosine from loop to loop, (T, S), None at loop 1."""
    change, cosine = [[None] * run.gate_logits.shape[1]], [[None] * run.gate_logits.shape[1]]
    for before, after in zip(run.states, run.states[1:], strict=False):
        old, new = before[0].float(), after[0].float()
        change.append(((new - old).norm(dim=-1) / old.norm(dim=-1)).tolist())
        cosine.append(cosine_similarity(new, old, dim=-1).tolist())
    return {"change": change, "cosine": cosine}


def _read(run: LoopRun, ids: list[int], top_k: int) -> dict[str, list[Any]]:
    """Everything that needs the vocabulary, (T, S), a chunk of positions and one loop at a time."""
    last = len(run.reads)
    names = ("ids", "probabilities", "entropy", "kl_to_final", "next_loss")
    found: dict[str, list[Any]] = {name: [[] for _ in range(last)] for name in names}
    following = torch.tensor([*ids[1:], ids[-1]], device=run.gate_logits.device)
    for part in run.chunks():
        final = run.log_probabilities(last, part)
        for loop in range(1, last + 1):
            log_p = final if loop == last else run.log_probabilities(loop, part)
            best = log_p.topk(top_k)
            losses = -log_p.gather(-1, following[part, None])[:, 0]
            measured = (best.indices, best.values.exp(), entropy(log_p), divergence(log_p, final), losses)
            for name, values in zip(names, measured, strict=True):
                found[name][loop - 1] += values.tolist()
    for losses in found["next_loss"]:
        losses[-1] = None
    return found


def linear_cka(states: Sequence[Tensor]) -> tuple[tuple[float | None, ...], ...]:
    """Linear CKA of every pair of matrices (N, D): ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred.

    Returns:
        A symmetric table of numbers in 0..1, 1 where one matrix is the other turned and scaled; None where either does
        not vary over its rows (by more than rounding).
    """
    centred = []
    for state in states:
        wide = state.float()
        moved = wide - wide.mean(0)
        size = moved.norm()
        centred.append(moved / size if bool(size > 1e-5 * wide.norm()) else None)
    number = len(states)
    shared = [[0.0] * number for _ in range(number)]
    for i, x in enumerate(centred):
        for j, y in enumerate(centred[: i + 1]):
            if x is not None and y is not None:
                shared[i][j] = shared[j][i] = float((x.T @ y).square().sum())
    own = [shared[i][i] for i in range(number)]
    return tuple(
        tuple(min(shared[i][j] / math.sqrt(own[i] * own[j]), 1.0) if own[i] and own[j] else None for j in range(number))
        for i in range(number)
    )

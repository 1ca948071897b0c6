"""Is this checkpoint whole, does it compute, is it trained, and do its loops help: checks that end in a verdict.

For people who have a released checkpoint (Ouro section 4.1, Table 2), on their own machine, before anything depends on
it. What is checked, in this order; a failure of one of the first two ends the run, because the rest would mean nothing:

    weights      names, shapes and count, from the files' headers
    loading      every weight finite, tokenizer there
    precision    fp32 against bf16 at a few positions: KL of at most 0.1 nats
    training     the best loop's loss is at most 0.8 ln V. Guessing evenly costs ln V; knowing nothing but how frequent
                 each token is costs 0.62 ln V on American speeches in Ouro's 49,152 tokens
    loops        the loss falls from loop to loop up to the trained T (each at most 0.01 nats above the one before, the
                 last below the first), as Table 10 has it for accuracies; beyond T it usually rises, which is shown

The limits are ours; the paper gives none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

import looplm
from looplm.model.checkpoint import RELEASED, differences, local_folder, stored_weights
from looplm.model.configuration import OuroConfig
from looplm.model.loading import load_config, load_model
from looplm.model.measuring import TextMeasurement, encode_text, measure_text
from looplm.model.modeling import OuroForCausalLM
from looplm.model.precision import Agreement, compare_precision, computing_in

MOST_DIVERGENCE = 0.1
MOST_OF_GUESSING = 0.8
MOST_RISE = 0.01

LOOPS = 6
"""Loops measured, or the trained number where that is more."""

Result = Literal["pass", "FAIL", "note"]


@dataclass(frozen=True)
class Check:
    """One question, its answer, and what was found."""

    name: str
    result: Result
    finding: str


@dataclass
class Verification:
    """All that was found out about a checkpoint; `record()` is what `--json` writes."""

    model: str
    config: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    agreement: Agreement | None = None
    measurement: TextMeasurement | None = None
    verdict: str = ""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.result != "FAIL" for check in self.checks)

    def record(self) -> dict[str, Any]:
        """Everything as plain values, with the versions of the packages that computed it."""
        versions = {name: version(name) for name in ("torch", "transformers")}
        return {**asdict(self), "passed": self.passed, "versions": {"looplm": looplm.__version__, **versions}}


def verify_model(name_or_path: str, text: str, progress: Callable[[float], None] | None = None) -> Verification:
    """Check a model folder or hub model.

    Args:
        text: to measure on.
        progress: told the share of the text that is done.

    Raises:
        ValueError: there is no looped model of that name at all, or the text is too short.
    """
    config = load_config(name_or_path)
    folder = local_folder(name_or_path)
    report = Verification(name_or_path, _summary(config))
    report.checks += check_weights(folder, config)
    if report.passed:
        try:
            model, tokenizer = load_model(str(folder))
        except ValueError as error:
            report.checks.append(Check("loading", "FAIL", str(error)))
        else:
            report.checks += [Check("loading", "pass", "every weight is finite; a tokenizer is there")]
            report.checks.append(check_tokens(config))
            _measure(report, model, tokenizer, text, progress)
    report.verdict = _verdict(report)
    return report


def check_weights(folder: Path, config: OuroConfig) -> list[Check]:
    """Names, shapes and count of the stored weights."""
    try:
        stored = stored_weights(folder)
    except ValueError as error:
        return [Check("weights", "FAIL", str(error))]
    faults = differences(config, stored)
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        return [Check("weights", "FAIL", "; ".join(faults[:3]) + more)]
    which = f", exactly those of {RELEASED[stored.parameters]}" if stored.parameters in RELEASED else ""
    found = (
        f"{len(stored.shapes)} weights, {stored.parameters:,} parameters{which}; stored as {'/'.join(stored.dtypes)}"
    )
    return [Check("weights", "pass", found)]


def check_tokens(config: OuroConfig) -> Check:
    """Begin, end and padding token: the released files give all three one id, which chats cannot do with."""
    tokens = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    found = "bos {}, eos {}, pad {}".format(*("none" if token is None else token for token in tokens))
    if tokens[0] == tokens[1]:
        found += ": bos and eos are one token; `looplm convert` sets those of ChatML"
    return Check("tokens", "note", found)


def check_precision(agreement: Agreement) -> Check:
    """fp32 against bf16."""
    fine = agreement.divergence <= MOST_DIVERGENCE  # False for NaN
    found = (
        f"fp32 and bf16 prefer the same token at {agreement.same_token} of {agreement.positions} positions, "
        f"KL {agreement.divergence:.2g} nats (at most {MOST_DIVERGENCE})"
    )
    return Check("precision", "pass" if fine else "FAIL", found)


def check_training(losses: Sequence[float], vocab_size: int) -> Check:
    """Whether the best loop knows more than nothing."""
    best, limit = min(losses), MOST_OF_GUESSING * math.log(vocab_size)
    trained = all(map(math.isfinite, losses)) and best <= limit
    found = f"best loss {best:.3f} nats; guessing evenly costs {math.log(vocab_size):.3f}"
    return Check("training", "pass" if trained else "FAIL", found if trained else f"{found}: weights look untrained")


def check_loops(losses: Sequence[float], trained: int) -> Check:
    """Whether the loss falls up to the trained number of loops."""
    inside = losses[:trained]
    lowest = 1 + min(range(len(losses)), key=losses.__getitem__)
    if trained == 1:
        return Check("loops", "note", "the model has one loop, so there is nothing to compare")
    falls = inside[-1] < inside[0] and all(later <= earlier + MOST_RISE for earlier, later in pairwise(inside))
    found = f"{inside[0]:.3f} nats after loop 1, {inside[-1]:.3f} after loop {trained}; lowest after loop {lowest}"
    return Check("loops", "pass" if falls else "FAIL", found)


def _measure(
    report: Verification,
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    progress: Callable[[float], None] | None,
) -> None:
    """What only a run of the model tells."""
    trained = model.config.total_ut_steps
    report.agreement = compare_precision(model, encode_text(model, tokenizer, text))
    report.checks.append(check_precision(report.agreement))
    wide = torch.float32 if model.dtype == torch.float16 else model.dtype  # no loss is taken in fp16
    with computing_in(model, wide):
        measured = measure_text(model, tokenizer, text, max(LOOPS, trained), progress)
    report.measurement = measured
    report.checks.append(check_training(measured.losses[:trained], model.config.vocab_size))
    report.checks.append(check_loops(measured.losses, trained))
    shares = ", ".join(f"{share:.3f}" for share in measured.exit_probabilities)
    found = f"{shares} after loops 1..{trained}; expected depth {measured.expected_depth:.2f}"
    report.checks.append(Check("exits", "note", found))


def _verdict(report: Verification) -> str:
    failed = {check.name for check in report.checks if check.result == "FAIL"}
    if failed & {"weights", "loading"}:
        return "the checkpoint is incomplete or damaged"
    if "precision" in failed:
        return "fp32 and bf16 disagree: the weights or this machine's arithmetic are at fault"
    if "training" in failed:
        return "the structure is right, but the weights look untrained"
    if "loops" in failed:
        return "trained, but the loss does not fall loop by loop to the trained depth"
    return "whole, trained, and better with every loop up to the trained depth"


def _summary(config: OuroConfig) -> dict[str, Any]:
    names = "num_hidden_layers total_ut_steps hidden_size num_attention_heads num_key_value_heads vocab_size"
    extra = "num_prelude_layers num_coda_layers max_position_embeddings rope_theta early_exit_threshold"
    return {name: getattr(config, name) for name in f"{names} {extra}".split()}

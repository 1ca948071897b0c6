"""The faithfulness study (Ouro section 7.2): when is a loop's answer there, do loops agree, does the answer follow?

Three parts over the same two-choice questions:

    agreement      A[i, j], questions on which the answers after loops i and j are equal (the paper's Figure 9: 551 of
                   1,000 for loops 2 and 3)
    probes         how well the answer of loop i is ranked from the state after every layer of loops 1..i, beside the
                   answer of loop i - 1, a planted bit and shuffled answers (see `probes`)
    interventions  whether the final answer follows a replaced state (see `interventions`); the paper has no such test

The paper reads "the probe at the end of loop i - 1 does not predict the answer of loop i" as faithful. That needs items
whose answers flip, and a probe that finds what certainly is there: both are in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from looplm.evaluation.answers import Answers, TwoChoice, read_answers
from looplm.evaluation.intervals import Share, share
from looplm.evaluation.interventions import Interchange, interchange
from looplm.evaluation.probes import (
    FEWEST_OF_A_KIND,
    FOLDS,
    Auc,
    Groups,
    Labels,
    auc,
    cross_fitted,
    folds_of,
    planted,
    shuffled,
)
from looplm.model.modeling import OuroForCausalLM

Report = Callable[[float], None]


@dataclass(frozen=True)
class Probe:
    """A probe on the state after one layer of one loop for the answer of loop `answer`.

    Attributes:
        answer: the loop whose answer is predicted; loop, layer: where the state is from; all counted from 1.
        all, flipped, given_previous: see `looplm.evaluation.probes`; the last two are None for loop 1's answer.
    """

    answer: int
    loop: int
    layer: int
    all: Auc
    flipped: Auc | None
    given_previous: Auc | None


@dataclass(frozen=True)
class Baseline:
    """ "The answer of loop i - 1" as a prediction of the answer of loop i, and how often the two differ."""

    answer: int
    all: Auc
    flips: Share


@dataclass(frozen=True)
class Control:
    """What probes find at a place where the truth is known.

    Attributes:
        planted: of a random bit written into the states: near 1 where probes can find anything.
        shuffled: of the last loop's answers given to other items: near 1/2.
    """

    loop: int
    layer: int
    planted: Auc
    shuffled: Auc


@dataclass(frozen=True)
class Faithfulness:
    """What the study found.

    Attributes:
        items, loops, layers: N, T and L; trained_loops: of the configuration.
        second: questions answered with the second choice after each loop.
        accuracy: share of right answers after each loop; None where they are not known.
        agreement: T x T counts.
        skipped: loops whose answers are too much alike for a probe.
        probes, baselines, controls, interventions: see there.
    """

    items: int
    loops: int
    layers: int
    trained_loops: int
    second: list[int]
    accuracy: list[Share] | None
    agreement: list[list[int]]
    skipped: list[int]
    baselines: list[Baseline]
    probes: list[Probe]
    controls: list[Control]
    interventions: list[Interchange]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def study(
    model: OuroForCausalLM,
    questions: Sequence[TwoChoice],
    *,
    loops: int | None = None,
    interventions: int = 200,
    seed: int = 0,
    report: Callable[[str, float], None] = lambda phase, share: None,
) -> Faithfulness:
    """Run the three parts.

    Args:
        loops: T, the configuration's `total_ut_steps` by default.
        interventions: targets at most; each is patched twice a loop. 0 leaves the part out.
        report: called with the phase and the share of it that is done.

    Raises:
        ValueError: fewer than two loops, too few questions to fit a probe, or a question the model cannot run.
    """
    loops = model.config.total_ut_steps if loops is None else loops
    if loops < 2:
        raise ValueError(f"loops is {loops}; answers of loops are compared, so run 2 or more")
    if len(questions) < 2 * FEWEST_OF_A_KIND:
        raise ValueError(f"{len(questions)} items; probes need {2 * FEWEST_OF_A_KIND} at least")
    answers = read_answers(model, questions, loops, lambda part: report("reading", part))
    given = answers.given.numpy()
    probes, controls = _probes(answers, seed, lambda part: report("probes", part))
    effects = []
    if interventions:
        effects = interchange(
            model, questions, answers, interventions, seed=seed, report=lambda part: report("interventions", part)
        )
    return Faithfulness(
        len(questions),
        loops,
        model.config.num_hidden_layers,
        model.config.total_ut_steps,
        given.sum(0).tolist(),
        accuracy(given, questions),
        agreement(given),
        [loop for loop in range(1, loops + 1) if _alike(given[:, loop - 1])],
        baselines(given),
        probes,
        controls,
        effects,
    )


def agreement(given: Labels) -> list[list[int]]:
    """A[i, j], how many of the N items have equal answers after loops i and j; `given` is (N, T)."""
    return (given[:, :, None] == given[:, None, :]).sum(0).tolist()


def accuracy(given: Labels, questions: Sequence[TwoChoice]) -> list[Share] | None:
    """The share of right answers after each loop; None where a right answer is not known."""
    right = [question.answer for question in questions]
    if None in right:
        return None
    hits = (given == np.array(right)[:, None]).sum(0)
    return [share(int(count), len(questions)) for count in hits]


def baselines(given: Labels) -> list[Baseline]:
    """Loops 2..T: how well the answer before ranks the items, and how many answers flip."""
    found = []
    for loop in range(2, given.shape[1] + 1):
        before, now = given[:, loop - 2], given[:, loop - 1]
        found.append(Baseline(loop, auc(before.astype(np.float64), now), share(int((before != now).sum()), len(given))))
    return found


def _alike(labels: Labels) -> bool:
    return min(int(labels.sum()), int((~labels).sum())) < FEWEST_OF_A_KIND


def _probes(answers: Answers, seed: int, report: Report) -> tuple[list[Probe], list[Control]]:
    """A probe for every answer and every place up to it, and the controls of every place."""
    given, (count, loops, layers, _) = answers.given.numpy(), answers.layers.shape
    folds = folds_of(count, FOLDS, seed)
    probes: list[Probe] = []
    controls: list[Control] = []
    for loop in range(1, loops + 1):
        for layer in range(1, layers + 1):
            features = answers.layers[:, loop - 1, layer - 1].numpy()
            controls.append(_control(features, given[:, -1], folds, loop, layer, seed))
            for answer in range(loop, loops + 1):
                found = cross_fitted(features, given[:, answer - 1], folds)
                if found is not None:
                    probes.append(_probe(found, given, folds, answer, loop, layer))
            report(((loop - 1) * layers + layer) / (loops * layers))
    return sorted(probes, key=lambda probe: (probe.answer, probe.loop, probe.layer)), controls


def _probe(scores: Any, given: Labels, folds: Groups, answer: int, loop: int, layer: int) -> Probe:
    """The three areas of a probe's cross-fitted scores (N,)."""
    now = given[:, answer - 1]
    whole = auc(scores, now, [folds])
    if answer == 1:
        return Probe(answer, loop, layer, whole, None, None)
    before = given[:, answer - 2]
    flip = before != now
    return Probe(
        answer,
        loop,
        layer,
        whole,
        auc(scores[flip], now[flip], [folds[flip]]),
        auc(scores, now, [folds, before.astype(np.int64)]),
    )


def _control(features: Any, final: Labels, folds: Groups, loop: int, layer: int, seed: int) -> Control:
    """Both controls at a place. A control that cannot be fitted has an empty `Auc`."""
    own = seed + 1000 * loop + layer
    with_bit, bit = planted(features, own)
    found = []
    for data, labels in ((with_bit, bit), (features, shuffled(final, own))):
        scores = cross_fitted(data, labels, folds)
        found.append(Auc(None, None, None, 0, 0) if scores is None else auc(scores, labels, [folds]))
    return Control(loop, layer, *found)

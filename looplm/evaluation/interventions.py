"""Does the answer follow a loop's state? Interchange interventions on two-choice questions, with a control.

Ouro section 7.2 reads from probes that a loop's answer is computed inside that loop. Probes show what can be read, not
what is used. Here the state after loop t at the last position of a prompt is replaced by that of another question whose
final answer is the other one (Geiger et al., 2021, arXiv 2106.02997; `looplm.model.patching`), the later loops run, and
we count how often the final answer becomes the source's.

The control replaces it by the state of a random question with the *same* final answer: answers that turn under it turn
because a foreign state disturbs the run. What the answer in the state does is the difference of the two shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from looplm.evaluation.answers import Answers, TwoChoice, batches, beyond_training, margins_of, padded
from looplm.evaluation.intervals import Share, share
from looplm.evaluation.probes import Labels
from looplm.model.hooks import loop_hook
from looplm.model.modeling import OuroForCausalLM


@dataclass(frozen=True)
class Interchange:
    """Interventions after one loop.

    Attributes:
        loop: counted from 1; the state at the last position is replaced after it.
        followed: final answers that turned into the source's, which is the other one.
        control: final answers that turned although the source has the same one.
    """

    loop: int
    followed: Share
    control: Share


@dataclass(frozen=True)
class Drawn:
    """Places of K targets, of a source for each with the other final answer, and of one with the same."""

    targets: list[int]
    other: list[int]
    same: list[int]


def draw_sources(final: Labels, count: int, seed: int) -> Drawn:
    """Draw targets without replacement and sources for them; none where an answer is given less than twice.

    Args:
        final: (N,) bool, the answers after the last loop.
        count: targets at most.
    """
    draw = np.random.default_rng(seed)
    of = {answer: np.flatnonzero(final == answer) for answer in (False, True)}
    if min(map(len, of.values())) < 2:
        return Drawn([], [], [])
    targets = draw.permutation(len(final))[:count].tolist()
    other = [int(draw.choice(of[not final[target]])) for target in targets]
    same = [int(draw.choice(of[bool(final[target])][of[bool(final[target])] != target])) for target in targets]
    return Drawn(targets, other, same)


def interchange(
    model: OuroForCausalLM,
    questions: Sequence[TwoChoice],
    answers: Answers,
    count: int,
    *,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> list[Interchange]:
    """Interventions after every loop but the last, behind which nothing is left to follow.

    Args:
        answers: of the same model and questions; its loops are those that are run.
        count: targets at most, each patched twice a loop.
    """
    final = answers.given[:, -1].numpy()
    drawn, loops, found = draw_sources(final, count, seed), answers.margins.shape[1], []
    for loop in range(1, loops):
        turned = []
        for arm, sources in enumerate((drawn.other, drawn.same)):
            new = patched_answers(model, questions, drawn.targets, answers.states[sources, loop - 1], loop, loops)
            turned.append(sum(a != b for a, b in zip(new, final[drawn.targets].tolist(), strict=True)))
            report((2 * (loop - 1) + arm + 1) / (2 * (loops - 1)))
        found.append(Interchange(loop, *(share(hits, len(drawn.targets)) for hits in turned)))
    return found


@torch.no_grad()
def patched_answers(
    model: OuroForCausalLM,
    questions: Sequence[TwoChoice],
    targets: Sequence[int],
    donors: Tensor,
    loop: int,
    loops: int,
) -> list[bool]:
    """The final answers of targets whose state after `loop` at the last position is replaced.

    Args:
        targets: places of K questions.
        donors: (K, D), the states to put there.
    """
    new: dict[int, bool] = {}
    for places in batches([len(questions[target].prompt) for target in targets]):
        chosen = [questions[targets[place]] for place in places]
        ids, last = padded([question.prompt for question in chosen])
        every = torch.arange(len(places))

        def replace(state: Tensor, _: int, places=places, every=every, last=last) -> Tensor:  # type: ignore[no-untyped-def]
            state = state.clone()
            state[every, last] = donors[places].to(state)
            return state

        with loop_hook(model, replace, loop), beyond_training():
            read = model.model(ids.to(model.device), num_loop_steps=loops).last_hidden_state
        margins = margins_of([read], model.lm_head.weight, last, chosen)
        new |= zip(places, (margins[:, 0] > 0).tolist(), strict=True)
    return [new[place] for place in range(len(targets))]

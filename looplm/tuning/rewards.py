"""The rewards of rollouts: weighted sums of scores, with every sample that could not be scored counted and named.

What is not this package's own code (math-verify, reasoning-gym's scorers, a user's function, a regular expression) runs
in worker processes with a time limit (`looplm.tuning.scoring`). An answer that math-verify or a family cannot read is
wrong, and so is one over which it does not come to an end. Anything else that goes wrong makes the sample NaN; the run
goes on until too many of a call are.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from looplm.tuning.environments import Environment
from looplm.tuning.problems import Problem, RewardSettings, Score, Scores
from looplm.tuning.scorers import open_format, open_math_verify, open_python
from looplm.tuning.scoring import Job, Opener, Result, ScoringPool, result_of

_FEW = 4
"""Fewer faults than this are never too many."""
_SHOWN = 60
"""Characters of a prompt in the name of a sample."""


class Rewards:
    """All rewards of a recipe, called with problems and completions; close it, or use it as a context.

    Args:
        settings: at least one reward; the first is the outcome unless another says so.
        environment: whose problems are scored.
        patience: the share of faulty samples of a call, more than which (and more than 3) end the run.

    Attributes:
        names: of the rewards, the keys of `Scores.parts`.
        outcome: the name of the one that is the outcome.

    Raises:
        ValueError: no reward, two outcomes, a reward that does not fit the environment or cannot be opened.
    """

    def __init__(self, settings: Sequence[RewardSettings], environment: Environment, *, patience: float = 0.1):
        _check(settings, environment, patience)
        self._settings, self._patience = list(settings), patience
        self.names = _names(settings)
        chosen = [place for place, reward in enumerate(settings) if reward.outcome]
        self.outcome = self.names[chosen[0] if chosen else 0]
        self._here: dict[int, Score] = {}
        self._there: list[int] = []
        for place, reward in enumerate(settings):
            if reward.scorer == "environment" and not environment.isolated:
                self._here[place] = environment.open_score()
            else:
                self._there.append(place)
        openers = [_opener(settings[place], environment) for place in self._there]
        self._pool = ScoringPool(openers, [settings[place].seconds for place in self._there]) if openers else None

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> Scores:
        """Score completions, one a problem.

        Args:
            problems: N, repeated where several completions answer one.
            texts: N, without special tokens.
            token_ids: N, the tokens of each.

        Raises:
            ValueError: lengths that differ, or a reward that fails on too many samples.
        """
        if not len(problems) == len(texts) == len(token_ids):
            raise ValueError(
                f"{len(problems)} problems, {len(texts)} texts, {len(token_ids)} lists of tokens: not as many"
            )
        tally = _Tally(self.names, self._settings, problems, self._patience)
        samples = [(problem, text, list(ids)) for problem, text, ids in zip(problems, texts, token_ids, strict=True)]
        results = self._results(samples, tally)
        parts = {name: tally.values(place, results[place]) for place, name in enumerate(self.names)}
        weights = [reward.weight for reward in self._settings]
        totals = [
            math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
            for values in zip(*parts.values(), strict=True)
        ]
        faults = [sentence for place in sorted(tally.faults) for _, sentence in sorted(tally.faults[place].items())]
        return Scores(totals, parts[self.outcome], parts, faults, tally.unparseable)

    def _results(self, samples: Sequence[tuple[Problem, str, list[int]]], tally: "_Tally") -> dict[int, list[Result]]:
        """Of each reward, by its place, the results of all samples."""
        results: dict[int, list[Result]] = {}
        for place, score in self._here.items():
            results[place] = [result_of(score, Job(0, *sample)) for sample in samples]
            for number, result in enumerate(results[place]):
                tally.add(place, number, result)
        if self._pool is not None:
            jobs = [Job(number, *sample) for number in range(len(self._there)) for sample in samples]

            def on_result(number: int, result: Result) -> None:
                tally.add(self._there[number // len(samples)], number % len(samples), result)

            done = self._pool.run(jobs, on_result)
            for number, place in enumerate(self._there):
                results[place] = done[number * len(samples) : (number + 1) * len(samples)]
        return results

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(settings: Sequence[RewardSettings], environment: Environment, patience: float) -> None:
    if not settings:
        raise ValueError("rewards is empty; give at least one, e.g. {scorer: environment}")
    outcomes = [reward.name for reward in settings if reward.outcome]
    if len(outcomes) > 1:
        raise ValueError(f"the rewards {' and '.join(outcomes)} both have outcome: true; one is the outcome")
    if not 0 <= patience <= 1:
        raise ValueError(f"patience is {patience}; give a share of samples, 0 to 1")
    texts = next(
        (reward.name for reward in settings if reward.scorer == "math-verify" or reward.format is not None), None
    )
    if texts is not None and environment.train[0].answer_tokens is not None:
        raise ValueError(f"reward {texts} reads text, and {environment.name} has tokens; use scorer: environment")


def _names(settings: Sequence[RewardSettings]) -> list[str]:
    """Names of rewards, numbered where two are the same."""
    names: list[str] = []
    for reward in settings:
        same = sum(other.name == reward.name for other in settings[: len(names)])
        names.append(f"{reward.name}-{same + 1}" if same else reward.name)
    return names


def _opener(reward: RewardSettings, environment: Environment) -> Opener:
    if reward.python is not None:
        path, _, function = reward.python.rpartition(":")
        return partial(open_python, Path(path).resolve(), function)
    if reward.format is not None:
        return partial(open_format, reward.format)
    return open_math_verify if reward.scorer == "math-verify" else environment.open_score


class _Tally:
    """What went wrong in a call so far.

    Attributes:
        faults: of each reward by its place, a sentence for each faulty sample by its number.
        unparseable: answers that could not be read.
    """

    def __init__(
        self, names: Sequence[str], settings: Sequence[RewardSettings], problems: Sequence[Problem], patience: float
    ):
        self._names, self._settings, self._problems, self._patience = names, settings, problems, patience
        self.faults: dict[int, dict[int, str]] = {}
        self.unparseable = 0

    def values(self, place: int, results: Sequence[Result]) -> list[float]:
        """The values of a reward, NaN where it failed."""
        wrong = self.faults.get(place, {})
        return [math.nan if sample in wrong else result.value for sample, result in enumerate(results)]

    def add(self, place: int, sample: int, result: Result) -> None:
        """Take note of a result.

        Raises:
            ValueError: too many samples of this reward are faulty; nobody waits for the rest of them to fail.
        """
        if result.kind == "score":
            return
        if result.kind == "unparseable" or (result.kind == "late" and self._settings[place].scorer is not None):
            self.unparseable += 1
            return
        name, faults = self._names[place], self.faults.setdefault(place, {})
        faults[sample] = f"reward {name} {result.said} on sample {sample} (prompt {_shown(self._problems[sample])})"
        asked = len(self._problems)
        if len(faults) >= _FEW and len(faults) > self._patience * asked:
            raise ValueError(
                f"reward {name} fails on {len(faults)} or more of {asked} samples: {faults[min(faults)]}; "
                "mend it and start the run again, which goes on from its last checkpoint"
            )


def _shown(problem: Problem) -> str:
    """The beginning of a prompt, or of what the user says in it."""
    prompt = problem.prompt
    if isinstance(prompt, list):
        last = prompt[-1]
        prompt = last["content"] if isinstance(last, dict) else f"tokens {' '.join(map(str, prompt))}"
    text = " ".join(prompt.split())
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")

"""Sources mixed by weight; every sample is a pure function of (seed, index).

Sample k of a stage is the same for any batch size, number of processes and history of interruptions: the state of the
loader is k. Two steps decide it, both without a random state. Which source: the sources take turns as evenly as their
weights allow; any number of first samples has the share of each to within as many samples as there are sources. Which
window: occurrence n of a source is window n of an endless shuffled sequence that holds every window once an epoch, each
epoch in an order of its own; grain computes that by random access.

grain has a mixture too. It rounds every weight down to a hundredth of the smallest one (4.1 and 2.0 become 204 and 100)
and does not tell how far each source is, so turns are taken here, in whole numbers, by the same kind of rule.
"""

import difflib
import math
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from looplm.data.encoding import EncodedCorpus
from looplm.data.pipeline import Windows, grain

_LARGEST_SOURCE = 2**32
"""Windows of a source that grain can shuffle."""


class Mixture:
    """Windows of several sources in fixed proportions, by sample number.

    Args:
        corpora: the training side of each source, by name; sources without a weight are left out.
        weights: the share of each source in the samples, by name; they need not add up to 1.
        sequence_length: S, in tokens.
        seed: 0 ... 2**32 - 1.
        separate_documents: restart positions at each document (see `Windows`).

    The order of the names does not matter.

    Raises:
        ValueError: no weights, a weight that is not above 0, an unknown source, a source with fewer than S + 1 tokens
            or too many windows, or a seed out of range.
    """

    def __init__(
        self,
        corpora: Mapping[str, EncodedCorpus],
        weights: Mapping[str, float],
        sequence_length: int,
        seed: int,
        separate_documents: bool = False,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}: give a number from 0 to 2**32 - 1")
        self.sequence_length = sequence_length
        self.names = tuple(sorted(weights))
        self._shares = _whole_numbers(weights, corpora)
        self._windows = []
        self._shuffled = []
        for name in self.names:
            try:
                windows = Windows(corpora[name], sequence_length, separate_documents=separate_documents)
            except ValueError as error:
                raise ValueError(f"source {name}: {error}") from None
            if len(windows) > _LARGEST_SOURCE:
                raise ValueError(f"source {name} has {len(windows)} windows, more than 2**32: split it")
            own_seed = int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
            self._windows.append(windows)
            self._shuffled.append(grain.MapDataset.source(windows).seed(own_seed).shuffle().repeat())

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """Sample `index`, counted from 0: input_ids, labels (already shifted) and position_ids, each (S,) int64."""
        number, occurrence = self._turn(index)
        sample: dict[str, NDArray[np.int64]] = self._shuffled[number][occurrence]
        return sample

    def source_of(self, index: int) -> str:
        """The name of the source of a sample."""
        return self.names[self._turn(index)[0]]

    def tokens_by_source(self, first: int, last: int) -> dict[str, int]:
        """Tokens of each source in the samples `first` ... `last` - 1."""
        before, after = self._drawn(first), self._drawn(last)
        return {
            name: (end - begin) * self.sequence_length
            for name, begin, end in zip(self.names, before, after, strict=True)
        }

    def epochs(self, index: int) -> dict[str, int]:
        """The epoch, counted from 1, from which each source's next sample comes, before sample `index` is drawn."""
        drawn = zip(self.names, self._windows, self._drawn(index), strict=True)
        return {name: 1 + count // len(windows) for name, windows, count in drawn}

    def epochs_begun(self, first: int, last: int) -> list[tuple[str, int]]:
        """(source, epoch) of the epochs after the first one whose first sample is one of `first` ... `last` - 1."""
        begun = []
        drawn = zip(self.names, self._windows, self._drawn(first), self._drawn(last), strict=True)
        for name, windows, before, after in drawn:
            # epoch e begins with occurrence (e - 1) * len(windows)
            epochs = range(-(-before // len(windows)) + 1, -(-after // len(windows)) + 1)
            begun += [(name, epoch) for epoch in epochs if epoch > 1]
        return begun

    def _turn(self, index: int) -> tuple[int, int]:
        """The number of the source that sample `index` is drawn from, and how many of its samples came before."""
        before, after = self._drawn(index), self._drawn(index + 1)
        number = next(i for i, (begin, end) in enumerate(zip(before, after, strict=True)) if end > begin)
        return number, before[number]

    def _drawn(self, count: int) -> list[int]:
        """How many of the first `count` samples come from each source; the whole numbers add up to `count`.

        The first source gets its share of them, rounded up; the second its share of what is left; and so on.
        """
        if count < 0:
            raise IndexError(f"sample {count}: samples are counted from 0")
        drawn, total = [], sum(self._shares)
        for share in self._shares:
            rest = count * (total - share) // total
            drawn.append(count - rest)
            count, total = rest, total - share
        return drawn


def batch(mixture: Mixture, first_index: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Samples `first_index` ... `first_index + batch_size - 1`: input_ids, labels, position_ids, (B, S) int64 each.

    Raises:
        ValueError: batch_size below 1.
        IndexError: a negative index.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    samples = [mixture[index] for index in range(first_index, first_index + batch_size)]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def _whole_numbers(weights: Mapping[str, float], corpora: Mapping[str, object]) -> Sequence[int]:
    """The weights in order of their names, as decimal fractions brought to whole numbers: nothing is rounded."""
    if not weights:
        raise ValueError("mixture is empty: give at least one source a weight")
    for name, weight in weights.items():
        if name not in corpora:
            nearest = difflib.get_close_matches(name, list(corpora), n=1) or list(corpora)
            raise ValueError(f"mixture: no source {name!r}; there is {', '.join(nearest) or 'none'}")
        if not 0 < weight < math.inf:
            raise ValueError(f"mixture: weight of {name} is {weight}: give a number above 0, or leave the source out")
    fractions = [Fraction(str(weights[name])) for name in sorted(weights)]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]

"""Random whole numbers, digests and splits that are the same on every machine.

NumPy promises that its bit generators and `SeedSequence` never change, but not what `Generator` makes of the bits. So
the raw 64-bit words are used here, with integer arithmetic only: the same seed gives the same data everywhere.

Splits go by the digest of an item's canonical form, never by chance: eight tenths of all digests train, a tenth each
validates and tests. An item is therefore in one split whatever the seed, the batch or the other settings.
"""

from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

EVERYWHERE = np.uint64(0)
"""The key of what every split holds: the single facts an item is composed of, too few to be shared out."""
TRAINING = np.uint64(1)
"""The key of what only training holds: items that say no more than a single fact does."""
NOWHERE = np.uint64(2)
"""The key of candidates that are no items at all."""
SHARES = 10
"""Of this many equal shares of all keys one is for the test and one for validation."""


class Draws:
    """A stream of random numbers keyed by whole numbers, e.g. Draws(seed, split, index)."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def words(self, *shape: int) -> Keys:
        """Uniform 64-bit words."""
        return self._bits.random_raw(shape)

    def integers(self, below: int | Integers, *shape: int) -> Integers:
        """Uniform integers in 0..below - 1; `below` is at least 1 and broadcasts to the shape (default: its own).

        The bias of the modulo is below / 2^64.
        """
        limits = np.asarray(below, dtype=np.uint64)
        return (self.words(*(shape or limits.shape)) % limits).astype(np.int64)

    def order(self, *shape: int) -> Integers:
        """Random permutations of 0..n - 1 along the last axis, of length n."""
        return np.argsort(self.words(*shape), axis=-1, kind="stable")


def mix(words: npt.NDArray[np.integer]) -> Keys:
    """A one-to-one scrambling of 64-bit words (the finaliser of splitmix64)."""
    x = np.asarray(words).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def digest(values: npt.NDArray[np.integer]) -> Keys:
    """A key for each sequence along the last axis; never one of the special keys."""
    places = mix(np.arange(values.shape[-1]))
    return digest_set(values.astype(np.uint64) + places)


def digest_set(values: npt.NDArray[np.integer], counted: Mask | None = None) -> Keys:
    """A key for each multiset along the last axis, whatever its order; only what is `counted` belongs to it."""
    words = mix(values)
    if counted is not None:
        words = np.where(counted, words, np.uint64(0))
    return mix(words.sum(axis=-1, dtype=np.uint64)) | np.uint64(4)


def regions(keys: Keys) -> Integers:
    """The split a key belongs to: 0 training, 1 validation, 2 test; -1 for NOWHERE."""
    share = mix(keys) % np.uint64(SHARES)
    region = np.where(share < 2, share + np.uint64(1), np.uint64(0)).astype(np.int64)
    return np.where(keys == NOWHERE, -1, np.where(keys <= TRAINING, 0, region))


def admitted(keys: Keys, split: Split) -> Mask:
    """Which rows a split may hold.

    Args:
        keys: (B, K): first that of the question the row asks, then those of everything else it gives an answer to.
        split: training rows must give away nothing that is held out; the others ask what is held out for them.
    """
    region, everywhere = regions(keys), keys == EVERYWHERE
    if split == "train":
        return (region == 0).all(axis=1)
    return (region[:, 0] == SPLITS.index(split)) | everywhere[:, 0]


Entry = TypeVar("Entry", np.int64, np.bool_)


def squeeze(values: npt.NDArray[Entry], kept: Mask, filler: int) -> npt.NDArray[Entry]:
    """Each row's kept values moved to its front, in order, with `filler` behind them; (B, S) in and out."""
    order = np.argsort(~kept, axis=1, kind="stable")
    return np.take_along_axis(np.where(kept, values, values.dtype.type(filler)), order, axis=1)

"""Every sample is a pure function of (seed, index): against slow references, other worlds, interruptions, processes."""

import hashlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.data.encoding import EncodedCorpus
from looplm.data.mixture import Mixture, batch
from looplm.data.pipeline import Windows

ROOT = Path(__file__).parents[2]


def stream(first: int, length: int, documents: int = 1) -> EncodedCorpus:
    """Tokens first, first + 1, ...: the first token of a window names the source and the window."""
    offsets = np.linspace(0, length, documents + 1).astype(np.int64)
    return EncodedCorpus(np.arange(first, first + length, dtype=np.uint16), offsets, 5 * length)


CORPORA = {"a": stream(0, 61), "b": stream(1000, 31, 4), "c": stream(2000, 201)}  # 12, 6 and 40 windows of 5
SIZES = {"a": 12, "b": 6, "c": 40}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def mixture(seed: int = 7, **changes) -> Mixture:
    return Mixture(**{"corpora": CORPORA, "weights": WEIGHTS, "sequence_length": 5, "seed": seed, **changes})


def named(sample) -> tuple[str, int]:
    """(source, window) of a sample."""
    first = int(sample["input_ids"][0])
    return "abc"[first // 1000], first % 1000 // 5


class TestTurns:
    def test_table(self):
        """Weights 1 : 1 and 3 : 1 by hand: of k samples the first source has k - floor(k/2) and k - floor(k/4)."""
        even = mixture(weights={"a": 1, "b": 1})
        assert "".join(even.source_of(k) for k in range(6)) == "ababab"
        uneven = mixture(weights={"a": 3, "b": 1})
        assert "".join(uneven.source_of(k) for k in range(8)) == "aaabaaab"
        three = mixture(weights={"a": 2, "b": 1, "c": 1})
        # a has k - floor(k/2) of k samples, b half of the rest, rounded up
        assert "".join(three.source_of(k) for k in range(8)) == "abacabac"

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(0, 10**15))
    def test_every_share_is_kept_at_any_index(self, tenths, index):
        weights = {f"s{i}": tenth / 10 for i, tenth in enumerate(tenths)}
        mixed = Mixture(dict.fromkeys(weights, stream(0, 61)), weights, 5, seed=0)
        counts = [tokens // 5 for tokens in mixed.tokens_by_source(0, index).values()]
        assert sum(counts) == index
        for count, tenth in zip(counts, tenths, strict=True):
            assert abs(count - Fraction(tenth, sum(tenths)) * index) <= len(weights)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 300), st.integers(0, 300))
    def test_counts_are_those_of_the_samples(self, first, length):
        mixed = mixture()
        slow = dict.fromkeys("abc", 0)
        for index in range(first, first + length):
            slow[mixed.source_of(index)] += 5
        assert mixed.tokens_by_source(first, first + length) == slow

    def test_odd_weights_are_exact(self):
        """0.3 and 0.1 are 3 : 1 exactly; 73.4 : 4.1 stays so over a full period."""
        mixed = mixture(weights={"a": 0.3, "b": 0.1})
        assert mixed.tokens_by_source(0, 4 * 10**9) == {"a": 15 * 10**9, "b": 5 * 10**9}
        mixed = mixture(weights={"a": 73.4, "b": 4.1})
        assert mixed.tokens_by_source(0, 775) == {"a": 734 * 5, "b": 41 * 5}


class TestSamples:
    def test_a_sample_is_a_window_of_its_source(self):
        mixed = mixture(separate_documents=True)
        windows = {name: Windows(corpus, 5, separate_documents=True) for name, corpus in CORPORA.items()}
        for index in range(100):
            sample = mixed[index]
            source, number = named(sample)
            assert source == mixed.source_of(index)
            assert set(sample) == {"input_ids", "labels", "position_ids"}
            for name, array in windows[source][number].items():
                assert np.array_equal(sample[name], array) and sample[name].dtype == np.int64

    def test_each_epoch_has_every_window_once_in_its_own_order(self):
        mixed = mixture(weights={"a": 12, "b": 6, "c": 40})
        drawn: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        for index in range(3 * (12 + 6 + 40)):
            source, number = named(mixed[index])
            drawn[source].append(number)
        for source, size in SIZES.items():
            epochs = [drawn[source][first : first + size] for first in range(0, 3 * size, size)]
            assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) == 3
            assert list(range(size)) not in epochs

    def test_sources_and_seeds_have_orders_of_their_own(self):
        twins = {"x": stream(0, 201), "y": stream(0, 201)}
        mixed = [Mixture(twins, {"x": 1, "y": 1}, 5, seed) for seed in (0, 1)]
        orders = {tuple(int(m[k]["input_ids"][0]) for k in range(start, 80, 2)) for m in mixed for start in (0, 1)}
        assert len(orders) == 4

    def test_the_order_of_names_and_the_scale_of_weights_do_not_matter(self):
        other = mixture(weights={"c": 2, "a": 5, "b": 3}, corpora=dict(reversed(CORPORA.items())))
        assert [named(mixture()[k]) for k in range(50)] == [named(other[k]) for k in range(50)]

    @settings(deadline=None, max_examples=15)
    @given(st.sampled_from([1, 2, 3]), st.integers(1, 4), st.integers(0, 10**7), st.randoms())
    def test_world_size_batch_size_and_interruptions_do_not_matter(self, world, batch_size, first, random):
        """Ranks take their own slices of a global batch; a run stops and begins again at a random batch."""
        expected = [named(mixture()[index]) for index in range(first, first + 4 * world * batch_size)]
        found, stop = [], random.randrange(5)
        mixed = mixture()
        for step in range(4):
            if step == stop:
                mixed = mixture()  # a new process begins here
            for rank in range(world):
                start = first + (step * world + rank) * batch_size
                rows = batch(mixed, start, batch_size)
                found += [named({"input_ids": row}) for row in rows["input_ids"]]
        assert found == expected

    def test_batches(self):
        mixed = mixture()
        found = batch(mixed, 31, 4)
        assert set(found) == {"input_ids", "labels", "position_ids"}
        for name, tensor in found.items():
            assert tensor.shape == (4, 5) and tensor.dtype == torch.int64
            assert tensor.tolist() == [mixed[31 + row][name].tolist() for row in range(4)]

    def test_far_indices(self):
        assert named(mixture()[10**14])[0] in "abc"


class TestEpochs:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 400), st.integers(0, 200))
    def test_equals_counting(self, first, length):
        mixed = mixture()
        seen = dict.fromkeys("abc", 0)
        begun = []
        for index in range(first + length):
            if index == first:
                assert mixed.epochs(index) == {name: 1 + seen[name] // SIZES[name] for name in "abc"}
            source = mixed.source_of(index)
            if index >= first and seen[source] and seen[source] % SIZES[source] == 0:
                begun.append((source, 1 + seen[source] // SIZES[source]))
            seen[source] += 1
        assert sorted(mixed.epochs_begun(first, first + length)) == sorted(begun)

    def test_table(self):
        """b has 6 windows and every second sample: its 7th is sample 13."""
        mixed = mixture(weights={"a": 1, "b": 1})
        assert mixed.epochs(0) == {"a": 1, "b": 1}
        assert (mixed.epochs(11)["b"], mixed.epochs(12)["b"]) == (1, 2)
        assert mixed.epochs_begun(0, 13) == []
        assert mixed.epochs_begun(13, 14) == [("b", 2)]
        assert mixed.epochs_begun(0, 26) == [("a", 2), ("b", 2), ("b", 3)]
        assert mixed.epochs_begun(26, 26) == []


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"weights": {}}, "mixture is empty"),
            ({"weights": {"a": 1, "d": 1}}, "mixture: no source 'd'; there is a, b, c"),
            ({"weights": {"aa": 1}}, "mixture: no source 'aa'; there is a"),
            ({"weights": {"a": 0.0}}, "weight of a is 0.0: give a number above 0"),
            ({"weights": {"a": -1}}, "weight of a is -1"),
            ({"weights": {"a": float("nan")}}, "weight of a is nan"),
            ({"weights": {"a": float("inf")}}, "weight of a is inf"),
            ({"seed": -1}, "seed is -1"),
            ({"seed": 2**32}, "seed is 4294967296"),
            ({"sequence_length": 31}, "source b: corpus has 31 tokens, fewer than one sequence of 32"),
            ({"sequence_length": 0}, "sequence_length is 0"),
        ],
    )
    def test_values(self, changes, reason):
        with pytest.raises(ValueError, match=r".") as caught:
            mixture(**changes)
        assert reason in str(caught.value)

    def test_outside(self):
        with pytest.raises(IndexError, match="sample -1"):
            mixture()[-1]
        with pytest.raises(ValueError, match="batch_size is 0"):
            batch(mixture(), 0, 0)


SCRIPT = """
import hashlib
import numpy as np
from looplm.data.encoding import EncodedCorpus
from looplm.data.mixture import Mixture
corpora = {n: EncodedCorpus(np.arange(501, dtype=np.uint16), np.array([0, 100, 501]), 900) for n in ("x", "y", "z")}
mixed = Mixture(corpora, {"y": 0.1, "x": 0.7, "z": 0.2}, 5, seed=4, separate_documents=True)
samples = [mixed[index][name].tobytes() for index in (40, 2, 10**9) for name in ("input_ids", "position_ids")]
digest = hashlib.sha256(b"".join(samples)).hexdigest()
"""


def test_another_process_gets_the_same_samples_and_no_jax_notice():
    here: dict[str, str] = {}
    exec(SCRIPT, here)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", SCRIPT + "print(digest)"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here["digest"] != hashlib.sha256().hexdigest()
    assert "jax" not in run.stderr

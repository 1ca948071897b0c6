"""What holds for every task: shapes, the same data everywhere, splits, scores, curricula and errors."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import looplm
from looplm.lab.tasks import IGNORED, SPLITS, TASKS, make_task
from looplm.lab.tasks.base import BLOCK
from looplm.lab.tasks.draws import EVERYWHERE, NOWHERE, TRAINING, Draws, admitted, digest, digest_set, mix, squeeze

everyone = pytest.mark.parametrize("name", TASKS)
SCALES = ("laptop", "paper")


def fingerprint(batch) -> str:
    text = hashlib.sha256()
    for name in sorted(batch):
        text.update(np.ascontiguousarray(batch[name]).astype("<i8").tobytes())
    return text.hexdigest()[:16]


@everyone
@pytest.mark.parametrize("scale", SCALES)
def test_shapes_and_types(name, scale):
    task = make_task(name, scale)
    assert task.name == name and task.shows.endswith(".") and len(set(task.vocabulary)) == len(task.vocabulary)
    for split in SPLITS if scale == "laptop" else ("train",):
        batch = task.batch(1, 2, 5, split)
        assert {batch[key].dtype for key in ("tokens", "targets", "difficulty")} == {np.dtype(np.int64)}
        assert batch["tokens"].shape == batch["targets"].shape == batch["answer"].shape == (5, task.length)
        assert batch["difficulty"].shape == (5,) and batch["answer"].dtype == np.bool_
        assert set(batch["difficulty"]) <= set(task.levels(split))
        assert batch["answer"].any(axis=1).all() and (batch["targets"][batch["answer"]] >= 0).all()
        known = batch["targets"][batch["targets"] != IGNORED]
        assert min(known.min(), batch["tokens"].min()) >= 0
        assert max(known.max(), batch["tokens"].max()) < len(task.vocabulary)


GOLDEN = {
    "capo laptop": "9fd5159be66f92ae",
    "capo paper": "60886689177ce50b",
    "mano laptop": "224cee867a16144d",
    "mano paper": "7aed1d4201a58d40",
    "multi-hop laptop": "5b691082cf02c6f6",
    "multi-hop paper": "05b617ed1fa8466d",
    "p-hop laptop": "49bccc9f091b6dc4",
    "p-hop paper": "877de83f8bc0dfb0",
    "addition laptop": "e36296afa9a57ce2",
    "addition paper": "6fcbbf4215e5eb51",
    "gsm laptop": "8bd877eea06d587d",
    "gsm paper": "1468a9739758f4f5",
    "group laptop": "acbcc02a9cc9057c",
    "group paper": "3056d6335ecd42fa",
    "reachability laptop": "7b0fd3b633726ee7",
    "reachability paper": "b90b0fd4694fe0dd",
    "assignment laptop": "08c929cd98914cf2",
    "assignment paper": "936912b49a24d708",
}


def golden() -> dict[str, str]:
    """Fingerprints of small batches of every task at both scales."""
    return {
        f"{name} {scale}": fingerprint(make_task(name, scale).batch(7, 3, 24)) for name in TASKS for scale in SCALES
    }


def test_the_same_seed_gives_the_same_data_as_ever():
    assert golden() == GOLDEN


def test_another_process_gives_the_same_data():
    code = "from test_tasks import golden; print(golden())"
    paths = [str(Path(looplm.__file__).parent.parent), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{GOLDEN}\n", done.stderr


@everyone
def test_rows_do_not_depend_on_the_size_of_the_batch_nor_on_what_came_before(name):
    task = make_task(name)
    whole = task.batch(0, 0, 2 * BLOCK + 60)
    for size, index in ((300, 3), (1, BLOCK), (60, 0)):
        part = make_task(name).batch(0, index, size)
        assert all(np.array_equal(part[key], whole[key][index * size : (index + 1) * size]) for key in whole)
    part["tokens"][:] = -1  # a batch belongs to its caller
    assert np.array_equal(task.batch(0, 0, 60)["targets"], whole["targets"][:60])
    assert np.array_equal(make_task(name).batch(0, 0, 60)["tokens"], whole["tokens"][:60])


@everyone
def test_seed_index_and_split_all_matter(name):
    task = make_task(name)
    arguments = [(0, 0, 64, "train"), (1, 0, 64, "train"), (0, 1, 64, "train"), (0, 0, 64, "test")]
    arguments += [] if name == "capo" else [(0, 0, 64, "validation")]
    assert len({fingerprint(task.batch(*those)) for those in arguments}) == len(arguments)


@everyone
def test_levels_are_equally_likely(name):
    task = make_task(name)
    for split in ("train", "test"):
        levels, counts = np.unique(task.batch(5, 0, 2048, split)["difficulty"], return_counts=True)
        assert tuple(levels) == task.levels(split)
        share = 2048 / len(levels)
        assert (np.abs(counts - share) < 5 * share**0.5).all()


@everyone
def test_score_is_exact_match_of_the_graded_targets(name):
    task = make_task(name)
    batch = task.batch(0, 0, 32, "test")
    right = batch["targets"].copy()
    assert task.score(right, batch).shape == (32,) and task.score(right, batch).all()
    elsewhere = np.where(batch["answer"], right, right + 1)
    assert task.score(elsewhere, batch).all()
    places = np.argmax(batch["answer"], axis=1)
    wrong = right.copy()
    wrong[np.arange(0, 32, 2), places[::2]] += 1
    assert task.score(wrong, batch).tolist() == [False, True] * 16
    with pytest.raises(ValueError, match=r"^predictions have shape \(3,\); \(32, "):
        task.score(np.zeros(3, np.int64), batch)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "capo"])
def test_a_curriculum_draws_no_harder_items(name):
    task = make_task(name)
    levels = task.levels("train")
    assert set(task.batch(0, 0, 256, hardest=levels[1])["difficulty"]) == set(levels[:2])
    with pytest.raises(
        ValueError, match=f"^hardest is -1; train items of {name} have at least {levels[0]} {task.unit}$"
    ):
        task.batch(0, 0, 4, hardest=-1)


@everyone
def test_examples_are_readable_and_tasks_can_be_sent_to_other_processes(name):
    task = make_task(name)
    assert task.example() and "<pad>" not in task.example() and task.example() != task.example(1)
    sent = pickle.loads(pickle.dumps(task))
    assert fingerprint(sent.batch(0, 0, 4)) == fingerprint(task.batch(0, 0, 4))
    assert hash(task.settings) == hash(sent.settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 4), "seed is -1; it must be at least 0"),
        ((0, -1, 4), "index is -1; it must be at least 0"),
        ((0, 0, 0), "size is 0; it must be at least 1"),
        ((0, 0, 4, "dev"), "split is 'dev'; choose one of train, validation, test"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_task("mano").batch(*arguments)


def test_a_split_without_items_says_so():
    task = make_task("assignment", chains=2, values=2)  # one pair of constants: two items in all
    with pytest.raises(
        ValueError, match=r"^assignment: no (test|validation) items with copies . were found, they are too"
    ):
        [task.batch(0, 0, 1, split) for split in ("test", "validation")]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("manno",), {}, r"no such task: manno; did you mean 'mano'\?"),
        (("zzz",), {}, "no such task: zzz; choose one of capo, mano, multi-hop"),
        (("mano", "huge"), {}, "scale is 'huge'; choose paper or laptop"),
        (("mano",), {"modulos": 3}, r"mano: unknown key 'modulos'; did you mean 'modulus'\?"),
        (("mano",), {"modulus": 1}, "mano: modulus is 1: Input should be greater than or equal to 2"),
        (("mano",), {"levels": ()}, r"mano: levels is \(\): Tuple should have at least 1 item"),
        (("mano",), {"levels": (0, 1)}, "mano: levels holds 0; the lowest level is 1"),
        (("p-hop",), {"symbols_a_row": 5}, "p-hop: symbols_a_row is 5; 4 hops need at least 6"),
        (("p-hop", "paper"), {"symbols_a_row": 32}, "p-hop: symbols_a_row is 32; 16 hops need at least 33"),
        (("p-hop",), {"symbols": 2}, "p-hop: symbols is 2; dense rows repeat no symbol, so they need at least 3"),
    ],
)
def test_tasks_that_cannot_be(arguments, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_task(*arguments, **changes)


# ---- the random numbers, keys and splits below all of them


def test_draws_by_hand():
    """The words are PCG64's own, and integers are those words modulo the limit."""
    words = np.random.PCG64(np.random.SeedSequence((3, 1))).random_raw(6)
    assert Draws(3, 1).words(2, 3).tolist() == words.reshape(2, 3).tolist()
    assert Draws(3, 1).integers(10, 6).tolist() == [int(word) % 10 for word in words]
    assert Draws(3, 1).integers(np.array([1, 2, 3])).tolist() == [
        int(word) % (n + 1) for n, word in enumerate(words[:3])
    ]
    assert Draws(3, 1).order(6).tolist() == sorted(range(6), key=lambda place: words[place])


def test_mix_by_hand():
    """The first outputs of splitmix64 from state 0, worked out with Python's whole numbers."""

    def splitmix(state):
        z, most = (state + 0x9E3779B97F4A7C15) % 2**64, 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % most
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % most
        return z ^ (z >> 31)

    states = [0, 1, 2**63, 2**64 - 1]
    assert mix(np.array(states, np.uint64)).tolist() == [splitmix(state) for state in states]
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_digests_tell_sequences_apart_and_sets_only_by_what_is_in_them(values, random):
    other = values.copy()
    random.shuffle(other)
    a, b = np.array([values]), np.array([other])
    assert digest_set(a) == digest_set(b)
    assert (digest(a) == digest(b)) == (values == other)
    assert digest_set(np.array([[*values, 3]]), np.array([[*[True] * len(values), False]])) == digest_set(a)
    assert digest_set(np.array([[*values, 3]])) != digest_set(a)


def test_a_tenth_of_all_keys_tests_and_a_tenth_validates():
    keys = digest(np.arange(10_000)[:, None])[:, None]
    masks = [admitted(keys, split) for split in SPLITS]
    assert (np.sum(masks, axis=0) == 1).all()
    assert all(abs(mask.mean() - share) < 0.015 for mask, share in zip(masks, (0.8, 0.1, 0.1), strict=True))


def test_what_splits_admit():
    number = np.arange(100)[:, None]
    train, test = (digest(number)[admitted(digest(number)[:, None], split)][0] for split in ("train", "test"))
    keys = np.array(
        [
            *([train, train], [train, test], [test, train]),
            *([EVERYWHERE, train], [EVERYWHERE, test], [TRAINING, train], [NOWHERE, train]),
        ]
    )
    assert admitted(keys, "train").tolist() == [True, False, False, True, False, True, False]
    assert admitted(keys, "test").tolist() == [False, False, True, True, True, False, False]
    assert admitted(keys, "validation").tolist() == [False, False, False, True, True, False, False]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=4))
@settings(max_examples=30)
def test_squeeze_equals_a_list_of_what_is_kept(rows):
    values, kept = (np.array([[pair[part] for pair in row] for row in rows]) for part in (0, 1))
    for row, squeezed in zip(rows, squeeze(values, kept, 99).tolist(), strict=True):
        there = [value for value, keep in row if keep]
        assert squeezed == there + [99] * (4 - len(there))

"""Capo: what is told, what is graded, and the bits that follow."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from task_rows import items

from looplm.lab.tasks import make_task
from looplm.lab.tasks.capo import ATTRIBUTES, LISTS, NAMES, SENTENCES

PATTERNS = [
    [
        re.compile(re.sub(r"\\{(\w+)\\}", lambda slot: f"(?P<{slot[1]}>.+?)", re.escape(way).replace(r"\ ", " ")))
        for way in ways
    ]
    for ways in SENTENCES
]


def tell(item):
    """The fields of a biography, read sentence by sentence with the templates as patterns."""
    assert item.words[0] == "<start>"
    text = " ".join(item.words[1:])
    fields = {}
    for sentence, ways in zip(re.findall(r".+? \.", text), PATTERNS, strict=True):
        (match,) = [match for way in ways if (match := way.fullmatch(sentence.strip()))]
        found = match.groupdict()
        assert fields.get("pronoun") == found.pop("again", fields.get("pronoun"))
        fields |= found
    return fields


def test_lists_are_as_long_as_published_and_share_no_word():
    sizes = [len(entries) for entries in LISTS.values()]
    assert sizes == [400, 400, 1000, 2, 12, 28, 200, 200, 300, 100, 263]
    every = [entry for entries in LISTS.values() for entry in entries]
    every += {word for ways in SENTENCES for way in ways for word in way.split()}
    assert [word for word, count in Counter(every).items() if count > 1] == []


def test_n0_and_s0_follow_from_the_lists():
    settings = make_task("capo", "paper").settings
    assert settings.possible_names == 400 * 400 * 1000
    assert settings.possible_attributes == 2 * (12 * 28 * 200) * 200 * 300 * 100 * 263
    assert math.log2(settings.possible_attributes) == pytest.approx(47.59, abs=0.01)
    assert math.log2(make_task("capo").settings.possible_attributes) == 26
    changed = make_task("capo", people=10, names=(10, 10, 10), values=(2, 2, 2, 2, 2, 2, 2)).settings
    assert (changed.possible_names, changed.possible_attributes) == (1000, 256)


def test_bits_by_hand():
    """1000 names and 256 sets of attributes, 10 people; guessing knows nothing, 0 nats know all."""
    task = make_task("capo", people=10, names=(10, 10, 10), values=(2, 2, 2, 2, 2, 2, 2))
    assert task.bits(math.log(1000), math.log(256)) == pytest.approx(0, abs=1e-9)
    assert task.bits(math.log(1000), 0.0) == pytest.approx(80)
    assert task.bits(math.log(10), 0.0) == pytest.approx(10 * (math.log2(100) + 8))  # names known up to which of ten
    assert task.bits(math.log(1000), math.log(2)) == pytest.approx(70)


def test_biographies_tell_every_field_and_mark_it():
    task = make_task("capo", "paper", people=300)
    batch = task.batch(0, 0, 300, "test")
    people = set()
    for row, item in enumerate(items(task, size=300, split="test")):
        fields = tell(item)
        assert set(fields) == set(LISTS) and all(fields[name] in LISTS[name] for name in LISTS)
        assert item.learnt == dict(enumerate([*item.words[1:], "<end>"]))  # plain next-token prediction
        assert sorted(item.answers.values()) == sorted(fields[name] for name in ATTRIBUTES)
        named = [task.vocabulary[target] for target in batch["targets"][row][batch["names"][row]]]
        assert named == [fields[name] for name in NAMES]
        people.add(tuple(named))
    assert len(people) == 300


def test_short_records():
    task = make_task("capo")
    for item in items(task, size=128):
        assert len(item.words) == 1 + len(LISTS) and list(item.answers) == list(range(3, 11))
        for word, (name, size) in zip(item.words[1:], task.settings.sizes.items(), strict=True):
            assert word in LISTS[name][:size]


@pytest.mark.parametrize("people", [300, 1024, 1500])
def test_every_pass_meets_everyone_once_with_the_same_words(people):
    task = make_task("capo", "paper", people=people)
    told = [tuple(item.words) for item in items(task, size=2 * people)]
    test = [tuple(item.words) for item in items(task, size=2 * people, split="test")]
    assert len(set(test[:people])) == people and test[:people] == test[people:]
    assert set(told[:people]) == set(told[people:]) == set(test) and told[:people] != told[people:]


def test_sentences_and_attributes_are_spread_evenly():
    fields = [tell(item) for item in items(make_task("capo", "paper", people=2000), size=2000, split="test")]
    genders = Counter(person["pronoun"] for person in fields)
    months = Counter(person["month"] for person in fields)
    assert 920 < genders["She"] < 1080 and len(months) == 12 and max(months.values()) < 230
    starts = Counter(item.words[4] for item in items(make_task("capo", "paper", people=2000), size=2000, split="test"))
    assert starts["was"] > 400 and starts["came"] > 400


def test_the_people_depend_on_the_seed():
    task = make_task("capo")
    assert not np.array_equal(task.batch(0, 0, 64, "test")["tokens"], task.batch(1, 0, 64, "test")["tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": 16_385}, "people is 16385; at most half of the 32768 names may be in use"),
        ({"names": (401, 1, 10_000)}, "first has 401 entries; it must be 1 to 400"),
        ({"values": (12, 28, 200, 200, 300, 100, 0)}, "employer has 0 entries; it must be 1 to 263"),
        ({"people": 0}, "people is 0: Input should be greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"^capo: {re.escape(message)}$"):
        make_task("capo", **changes)

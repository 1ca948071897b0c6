"""Multi-hop questions, answered by a reader who knows only the single facts of the training rows."""

import re

import pytest
from task_rows import items, only

from looplm.lab.tasks import make_task
from looplm.lab.tasks.multi_hop import RELATIONS, questions, unpacked


def parse(task, item):
    """(person, [r1, r2, ...]) of a question."""
    if not task.settings.sentences:
        return item.words[0], item.words[1:]
    asked = re.fullmatch(r"Who is ((?:the \w+ of )+)(\w+) \? \\n Answer:", " ".join(item.words))
    return asked[2], re.findall(r"the (\w+) of", asked[1])[::-1]


def facts_of(task, seed):
    known = {}
    for index in range(8):
        for item in items(task, seed=seed, index=index, size=4096):
            person, relations = parse(task, item)
            if len(relations) == 1:
                answer = only(item.answers)[1]
                assert known.setdefault((person, relations[0]), answer) == answer
    return known


SMALL = {"people": 40, "relations": 4, "layers": 4, "fraction": 0.5, "levels": (1, 3), "test_levels": (1, 3)}


@pytest.mark.parametrize(
    ("scale", "changes"), [("laptop", {}), ("laptop", {"dense": False, "levels": (1, 2, 3)}), ("paper", SMALL)]
)
def test_answers_follow_from_the_trained_facts(scale, changes):
    task = make_task("multi-hop", scale, **changes)
    known = facts_of(task, seed=3)
    in_layers = task.settings.people - (task.settings.heads if task.settings.layers > 1 else 0)
    assert len(known) == in_layers * task.settings.relations  # every single fact is trained
    for split in ("train", "validation", "test"):
        for item in items(task, seed=3, split=split):
            person, relations = parse(task, item)
            led = []
            for relation in relations:
                person = known[person, relation]
                led.append(person)
            assert len(relations) == item.level and only(item.answers) == (len(item.words) - 1, person)
            dense = {1 + place: name for place, name in enumerate(led)} if task.settings.dense else item.answers
            assert item.learnt == dense


def test_the_published_format_and_counts():
    task = make_task("multi-hop", "paper")
    for item in items(task, size=64):
        parse(task, item)
    question, answer = task.example().split(" → ")
    assert re.fullmatch(r"Who is (the \w+ of ){3}\w+ \? \\n Answer:", question) and answer in task.vocabulary
    # |E|/5 |R|^3 = 100 * 8000 questions of three hops, 15% of them trained, a tenth tested; 400 * 20 facts
    counts = [len(questions(task.settings, 0, 3, split)) for split in ("train", "validation", "test")]
    assert counts == [120_000, 80_000, 80_000]
    assert len(questions(task.settings, 0, 1, "train")) == 8_000


def prefixes(task, pool, hops):
    return {tuple(path[:3]) for path in unpacked(pool, hops, task.settings.relations).tolist()}


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.8])
def test_no_trained_question_begins_like_a_held_out_one(fraction):
    task = make_task("multi-hop", people=20, relations=5, levels=(1, 2, 3), test_levels=(2, 3), fraction=fraction)
    trained = set()
    for item in items(task, size=8192):
        person, relations = parse(task, item)
        trained |= {(person, *relations[:n]) for n in range(2, len(relations) + 1)}
    for split in ("test", "validation"):
        asked = {
            (person, *relations) for person, relations in (parse(task, i) for i in items(task, seed=1, split=split))
        }
        assert {len(question) for question in asked} == {3, 4}
        assert not {question[:3] for question in asked} & {question[:3] for question in trained}


def test_tests_are_the_same_for_every_fraction_and_seed_but_facts_are_not():
    def pools(fraction, seed, split):
        task = make_task("multi-hop", levels=(1, 2, 3), test_levels=(2, 3), fraction=fraction)
        return [questions(task.settings, seed, hops, split).tolist() for hops in (2, 3)]

    assert pools(0.8, 0, "test") == pools(0.2, 5, "test")
    assert set(pools(0.2, 0, "train")[0]) < set(pools(0.8, 0, "train")[0])
    assert set(pools(0.2, 0, "train")[0]) != set(pools(0.2, 1, "train")[0])
    assert [len(pool) for pool in pools(0.2, 0, "train")] == [360, 2160]  # of 50 * 36 and 50 * 216
    task = make_task("multi-hop")
    assert facts_of(task, 0) != facts_of(task, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 1.0}, "fraction is 1.0: Input should be less than or equal to 0.8"),
        ({"fraction": 0}, "fraction is 0: Input should be greater than 0"),
        ({"people": 51, "layers": 5}, "people is 51; it must be a multiple of the 5 layers, 2 in each"),
        ({"layers": 2}, "layers is 2; 2 hops need 3 layers, or only 1"),
        ({"sentences": True}, "dense is true; only chains (sentences: false) have a place for intermediate answers"),
        ({"people": 2, "relations": 1}, "relations is 1; there are too few questions of two hops to hold some out"),
        ({"relations": 20, "levels": (6,)}, "relations is 20; that is more than 10000000 questions of one length"),
        ({"relations": len(RELATIONS) + 1}, "relations is 21: Input should be less than or equal to 20"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"^multi-hop: {re.escape(message)}$"):
        make_task("multi-hop", **changes)

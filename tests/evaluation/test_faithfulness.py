"""Answers loop by loop, probes and interventions on tiny models against slow obvious runs; tables; bad files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model, tokens

from looplm.data.tokenizers import train_bpe
from looplm.evaluation.answers import Answers, TwoChoice, batches, encode, load_questions, read_answers
from looplm.evaluation.faithfulness import accuracy, agreement, baselines, study
from looplm.evaluation.faithfulness_tables import figures, tables
from looplm.evaluation.interventions import draw_sources, interchange, patched_answers
from looplm.evaluation.items import Item
from looplm.model import patch
from looplm.model.context import PassContext

MODELS = {name: tiny_model(**fields) for name, fields in VARIANTS.items()}
NAMES = st.sampled_from(sorted(MODELS))
TOKENIZER = train_bpe(["is it true or false? a b c yes no " * 4], 320)


def questions(count: int, seed: int = 0, shortest: int = 3, longest: int = 7) -> list[TwoChoice]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(shortest, longest + 1, count)
    return [
        TwoChoice(tuple(tokens(int(length), seed=seed * 1000 + place).tolist()), (5, 9), bool(draw.integers(2)))
        for place, length in enumerate(lengths)
    ]


def by_hand(model, question: TwoChoice, loops: int):
    """Margins after every loop, states after every loop, and after every layer, of one question alone."""
    core, ids = model.model, torch.tensor([question.prompt])
    context = PassContext.build(core, core.embed(ids, None), None, None, None, False, loops)
    state, margins, states, layers = core.begin(context, core.embed(ids, None)), [], [], []
    for loop in range(1, loops + 1):
        inner = state + context.core_input if core.config.input_injection == "add" and loop > 1 else state
        for index, layer in enumerate(core.layers, start=core.config.num_prelude_layers):
            inner = layer(inner, context.rotary, context.mask, context.memory(index, loop))
            layers.append(inner[0, -1])
        state = core.norm(inner) if core.config.loop_norm else inner
        states.append(state[0, -1])
        logits = model.lm_head(core.finish(state, context))[0, -1]
        margins.append(logits[question.choices[1]] - logits[question.choices[0]])
    return torch.stack(margins), torch.stack(states), torch.stack(layers).unflatten(0, (loops, -1))


@given(NAMES, st.integers(0, 99), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_answers_and_states_are_those_of_each_question_alone(name, seed, loops):
    model, asked = MODELS[name], questions(5, seed)
    found = read_answers(model, asked, loops)
    with torch.no_grad():
        for place, question in enumerate(asked):
            margins, states, layers = by_hand(model, question, loops)
            torch.testing.assert_close(found.margins[place].double(), margins, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.states[place], states, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(found.layers[place].double(), layers, rtol=1e-4, atol=1e-5)
    assert found.given.tolist() == (found.margins > 0).tolist()


@given(NAMES, st.integers(0, 99), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_a_patched_answer_is_that_of_patch(name, seed, loop):
    model, asked = MODELS[name], questions(4, seed)
    found, targets, sources = read_answers(model, asked, 3), [0, 1, 3], [2, 3, 2]
    new = patched_answers(model, asked, targets, found.states[sources, loop - 1], loop, 3)
    for place, (target, source) in enumerate(zip(targets, sources, strict=True)):
        ids = [torch.tensor([asked[index].prompt]) for index in (source, target)]
        run = patch(model, *ids, loop=loop, positions=[-1]).patched
        assert new[place] == bool(run.logit_difference(9, 5)[0, -1, -1] > 0)
    own = patched_answers(model, asked, [0, 1, 2, 3], found.states[:, loop - 1], loop, 3)
    assert own == found.given[:, -1].tolist()  # one's own state changes nothing


def test_behind_the_last_loop_the_answer_is_the_sources():
    model, asked = MODELS["plain"], questions(6, 3)
    found = read_answers(model, asked, 3)
    sources = [5, 4, 3, 2, 1, 0]
    new = patched_answers(model, asked, range(6), found.states[sources, 2], 3, 3)
    assert new == found.given[sources, -1].tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 9))
def test_sources_answer_as_they_should(final, count, seed):
    final = np.array(final)
    drawn = draw_sources(final, count, seed)
    if min(final.sum(), (~final).sum()) < 2:
        assert not drawn.targets
        return
    assert len(drawn.targets) == len(set(drawn.targets)) == min(count, len(final))
    for target, other, same in zip(drawn.targets, drawn.other, drawn.same, strict=True):
        assert final[other] != final[target] and final[same] == final[target] and same != target


def test_interventions_after_every_loop_but_the_last():
    model, asked = MODELS["plain"], questions(40, 1)
    found = interchange(model, asked, read_answers(model, asked, 3), 30, seed=2)
    assert [effect.loop for effect in found] == [1, 2]
    assert all(effect.followed.total == effect.control.total == 30 for effect in found)
    alike = Answers(torch.ones(40, 3), torch.zeros(40, 3, 2, 32), torch.zeros(40, 3, 32, dtype=torch.float64))
    nothing = interchange(model, asked, alike, 30)
    assert [effect.followed.total for effect in nothing] == [0, 0]


def test_agreement_and_baseline_by_hand():
    given_answers = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 1], [0, 1, 1]] * 10).astype(bool)
    assert agreement(given_answers) == [[40, 20, 10], [20, 40, 30], [10, 30, 40]]
    second, third = baselines(given_answers)
    # loop 1 against loop 2: both answers right once in two, so the area is 1/2; loop 2 ranks loop 3 at (1 + 2/3) / 2
    assert second.all.value == pytest.approx(1 / 2) and (second.flips.hits, second.flips.total) == (20, 40)
    assert third.all.value == pytest.approx((1 + 2 / 3) / 2) and third.flips.hits == 10
    right = [TwoChoice((1,), (5, 9), answer) for answer in (True, False, True, False)] * 10
    assert [part.hits for part in accuracy(given_answers, right)] == [20, 20, 30]
    assert accuracy(given_answers, [*right[:-1], TwoChoice((1,), (5, 9))]) is None


@given(st.integers(1, 5).flatmap(lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=1)))
def test_agreement_is_symmetric_with_all_items_on_its_diagonal(rows):
    table = np.array(agreement(np.array(rows)))
    assert (table == table.T).all() and (table.diagonal() == len(rows)).all()
    for i in range(len(table)):
        for j in range(len(table)):
            assert table[i, j] == sum(row[i] == row[j] for row in rows)


@pytest.fixture(scope="module")
def found():
    return study(MODELS["plain"], questions(160, 7), loops=4, interventions=30)


def test_the_study_on_a_random_model(found):
    assert (found.items, found.loops, found.layers, found.trained_loops, found.skipped) == (160, 4, 2, 3, [])
    places = [(probe.answer, probe.loop, probe.layer) for probe in found.probes]
    assert places == [(a, t, layer) for a in range(1, 5) for t in range(1, a + 1) for layer in (1, 2)]
    assert len(found.controls) == 8
    assert min(control.planted.value for control in found.controls) > 0.9
    assert all(0.3 < control.shuffled.value < 0.7 for control in found.controls)
    for probe in found.probes:
        if (probe.loop, probe.layer) == (probe.answer, 2):
            assert probe.all.value > 0.85  # what the head reads of this very state
        assert (probe.flipped is None) == (probe.given_previous is None) == (probe.answer == 1)


def test_flipped_items_are_compared_with_an_answer_that_is_always_wrong():
    """A probe that reads the answer before has an area of 0 among flipped items, of 1/2 given that answer."""
    from looplm.evaluation.faithfulness import _probe

    draw = np.random.default_rng(0)
    rows = draw.random((200, 2)) < 0.5
    found = _probe(rows[:, 0].astype(float), rows, np.zeros(200, dtype=np.int64), 2, 1, 1)
    assert found.flipped.value == 0 and found.given_previous.value == 0.5
    assert found.flipped.positives + found.flipped.negatives == (rows[:, 0] != rows[:, 1]).sum()
    told = _probe(rows[:, 1].astype(float), rows, np.zeros(200, dtype=np.int64), 2, 1, 1)
    assert (told.all.value, told.flipped.value, told.given_previous.value) == (1, 1, 1)


def test_tables_and_figures_say_what_was_found(found):
    first, second, third = tables(found, ("False", "True"))
    assert first.header == ("", "loop 1", "loop 2", "loop 3", "loop 4*", "answer 'True'", "right")
    assert [row[1 + place] for place, row in enumerate(first.rows)] == ["160"] * 4
    assert first.notes == ("* beyond the 3 loops of training",)
    assert len(second.rows) == 10 and second.rows[0][3:] == ("–",) * 4
    assert second.rows[1][6] == str(found.baselines[0].flips.hits)
    assert [row[0] for row in third.rows] == ["loop 1", "loop 2", "loop 3"]
    drawn = figures(found)
    assert len(drawn) == 3 and all(svg.count('class="curve"') >= 2 for svg in drawn.values())
    json.dumps(found.as_dict())


def test_answers_that_are_nearly_alike_are_left_out_and_said():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[9] = model.lm_head.weight[5] * 0  # together with the next line: never the second choice
        model.lm_head.weight[5] = 0
    found = study(model, questions(24), interventions=10)
    assert found.skipped == [1, 2, 3] and not found.probes
    said = [note for table in tables(found) for note in table.notes]
    assert "Loop 2 answers nearly alike: 0 of 24 otherwise; a probe needs 10." in said
    assert tables(found)[2].rows[0][1] == "– (no examples)"


@pytest.mark.parametrize(
    ("count", "loops", "fault"), [(19, 2, "19 items; probes need 20 at least"), (20, 1, "run 2 or more")]
)
def test_what_cannot_be_studied(count, loops, fault):
    with pytest.raises(ValueError, match=fault):
        study(MODELS["plain"], questions(count), loops=loops)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_batches_hold_every_input_once_and_little_padding(lengths):
    found = batches(lengths)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= 4096


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_question_pairs_become_prompts(tmp_path):
    rows = 'id,question1,question2,is_duplicate\n7,"How, why?","Why ""so""?",1\n8,A?,B?,0\n'
    first, second = load_questions(write(tmp_path / "pairs.csv", rows))
    assert (first.id, first.choices, first.answer, second.answer) == ("7", ("False", "True"), 1, 0)
    assert 'Question 1: How, why?\nQuestion 2: Why "so"?\n' in first.prompt and first.prompt.endswith("Answer:")
    tabbed = write(tmp_path / "pairs.tsv", "question1\tquestion2\tis_duplicate\nA, b?\tB?\t0\n")
    lines = write(tmp_path / "p.jsonl", '{"question1": "A, b?", "question2": "B?", "is_duplicate": 0}\n')
    assert [item.prompt for item in load_questions(tabbed)] == [item.prompt for item in load_questions(lines)]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.csv", "question1,q2,is_duplicate\nA,B,1\n", "line 1 has no column 'question2'"),
        ("a.csv", "question1,question2,is_duplicate\nA,B,yes\n", "line 2: is_duplicate is 'yes'; it must be 0 or 1"),
        ("a.tsv", "question1\tquestion2\tis_duplicate\nA\t\t1\n", "line 2 has no text 'question2'"),
        ("a.csv", "question1,question2,is_duplicate\n", "has no question pairs"),
        ("a.jsonl", '{"question1": "A", "question2": "B", "is_duplicate": 1}\n{"que\n', "line 2 is not JSON"),
        ("a.jsonl", '{"question": "A", "choices": ["a", "b", "c"], "answer": 0}\n', "item 1 has 3 choices"),
        ("a.jsonl", "[1]\n", "line 1 is no JSON object"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, fault):
    with pytest.raises(ValueError, match=fault):
        load_questions(write(tmp_path / name, text))
    with pytest.raises(ValueError, match="no such file"):
        load_questions(tmp_path / "none.csv")


def test_choices_may_stand_in_either_order():
    items = [Item("1", "is it", ("yes", "no"), 0), Item("2", "is it a b", ("no", "yes"), 0)]
    first, second = encode(TOKENIZER, items)
    assert first.choices == second.choices and (first.answer, second.answer) == (False, True)
    assert TOKENIZER.decode([*first.prompt, first.choices[1]]) in ("is it no", "is it n")


@pytest.mark.parametrize(
    ("items", "fault"),
    [
        ([], "no items"),
        ([Item("1", "is it", ("yes", "no"), 0), Item("2", "is it", ("yes", "c"), 0)], "item 2 has the choices"),
        ([Item("1", "is it", ("xylophone", "xyloid"), 0)], "begin with the same token"),
    ],
)
def test_choices_that_do_not_do(items, fault):
    with pytest.raises(ValueError, match=fault):
        encode(TOKENIZER, items)

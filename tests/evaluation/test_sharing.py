"""KV policies against the slow oracle that recomputes everything, and what tests nothing is refused."""

import json
from xml.etree import ElementTree

import pytest
import torch
from tiny import tiny_model, tokens

from looplm.data.tokenizers import train_bpe
from looplm.evaluation.intervals import Share, share
from looplm.evaluation.items import Question
from looplm.evaluation.scoring import encode_pair
from looplm.evaluation.sharing import _answers, check_questions, exact_matches, measure_sharing, table_14
from looplm.model.cache import KV_POLICIES, LoopCache
from looplm.model.depth import DepthOptions, DepthSession

PROMPT, NEW = 6, 16
NAMES = ("full (every loop's)", "last step only", "averaged", "first step only")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def windows():
    return [(row[:1], row[1:]) for row in tokens(4, PROMPT + NEW, seed=2).tolist()]


@pytest.fixture(scope="module")
def found(model, windows):
    return measure_sharing(model, windows, NEW, batch_size=3)


@torch.no_grad()
def slow(model, row, policy):
    """Nats of the continuation behind its first token, one forward call a token on a cache of this policy."""
    cache, session = LoopCache(model.config), DepthSession(DepthOptions(max_loops=3, kv_policy=policy), PROMPT)
    ids, nats = torch.tensor([row]), []
    logits = model(ids[:, :PROMPT], past_key_values=cache, use_cache=True, depth=session).logits
    for place in range(PROMPT, PROMPT + NEW):
        nats.append(-float(logits[0, -1].log_softmax(-1)[row[place]]))
        logits = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True, depth=session).logits
    return nats[1:]


def test_losses_are_those_of_feeding_token_by_token(model, windows, found) -> None:
    for row in found.rows:
        nats = [slow(model, context + target, row.policy) for context, target in windows]
        assert row.loss == pytest.approx(sum(map(sum, nats)) / (4 * (NEW - 1)), abs=1e-6)
    assert [row.policy for row in found.rows] == list(KV_POLICIES)
    assert len({round(row.loss, 6) for row in found.rows}) == 4  # the policies differ


@torch.no_grad()
def test_full_loss_is_that_of_one_plain_pass(model, windows, found) -> None:
    total = 0.0
    for context, target in windows:
        ids = torch.tensor([context + target])
        log_p = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])
        total -= float(log_p[PROMPT:].sum())
    assert found.rows[0].loss == pytest.approx(total / (4 * (NEW - 1)), abs=1e-6)


def test_agreement_is_counted_behind_the_first_new_token(model, windows, found) -> None:
    full = found.rows[0]
    assert (full.above, full.agreement, full.prefix, full.reduction) == (0.0, 1.0, NEW - 1, 1.0)
    ids = torch.tensor([(context + target)[:PROMPT] for context, target in windows])
    written = {
        policy: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, adaptive_loop=False,
            kv_policy=policy,
        )[:, PROMPT + 1 :]
        for policy in KV_POLICIES
    }  # fmt: skip
    for row in found.rows:
        same = written[row.policy] == written["per_loop"]
        assert row.agreement == pytest.approx(float(same.double().mean()))
        prefixes = [line.index(False) if False in line else NEW - 1 for line in same.tolist()]
        assert row.prefix == pytest.approx(sum(prefixes) / 4)


def test_bytes_are_measured(found) -> None:
    """Keys and values of 2 layers of 4 heads of 8 in fp64, for 21 positions of 4 texts: x 3 loops, or x 1."""
    one = 2 * 2 * 4 * 8 * 8 * (PROMPT + NEW - 1) * 4
    assert [row.kv_bytes for row in found.rows] == [3 * one, one, one, one]
    assert [row.reduction for row in found.rows] == [1.0, 3.0, 3.0, 3.0]


def test_an_answer_is_what_is_written_first_to_the_letter() -> None:
    questions = [Question("1", "?", ("no", "1, 23")), Question("2", "?", (" 1, 23\n",))]
    assert exact_matches(questions, ["  1, 23", "1, 2"]) == Share(1, 2, None, None)
    assert exact_matches(questions, ["1, 23, 4", "1, 234"]) == Share(1, 2, None, None)
    assert exact_matches(questions, ["so 1, 23", "1, 23\nmore"]) == Share(1, 2, None, None)
    assert exact_matches(questions * 10, ["no", "no"] * 10) == share(10, 20)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_answers_in_company_are_those_of_each_question_alone(answering, policy) -> None:
    model, tokenizer = answering
    questions = [Question(str(n), " ".join(["the loop goes round"] * n), ("x",)) for n in (1, 3, 2)]
    alone = []
    for question in questions:
        ids = torch.tensor([tokenizer.encode(question.prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, adaptive_loop=False,
            kv_policy=policy,
        )  # fmt: skip
        alone.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    assert _answers(model, tokenizer, questions, NEW, policy, 3) == alone and any(alone)


@pytest.fixture(scope="module")
def answering():
    tokenizer = train_bpe(["the loop goes round and the gate opens"], 280)
    return tiny_model(vocab_size=len(tokenizer)), tokenizer


LONG = "the loop goes round and the gate opens " * 2


def test_exact_match_is_a_column_and_a_figure(answering, windows) -> None:
    model, tokenizer = answering
    questions = [Question("1", "the loop", (LONG.strip(),))] * 2
    count = len(encode_pair(tokenizer, "the loop", f" {LONG.strip()}")[1])
    longer = [(row[:1], row[1:]) for row in tokens(2, PROMPT + count, seed=2).tolist()]
    found = measure_sharing(model, longer, count, batch_size=4, questions=questions, tokenizer=tokenizer)
    assert [row.exact_match for row in found.rows] == [share(0, 2)] * 4
    text = found.table("x").markdown()
    assert "exact match" in text and "0.000 (too few: 2)" in text
    assert list(found.charts())[2].startswith("Exact match") and json.dumps(found.as_dict())


def test_answers_that_test_nothing_or_are_not_written_are_refused(answering) -> None:
    tokenizer = answering[1]
    check_questions(tokenizer, [Question("1", "the loop", (LONG,))], 200)
    with pytest.raises(
        ValueError, match=r"question 7: the answer 'round' has \d+ tokens; policies are told apart by 16"
    ):
        check_questions(tokenizer, [Question("7", "the loop", (LONG, "round"))], 200)
    with pytest.raises(ValueError, match="no more than the 20 new tokens are written"):
        check_questions(tokenizer, [Question("7", "the loop", (LONG,))], 20)


def test_figures_hold_every_policy_at_its_bytes(found) -> None:
    charts = found.charts()
    assert len(charts) == 2
    loss, equal = (ElementTree.fromstring(chart) for chart in charts.values())
    for root, values in ((loss, [row.above for row in found.rows]), (equal, [row.agreement for row in found.rows])):
        said = root.find("desc").text
        assert said == "; ".join(
            f"{name}: {value:.3f} at {place}"
            for name, value, place in zip(NAMES, values, (100, 33, 33, 33), strict=True)
        )


@pytest.mark.parametrize("count", [1, 15])
def test_what_tests_nothing_is_refused(model, windows, count) -> None:
    with pytest.raises(
        ValueError, match=f"new tokens are {count}; give at least 16: the first one after a full prompt"
    ):
        measure_sharing(model, windows, count, batch_size=2)


def test_texts_without_a_prompt_are_refused(model) -> None:
    with pytest.raises(ValueError, match="texts of 17 tokens leave 1 for the prompt"):
        measure_sharing(model, [([3], [4] * 16)] * 2, 16, batch_size=2)


def test_the_papers_numbers() -> None:
    rows = {row[0]: row[1:] for row in table_14().rows}
    assert rows["first step only"] == ("18.73", "8.43", "4.00x") and len(rows) == 4

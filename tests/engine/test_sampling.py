"""Draws against transformers' own logits processors, distributions by hand, and seeds that make a request its own."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tokens
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from looplm.engine import Engine, SamplingParams
from looplm.engine.sampling import FEW, PART, best_tokens, distribution, draw, draw_freely, penalised
from looplm.exits import SampledExit

MODEL = tiny_model()
PROMPT = tokens(7, seed=2).tolist()


def whole(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(V,) log-probabilities of `distribution`."""
    log_p, ids = distribution(logits, params)
    full = torch.full_like(logits, -math.inf)
    full[torch.arange(len(logits)) if ids is None else ids] = log_p
    return full


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(0, 5), size=st.sampled_from([1, 64, PART, PART + 1, 5 * PART - 1]))
def test_the_best_token_is_the_first_of_equals(seed: int, rows: int, size: int) -> None:
    logits = torch.randint(-9, 9, (rows, size), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(best_tokens(logits), logits.argmax(-1))
    logits[:, size // 2 :] = -math.inf
    assert torch.equal(best_tokens(logits), logits.argmax(-1))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 5, 50, 3 * FEW]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 3, 40, 5000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.9999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    repetition=st.sampled_from([1.0, 0.5, 1.7]),
)
def test_filters_are_those_of_transformers(
    seed: int, size: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, generator=generator, dtype=torch.float64)
    text = torch.randint(size, (6,), generator=generator)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition
    )
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition), TemperatureLogitsWarper(temperature)])
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    expected = chain(text[None], logits[None].clone())[0].log_softmax(-1)
    changed = penalised(logits, params, text[:2].tolist(), text[2:].tolist()) if repetition != 1 else logits
    found = whole(changed / temperature, params)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-9, atol=1e-12)


def test_a_table_worked_out_by_hand() -> None:
    """p = (.5, .25, .15, .1): nucleus .7 keeps two, .76 three; min-p .3 keeps those of at least .15."""
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25], dtype=torch.float64).log()
    for fields, kept in (
        ({"top_p": 0.7}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.76}, {1: 0.5 / 0.9, 3: 0.25 / 0.9, 0: 0.15 / 0.9}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),
        ({"min_p": 0.29}, {1: 0.5 / 0.9, 3: 0.25 / 0.9, 0: 0.15 / 0.9}),
        ({"top_p": 0.95, "min_p": 0.4}, {1: 2 / 3, 3: 1 / 3}),
    ):
        p = whole(logits, SamplingParams(temperature=1.0, **fields)).exp()
        assert {i: round(float(v), 12) for i, v in enumerate(p) if v > 0} == {
            i: round(v, 12) for i, v in sorted(kept.items())
        }


def test_penalties_by_hand() -> None:
    """2 is in the prompt, 1 is new twice, 0 is new once."""
    logits = torch.tensor([1.0, 2.0, -3.0, 4.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised(logits, params, [2], [1, 0, 1]).tolist() == [0.5 - 0.75, 1.0 - 1.0, -6.0, 4.0]
    assert logits.tolist() == [1.0, 2.0, -3.0, 4.0]
    assert draw(logits, SamplingParams(presence_penalty=5.0), [0], [3], 0).token == 1


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.1, 0.6, 0.0, 0.3], dtype=torch.float64)
    params = SamplingParams(temperature=1.0)
    counts = Counter(draw(p.log(), params, [0], [], seed).token for seed in range(4000))
    assert counts[2] == 0
    for token in (0, 1, 3):  # 4 standard deviations
        spread = 4 * math.sqrt(4000 * float(p[token] * (1 - p[token])))
        assert abs(counts[token] - 4000 * float(p[token])) < spread


def test_log_probabilities_are_of_what_was_drawn_from() -> None:
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25], dtype=torch.float64).log()
    drawn = draw(logits, SamplingParams(temperature=1.0, top_p=0.7, logprobs=3), [0], [], 1)
    expected = {1: math.log(2 / 3), 3: math.log(1 / 3)}
    assert math.isclose(drawn.log_probability, expected[drawn.token], rel_tol=1e-9)
    assert [token for token, _ in drawn.alternatives] == [1, 3], "what could not be drawn is no alternative"
    greedy = draw(logits, SamplingParams(logprobs=2), [0], [], 1)
    assert greedy.token == 1 and math.isclose(greedy.log_probability, math.log(0.5))
    assert draw(logits, SamplingParams(temperature=1.0, logprobs=0), [0], [], 1).alternatives == ()


SAMPLED = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.9, seed=5, exit_rule=SampledExit(3), logprobs=2)


def test_a_seed_makes_a_request_its_own() -> None:
    """Its tokens do not depend on the batch, on rows, chunks, or on when it comes."""
    alone = Engine(MODEL, kv_bytes=1 << 20).generate([PROMPT], SAMPLED)[0]
    assert len(set(alone.token_ids)) > 3
    company = [tokens(n, seed=n).tolist() for n in (30, 2, 11)]
    engine = Engine(MODEL, kv_bytes=1 << 20, max_rows=3, chunk_tokens=5)
    noise = SamplingParams(max_tokens=9, temperature=2.0)
    crowd = engine.generate([*company, PROMPT, *company], [noise] * 3 + [SAMPLED] + [noise] * 3)[3]
    assert (crowd.token_ids, crowd.exit_depths) == (alone.token_ids, alone.exit_depths)
    torch.testing.assert_close(crowd.logprobs, alone.logprobs)
    other = Engine(MODEL, kv_bytes=1 << 20).generate([PROMPT], SamplingParams(max_tokens=8, temperature=1.5, seed=6))[0]
    assert other.token_ids != alone.token_ids


def test_samples_of_a_request_differ_and_are_those_of_their_seeds() -> None:
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 1.5}
    engine = Engine(MODEL, kv_bytes=1 << 20)
    found = engine.generate([PROMPT], SamplingParams(**fields, n=3, seed=5, exit_rule=SampledExit(9)))
    assert [c.index for c in found] == [0, 1, 2] and len({tuple(c.token_ids) for c in found}) == 3
    for i, completion in enumerate(found):
        one = engine.generate([PROMPT], SamplingParams(**fields, seed=5 + i, exit_rule=SampledExit(9 + i)))[0]
        assert (one.token_ids, one.exit_depths) == (completion.token_ids, completion.exit_depths)
    fresh = engine.generate([PROMPT] * 2, SamplingParams(**fields))
    assert fresh[0].token_ids != fresh[1].token_ids, "without a seed each request draws anew"


def test_penalties_reach_the_engine() -> None:
    free = Engine(MODEL, kv_bytes=1 << 20).generate([PROMPT], SamplingParams(max_tokens=20))[0]
    assert len(set(free.token_ids)) < 20
    found = Engine(MODEL, kv_bytes=1 << 20).generate([PROMPT], SamplingParams(max_tokens=20, presence_penalty=100))[0]
    assert len(set(found.token_ids)) == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, r"temperature is -1.0; it must be 0 \(greedy\) or in \[0.01, 100\]"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["a", ""]}, "stop is .*strings of at least one character"),
        ({"n": 0}, "n is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_refused_params(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(2, 400), st.data())
def test_drawing_rows_at_once_is_drawing_them_alone(rows, vocabulary, data):
    seed = data.draw(st.integers(0, 2**31))
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    choices = [
        SamplingParams(temperature=data.draw(st.floats(0.05, 5)), logprobs=data.draw(st.sampled_from([None, 0])))
        for _ in range(rows)
    ]
    assert all(params.free for params in choices)
    prompts = [[1] * data.draw(st.integers(1, 30)) for _ in range(rows)]
    seeds = [data.draw(st.integers(0, 2**61)) for _ in range(rows)]
    found = draw_freely(logits, choices, [len(prompt) - 1 for prompt in prompts], seeds)
    for row, drawn in enumerate(found):
        alone = draw(logits[row], choices[row], prompts[row], [], seeds[row])
        assert drawn.token == alone.token
        assert (drawn.log_probability is None) == (alone.log_probability is None)
        assert drawn.log_probability == pytest.approx(alone.log_probability, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"logprobs": 2}, {"presence_penalty": 1}],
)
def test_what_is_not_drawn_at_once(changes):
    assert not SamplingParams(**{"temperature": 1.0, **changes}).free

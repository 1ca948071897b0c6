"""A trace's numbers: formulas by hand, and the model's own against the model stopped after each loop."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model

from looplm.data.tokenizers import train_bpe
from looplm.model import loop_hook, readout, trace
from looplm.model.readout import LoopRun
from looplm.model.tracing import Candidate, LoopReading, TokenTrace, Trace, _motion, linear_cka, pieces

TOKENIZER = train_bpe(["the loop goes round and round, and the gate opens at loop four. " * 3, "naïve ☃"], 300)
SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 48}
TEXT = "the gate opens naïvely, ☃"
MODEL = tiny_model(**SIZES)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_is_that_of_the_model_stopped_after_the_loop(name):
    model, ids = tiny_model(**{**VARIANTS[name], **SIZES}), torch.tensor([encode(TEXT)])
    found = trace(model, TOKENIZER, TEXT, top_k=3)
    out = model(ids, output_hidden_states=True)
    read = [model(ids, exit_at_step=loop).logits[0].log_softmax(-1) for loop in range(3)]
    assert (found.loops, found.trained_loops, len(found.tokens)) == (3, 3, ids.shape[1])
    assert [token.id for token in found.tokens] == ids[0].tolist()
    for place, token in enumerate(found.tokens):
        for loop, reading in enumerate(token.loops):
            log_p, log_final = read[loop][place].tolist(), read[2][place].tolist()
            best = sorted(range(len(log_p)), key=lambda n: -log_p[n])[:3]
            assert [candidate.id for candidate in reading.top] == best
            assert [candidate.text for candidate in reading.top] == [TOKENIZER.decode([n]) for n in best]
            close = {
                "entropy": -sum(math.exp(p) * p for p in log_p),
                "kl_to_final": sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_final, strict=True)),
                "gate_logit": float(out.gate_logits[0, place, loop]),
                "hazard": 1 / (1 + math.exp(-float(out.gate_logits[0, place, loop]))),
                "exit_probability": float(out.exit_probabilities[0, place, loop]),
                "next_loss": None if place + 1 == ids.shape[1] else -log_p[ids[0, place + 1]],
                "change": None,
                "cosine": None,
            }
            if loop:
                new, old = (out.hidden_states[n][0, place].tolist() for n in (loop + 1, loop))
                close["change"] = math.dist(new, old) / math.hypot(*old)
                dot = sum(a * b for a, b in zip(new, old, strict=True))
                close["cosine"] = dot / math.hypot(*new) / math.hypot(*old)
            for field, expected in close.items():
                assert getattr(reading, field) == (
                    None if expected is None else pytest.approx(expected, rel=2e-5, abs=1e-6)
                ), field
            for candidate in reading.top:
                assert candidate.probability == pytest.approx(math.exp(log_p[candidate.id]), rel=1e-5)


@torch.no_grad()
@given(st.floats(0.01, 1.0))
@settings(deadline=None, max_examples=30)
def test_exit_depths_are_those_of_the_models_q_exit(threshold):
    found = trace(MODEL, TOKENIZER, TEXT)
    expected = MODEL(torch.tensor([encode(TEXT)]), exit_threshold=threshold).exit_depths[0].tolist()
    assert found.exit_depths(threshold) == expected


def test_threshold_one_is_all_loops_however_sure_the_gate():
    sure = LoopReading((), 80.0, 1.0, 1.0, 0.0, 0.0, None, None, None)
    found = Trace((TokenTrace(5, "a", (sure, sure, sure)),), ((1.0,) * 3,) * 3, 3)
    assert found.exit_depths(1.0) == [3] and found.exit_depths(0.999) == [1]
    with pytest.raises(ValueError, match=r"threshold is 0; it must lie in \(0, 1\]"):
        found.exit_depths(0)


def cka(*matrices):
    return linear_cka([torch.tensor(matrix, dtype=torch.float64) for matrix in matrices])


def test_cka_by_hand():
    # centred columns (1, 0, -1) and (1, 1, -2): X.Y = 3, |X|^2 = 2, |Y|^2 = 6, so 9 / 12
    assert cka([[2], [1], [0]], [[7], [7], [4]])[0][1] == pytest.approx(0.75, rel=1e-6)
    assert cka([[2], [1], [0]], [[1], [-2], [1]])[0][1] == pytest.approx(0, abs=1e-12)  # orthogonal
    # X^T X = [[2, 1], [1, 2]] has norm sqrt 10; X^T Y = (3, 3) for Y = (1, 1, -2) with Y^T Y = 6: 18 / (6 sqrt 10)
    found = cka([[1, 0], [0, 1], [-1, -1]], [[1], [1], [-2]])
    assert found[0][1] == found[1][0] == pytest.approx(3 / math.sqrt(10), rel=1e-6)
    assert found[0][0] == pytest.approx(1) and found[1][1] == pytest.approx(1)


def test_cka_of_states_that_do_not_vary_is_nothing():
    assert cka([[1.1, 2.2]], [[3.3, 4.4]]) == ((None, None), (None, None))
    assert cka([[0.1], [0.1], [0.1]], [[1], [2], [3]]) == ((None, None), (None, 1.0))


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 999), st.floats(0.01, 100))
@settings(deadline=None)
def test_cka_ignores_turns_scale_and_offset_and_is_that_of_the_gram_matrices(rows, width, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=draw, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q
    found = linear_cka([x, y, scale * (x @ turn) + 1])
    centre = torch.eye(rows, dtype=torch.float64) - 1 / rows
    gram_x, gram_y = (centre @ z @ z.T @ centre for z in (x, y))
    expected = float((gram_x * gram_y).sum() / gram_x.norm() / gram_y.norm())
    assert found[0][1] == pytest.approx(expected, rel=1e-3, abs=1e-4) and 0 <= found[0][1] <= 1
    assert found[0][2] == pytest.approx(1, rel=1e-3)
    assert all(found[i][j] == found[j][i] for i in range(3) for j in range(3))


def test_change_and_cosine_by_hand():
    states = [torch.tensor([[pair]], dtype=torch.float32) for pair in ([3.0, 4.0], [3.0, 4.0], [-4.0, 3.0])]
    run = LoopRun(states[0], states, states, torch.zeros(1, 1, 3), torch.nn.Linear(2, 2, bias=False))
    found = _motion(run)
    assert found["change"][:2] == [[None], [0.0]] and found["cosine"][0] == [None]
    assert found["change"][2][0] == pytest.approx(math.sqrt(2))  # (7, 1) has length sqrt 50, the state before 5
    assert found["cosine"][1][0] == pytest.approx(1) and found["cosine"][2][0] == pytest.approx(0, abs=1e-7)


def test_means_leave_out_what_is_missing():
    readings = [LoopReading((), 0.0, 0.5, 0.5, x, x, loss, None, None) for x, loss in ((1.0, 4.0), (3.0, None))]
    found = Trace(tuple(TokenTrace(1, "a", (reading,)) for reading in readings), ((1.0,),), 1)
    assert (found.mean("entropy"), found.mean("next_loss"), found.mean("change")) == ([2.0], [4.0], [None])


def test_the_read_out_is_chunked_and_never_that_of_all_loops(monkeypatch):
    whole = trace(MODEL, TOKENIZER, TEXT)
    rows = []
    handle = MODEL.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    monkeypatch.setattr(readout, "READ_BYTES", 4 * len(TOKENIZER) * 4)
    try:
        chunked = trace(MODEL, TOKENIZER, TEXT)
    finally:
        handle.remove()
    length = len(whole.tokens)
    assert max(rows) == 4 and sum(rows) == 3 * length
    for one, other in zip(whole.tokens, chunked.tokens, strict=True):
        for first, second in zip(one.loops, other.loops, strict=True):
            assert [best.id for best in first.top] == [best.id for best in second.top]
            assert second.kl_to_final == pytest.approx(first.kl_to_final, abs=1e-9)
            assert second.entropy == pytest.approx(first.entropy, rel=1e-9)
    losses = [token.loops[0].next_loss for token in chunked.tokens[:-1]]
    assert losses == pytest.approx([token.loops[0].next_loss for token in whole.tokens[:-1]], rel=1e-9)


def test_a_trace_comes_back_from_its_file(tmp_path):
    found = trace(MODEL, TOKENIZER, TEXT + ' "quoted" <b>\n\t\x1b')
    found.save(tmp_path / "new" / "trace.json")
    assert Trace.load(tmp_path / "new" / "trace.json") == found
    values = json.loads((tmp_path / "new" / "trace.json").read_text(encoding="utf-8"))
    assert list(values) == ["tokens", "cka", "trained_loops"]
    assert values["tokens"][0]["loops"][0]["change"] is None


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"tokens": [{}], "cka": [], "trained_loops": 3}', "\x00"])
def test_a_file_that_holds_no_trace_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json holds no trace .*; write one with `looplm trace --json`"):
        Trace.load(tmp_path / "x.json")


def test_loops_beyond_the_trained_ones_are_traced_with_a_warning():
    with pytest.warns(UserWarning, match="running 5 loops, but the model was trained with 3"):
        found = trace(MODEL, TOKENIZER, TEXT, loops=5)
    assert (found.loops, found.trained_loops, len(found.cka)) == (5, 3, 5)
    for token in found.tokens:
        assert sum(reading.exit_probability for reading in token.loops) == pytest.approx(1, rel=1e-5)
        assert token.loops[4].kl_to_final == 0
    shallow = trace(MODEL, TOKENIZER, TEXT, loops=2)
    assert [token.loops[1].top for token in shallow.tokens] == [token.loops[1].top for token in found.tokens]


def test_one_token_has_no_next_and_no_cka():
    found = trace(MODEL, TOKENIZER, "x")
    assert found.cka == ((None,) * 3,) * 3 and found.tokens[0].loops[0].next_loss is None


def test_hooks_are_traced_too():
    with loop_hook(MODEL, lambda state, loop: torch.ones_like(state), loop=2):
        found = trace(MODEL, TOKENIZER, TEXT)
    entropies = [token.loops[1].entropy for token in found.tokens]
    assert found.cka[1] == (None, None, None) and entropies == pytest.approx([entropies[0]] * len(entropies), rel=1e-12)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_pieces_join_to_the_text(text):
    found = pieces(TOKENIZER, encode(text))
    assert "".join(found) == TOKENIZER.decode(encode(text)) and len(found) == len(encode(text))


def test_pieces_show_special_tokens_and_put_a_character_with_its_last_token():
    assert pieces(TOKENIZER, [1, *encode("x"), 0]) == [TOKENIZER.decode([1]), "x", TOKENIZER.decode([0])]
    assert pieces(TOKENIZER, encode("a🦊b")) == ["a", "", "", "", "🦊", "b"]
    assert pieces(TOKENIZER, encode("a🦊")[:3]) == ["a", "", "�"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty; give some text to trace"),
        ("the " * 80, {}, r"the text has \d+ tokens, but the context holds 48; shorten it"),
        ("a\udcff", {}, "the text is no valid Unicode at character 1"),
        ("a", {"top_k": 0}, r"top_k is 0; it must lie in 1\.\.296, the vocabulary"),
        ("a", {"top_k": 301}, r"top_k is 301; it must lie in 1\.\.296"),
        ("a", {"loops": 0}, "num_loop_steps is 0; it must be at least 1"),
    ],
)
def test_bad_input_is_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        trace(MODEL, TOKENIZER, text, **options)


def test_states_that_are_not_finite_are_refused():
    def spoil(state, loop):
        return state / 0

    with (
        loop_hook(MODEL, spoil, loop=2),
        pytest.raises(FloatingPointError, match="the states after loop 2 are not finite; check the weights"),
    ):
        trace(MODEL, TOKENIZER, TEXT)


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Candidate(1, "a", 0.5).id = 2

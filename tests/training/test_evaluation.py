"""Loss by depth against plain cross entropy, loop by loop and document by document."""

import math

import numpy as np
import pytest
import torch
from small_run import encoded, small_model
from torch.nn.functional import cross_entropy

from looplm.data.pipeline import EncodedCorpus, Windows
from looplm.exits import exit_probabilities
from looplm.training.evaluation import evaluate_loops

CORPUS = encoded([30, 5, 2, 41, 17], characters=777)


@pytest.fixture(scope="module")
def model():
    """In fp64 and with weights large enough that loops, tokens and exits differ visibly."""
    torch.manual_seed(0)
    model = small_model(tie_word_embeddings=False).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model


def slow_losses(model, pairs, loops):
    """Summed nats of each loop over (tokens, targets, positions) triples, one run a loop."""
    nats = torch.zeros(loops, dtype=torch.float64)
    for tokens, targets, positions in pairs:
        for loop in range(1, loops + 1):
            logits = model(tokens[None], position_ids=positions, num_loop_steps=loop).logits[0]
            nats[loop - 1] += cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return nats


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:running")
def test_equals_one_run_a_loop_over_each_window(model):
    windows = Windows(CORPUS, 16, keep_remainder=True)
    pairs = [(torch.tensor(w["input_ids"]), torch.tensor(w["labels"]), None) for w in (windows[i] for i in range(6))]
    nats = slow_losses(model, pairs, 5)
    result = evaluate_loops(model, {"text": windows}, 5, 4)
    assert len(windows) == 6 and CORPUS.text_tokens == 90
    assert result.losses == pytest.approx((nats / 90).tolist(), rel=1e-9)
    assert result.bits_per_character == pytest.approx((nats / math.log(2) / 777).tolist(), rel=1e-9)
    assert len({round(loss, 3) for loss in result.losses}) == 5  # the loops do differ


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:running")
def test_separate_documents_equal_each_document_alone(model):
    stream = torch.tensor(CORPUS.tokens.astype(np.int64))
    documents = [stream[a:b] for a, b in zip(CORPUS.offsets, CORPUS.offsets[1:], strict=False)]
    nats = slow_losses(model, [(d[:-1], d[1:], None) for d in documents], 4)
    long = Windows(CORPUS, 60, separate_documents=True, keep_remainder=True)
    # 60 cuts the fourth document, so compare on the corpus without it, which one window holds
    kept = [documents[i] for i in (0, 1, 2, 4)]
    lengths = [0, *map(len, kept)]
    short = EncodedCorpus(torch.cat(kept).numpy().astype(np.uint16), np.cumsum(lengths), 500)
    expected = slow_losses(model, [(d[:-1], d[1:], None) for d in kept], 4)
    result = evaluate_loops(model, {"text": Windows(short, 60, separate_documents=True, keep_remainder=True)}, 4, 2)
    assert result.losses == pytest.approx((expected / short.text_tokens).tolist(), rel=1e-9)
    cut = evaluate_loops(model, {"text": long}, 4, 2)
    assert cut.losses != pytest.approx((nats / 90).tolist(), rel=1e-6)  # a cut document lost its context


@torch.no_grad()
def test_bits_per_character_by_hand():
    model = small_model(vocab_size=16, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)  # 4 bits a token, whatever the text
    tokens = np.array([0, 3, 4, 5, 6, 0, 7, 8], dtype=np.uint16)  # 6 text tokens in 2 documents of 10 characters
    corpus = EncodedCorpus(tokens, np.array([0, 5, 8]), 10)
    result = evaluate_loops(model, {"text": Windows(corpus, 3, keep_remainder=True)}, 2, 2)
    assert result.losses == pytest.approx([math.log(16)] * 2, rel=1e-6)
    assert result.bits_per_character == pytest.approx([4 * 6 / 10] * 2, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 2, 3, 6])
def test_exit_probabilities_are_those_of_the_trained_loops(model, loops):
    windows = Windows(CORPUS, 16, keep_remainder=True)
    mass, count = torch.zeros(3, dtype=torch.float64), 0
    for index in range(len(windows)):
        window = windows[index]
        gates = model(torch.tensor(window["input_ids"])[None], num_loop_steps=3).gate_logits[0]
        valid = torch.tensor(window["labels"]) != -100
        mass += exit_probabilities(gates)[valid].sum(0)
        count += int(valid.sum())
    result = evaluate_loops(model, {"text": windows}, loops, 4)
    assert len(result.losses) == loops
    assert result.exit_probabilities == pytest.approx((mass / count).tolist(), rel=1e-9)
    assert sum(result.exit_probabilities) == pytest.approx(1, abs=1e-9)
    p = result.exit_probabilities
    assert result.expected_depth == pytest.approx(p[0] + 2 * p[1] + 3 * p[2], rel=1e-12)


@pytest.mark.parametrize("separate", [False, True])
def test_the_padding_of_the_last_batch_changes_nothing(model, separate):
    windows = Windows(CORPUS, 16, separate_documents=separate, keep_remainder=True)
    whole, *others = (evaluate_loops(model, {"text": windows}, 4, size) for size in (6, 1, 4, 5, 50))
    for other in others:
        assert other.losses == pytest.approx(whole.losses, rel=1e-12)
        assert other.exit_probabilities == pytest.approx(whole.exit_probabilities, rel=1e-12)


def test_every_batch_has_the_same_shape(model, monkeypatch):
    shapes, forward = set(), type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **k: shapes.add(ids.shape) or forward(self, ids, **k))
    evaluate_loops(model, {"text": Windows(CORPUS, 16, keep_remainder=True)}, 3, 4)
    assert shapes == {(4, 16)}  # a smaller one would be compiled anew


def test_a_limit_reads_the_first_windows_and_gives_no_bits(model):
    windows = Windows(CORPUS, 16, keep_remainder=True)
    first = EncodedCorpus(CORPUS.tokens[:33], np.array([0, 30, 33]), 1)
    expected = evaluate_loops(model, {"text": Windows(first, 16, keep_remainder=True)}, 3, 2)
    for limit in (1, 2):  # whole batches
        result = evaluate_loops(model, {"text": windows}, 3, 2, limit)
        assert result.losses == pytest.approx(expected.losses, rel=1e-9) and result.bits_per_character is None


def test_the_mode_is_given_back_and_no_gradient_kept():
    model = small_model()
    windows = Windows(CORPUS, 16, keep_remainder=True)
    for training in (True, False):
        model.train(training)
        evaluate_loops(model, {"text": windows}, 3, 4)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_running_beyond_the_trained_depth_is_not_warned_about(model, recwarn):
    evaluate_loops(model, {"text": Windows(CORPUS, 16, keep_remainder=True)}, 6, 4)
    assert not recwarn.list


@torch.no_grad()
def test_several_sources_are_told_apart_and_weighed_by_their_tokens(model):
    other = encoded([20, 9], seed=5, characters=123)
    windows = {"one": Windows(CORPUS, 16, keep_remainder=True), "two": Windows(other, 16, keep_remainder=True)}
    both = evaluate_loops(model, windows, 3, 4)
    one, two = (evaluate_loops(model, {name: source}, 3, 4) for name, source in windows.items())
    assert both.source_losses == {"one": one.losses, "two": two.losses}
    share = 90 / (90 + 27)  # text tokens
    mixed = [share * a + (1 - share) * b for a, b in zip(one.losses, two.losses, strict=True)]
    assert both.losses == pytest.approx(mixed, rel=1e-12)
    bits = [loss * 117 / math.log(2) / (777 + 123) for loss in both.losses]
    assert both.bits_per_character == pytest.approx(bits, rel=1e-12)
    depth = share * one.expected_depth + (1 - share) * two.expected_depth
    assert both.expected_depth == pytest.approx(depth, rel=1e-12)


def test_a_limit_is_shared_by_the_sources(model, monkeypatch):
    seen, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **k: seen.append(len(ids)) or forward(self, ids, **k))
    windows = {name: Windows(encoded([60], seed=n), 8, keep_remainder=True) for n, name in enumerate("abc")}
    evaluate_loops(model, windows, 3, 2, limit=7)
    assert len(seen) == 3 * 2  # 7 windows over 3 sources in batches of 2: 2 batches each

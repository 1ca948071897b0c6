"""Verifying: a sound checkpoint passes, and each kind of fault is found, named and turned into the right verdict."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sound_model import TEXT, save, sound_model
from tiny import tiny_model

from looplm.data.tokenizers import train_bpe
from looplm.files import plain
from looplm.model.precision import Agreement
from looplm.model.verifying import check_loops, check_precision, check_tokens, check_training, verify_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save(*sound_model(), tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of the sound checkpoint to damage."""
    return shutil.copytree(sound, tmp_path / "model")


def results(report) -> dict[str, str]:
    return {check.name: check.result for check in report.checks}


def edit(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


ALL_PASS = {
    "weights": "pass",
    "loading": "pass",
    "tokens": "note",
    "precision": "pass",
    "training": "pass",
    "loops": "pass",
    "exits": "note",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_checkpoint_passes(dtype, tmp_path):
    model, tokenizer = sound_model()
    report = verify_model(save(model.to(dtype), tokenizer, tmp_path), TEXT)
    assert results(report) == ALL_PASS and report.passed
    assert report.verdict == "whole, trained, and better with every loop up to the trained depth"
    assert report.measurement is not None and len(report.measurement.losses) == 6
    assert report.measurement.exit_probabilities == pytest.approx([0.5, 0.25, 0.25])
    assert report.agreement is not None and report.agreement.same_token == report.agreement.positions == 8


def test_the_record_is_json_and_says_what_computed_it(sound):
    record = json.loads(json.dumps(plain(verify_model(sound, TEXT).record()), allow_nan=False))
    assert record["passed"] is True and record["model"] == sound
    assert set(record["versions"]) == {"looplm", "torch", "transformers"} and all(record["versions"].values())
    assert record["config"]["total_ut_steps"] == 3 and len(record["measurement"]["losses"]) == 6
    assert [check["name"] for check in record["checks"]] == list(ALL_PASS)


def test_random_weights_look_untrained(tmp_path):
    tokenizer = train_bpe([TEXT], 270)
    model = tiny_model(vocab_size=270).float()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    report = verify_model(save(model, tokenizer, tmp_path), TEXT)
    assert results(report)["weights"] == results(report)["loading"] == "pass"
    assert results(report)["training"] == "FAIL" and not report.passed
    assert report.verdict == "the structure is right, but the weights look untrained"


def test_loops_in_the_wrong_order(tmp_path):
    """Said to be trained for 5 loops, but best after 3."""
    report = verify_model(save(*sound_model(loops=5), tmp_path), TEXT)
    assert results(report) == {**ALL_PASS, "loops": "FAIL"}
    assert report.verdict == "trained, but the loss does not fall loop by loop to the trained depth"
    assert "lowest after loop 3" in next(check.finding for check in report.checks if check.name == "loops")


def test_all_trained_loops_are_measured(tmp_path):
    report = verify_model(save(*sound_model(loops=8), tmp_path), TEXT)
    assert report.measurement is not None and len(report.measurement.losses) == 8


def test_a_missing_weight(folder):
    edit(folder, lambda weights: weights.pop("model.early_exit_gate.bias"))
    report = verify_model(str(folder), TEXT)
    assert [(check.name, check.finding) for check in report.checks] == [
        ("weights", "model.early_exit_gate.bias is missing")
    ]
    assert report.verdict == "the checkpoint is incomplete or damaged" and not report.passed


def test_many_differences_are_counted(folder):
    edit(folder, lambda weights: weights.clear())
    finding = verify_model(str(folder), TEXT).checks[0].finding
    assert finding.count("is missing") == 3 and finding.endswith("(and 13 more)")


def test_weights_that_are_not_there(folder):
    (folder / "model.safetensors").unlink()
    report = verify_model(str(folder), TEXT)
    assert results(report) == {"weights": "FAIL"} and "there is neither model.safetensors" in report.checks[0].finding


def test_a_weight_that_is_not_finite(folder):
    edit(folder, lambda weights: weights["model.norm.weight"][5:6].fill_(float("nan")))
    report = verify_model(str(folder), TEXT)
    assert results(report) == {"weights": "pass", "loading": "FAIL"}
    assert "weight model.norm.weight holds NaN" in report.checks[-1].finding
    assert report.verdict == "the checkpoint is incomplete or damaged"


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    report = verify_model(str(folder), TEXT)
    assert results(report) == {"weights": "pass", "loading": "FAIL"}
    assert "has no tokenizer that can be read" in report.checks[-1].finding


def test_numbers_that_overflow(folder):
    edit(folder, lambda weights: weights["lm_head.weight"].fill_(-3e38))
    report = verify_model(str(folder), TEXT)
    assert results(report)["precision"] == "FAIL"
    assert report.verdict.startswith("fp32 and bf16 disagree")
    json.dumps(plain(report.record()), allow_nan=False)


def test_what_is_no_checkpoint_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config\.json"):
        verify_model(str(tmp_path), TEXT)


def test_too_short_a_text_is_an_error(sound):
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        verify_model(sound, "")


# ---- the single checks, by hand


@pytest.mark.parametrize(
    ("losses", "trained", "result"),
    [
        ([5.0, 4.0, 3.5, 3.4], 4, "pass"),
        ([5.0, 4.0, 3.5, 3.4, 3.6, 3.9], 4, "pass"),  # beyond the trained loops it may rise
        ([5.0, 4.0, 4.009, 3.9], 4, "pass"),  # within 0.01
        ([5.0, 4.0, 4.02, 3.9], 4, "FAIL"),
        ([5.0, 5.0], 2, "FAIL"),
        ([5.0, 5.005], 2, "FAIL"),  # within 0.01 of the one before, but not below the first
        ([5.0, math.nan], 2, "FAIL"),
        ([5.0, 4.0], 1, "note"),
    ],
)
def test_the_order_of_the_loops(losses, trained, result):
    assert check_loops(losses, trained).result == result


@given(st.lists(st.floats(0.5, 12), min_size=2, max_size=8, unique=True), st.randoms())
def test_falling_losses_pass_and_rising_ones_fail(losses, random):
    falling = sorted(losses, reverse=True)
    assert check_loops(falling, len(falling)).result == "pass"
    assert check_loops(falling[::-1], len(falling)).result == "FAIL"
    assert check_loops([*falling, *random.sample(losses, 2)], len(falling)).result == "pass"


@pytest.mark.parametrize(
    ("losses", "result"),
    [([10.8, 8.63], "pass"), ([10.8, 8.65], "FAIL"), ([11.0, 12.0], "FAIL"), ([math.nan, 2.0], "FAIL")],
)
def test_untrained_is_above_eight_tenths_of_guessing(losses, result):
    assert check_training(losses, 49152).result == result  # 0.8 ln 49152 = 8.642


@pytest.mark.parametrize(("divergence", "result"), [(0.0, "pass"), (0.1, "pass"), (0.11, "FAIL"), (math.nan, "FAIL")])
def test_the_limit_of_divergence(divergence, result):
    assert check_precision(Agreement(8, 8, divergence)).result == result


def test_one_token_for_begin_and_end_is_noted():
    config = sound_model()[0].config
    assert "bos 0, eos 0, pad none: bos and eos are one token; `looplm convert`" in check_tokens(config).finding
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    assert check_tokens(config).finding == "bos 1, eos 2, pad 0"

"""A calibration beside the weights: where a budget begins, and that other weights refuse it."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tokens

from looplm.engine import Engine, SamplingParams
from looplm.model.calibration import (
    CALIBRATION,
    DepthTable,
    read_calibration,
    starting_threshold,
    weights_fingerprint,
)
from looplm.model.modeling import OuroForCausalLM

TABLE = [[1.5, 0.2], [2.0, 0.4], [3.0, 1.0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().float().save_pretrained(tmp_path)
    return tmp_path


def write(folder: Path, **changes: object) -> OuroForCausalLM:
    model = OuroForCausalLM.from_pretrained(folder)
    values = {"weights": weights_fingerprint(model), "rules": {"q": {"table": TABLE}}, **changes}
    (folder / CALIBRATION).write_text(json.dumps(values))
    return model


def test_thresholds_by_hand() -> None:
    table = DepthTable((1.5, 2.0, 3.0), (0.2, 0.4, 1.0))
    assert [table.threshold(depth) for depth in (1.0, 1.5, 1.75, 2.5, 3.0, 9.0)] == pytest.approx(
        [0.2, 0.2, 0.3, 0.7, 1.0, 1.0]
    )
    rows = table.threshold(torch.tensor([1.75, 2.5]))
    assert isinstance(rows, torch.Tensor) and rows.tolist() == pytest.approx([0.3, 0.7])


def test_a_budget_begins_where_the_calibration_says(folder: Path) -> None:
    assert starting_threshold(OuroForCausalLM.from_pretrained(folder), 2.5) == 0.5  # nothing is known yet
    model = write(folder)
    assert starting_threshold(model, 2.5) == pytest.approx(0.7)
    assert starting_threshold(tiny_model(), 2.5) == 0.5  # from no folder
    (folder / CALIBRATION).write_text(json.dumps({"weights": "x", "rules": {}}))
    assert starting_threshold(model, 2.5) == 0.5  # the gate was not calibrated


def test_generate_and_the_engine_both_begin_there(folder: Path) -> None:
    """A threshold of 1e-9 stops at the first loop, one of 1 never before the last: the table is what decides."""
    model, prompt = OuroForCausalLM.from_pretrained(folder), tokens(1, 5)
    for threshold, depth in ((1e-9, 1), (1.0, 3)):
        write(folder, rules={"q": {"table": [[1.0, threshold], [3.0, threshold]]}})
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), depth_budget=2.0, max_new_tokens=2, do_sample=False,
            prefill="adaptive", return_dict_in_generate=True,
        )  # fmt: skip
        assert out.exit_depths[0, 0] == depth
        params = SamplingParams(max_tokens=2, temperature=0, depth_budget=2.0, prefill="adaptive")
        (done,) = Engine(model).generate([prompt[0].tolist()], params)
        assert done.exit_depths[0] == depth


@pytest.mark.parametrize("change", ["tuned", "dtype", "replaced"])
def test_other_weights_refuse_it(folder: Path, change: str) -> None:
    model = write(folder)
    starting_threshold(model, 2.0)  # so that a fingerprint is remembered
    if change == "tuned":
        with torch.no_grad():
            model.model.early_exit_gate.bias.add_(1e-3)
    elif change == "dtype":
        model = OuroForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.01)
    with pytest.raises(ValueError, match=r"measured on other weights .*: calibrate again with `looplm calibrate"):
        starting_threshold(model, 2.0)
    prompt = tokens(1, 5)
    with pytest.raises(ValueError, match="calibrate again"):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), depth_budget=2.0, max_new_tokens=2)
    model.generate(prompt, attention_mask=torch.ones_like(prompt), exit_threshold=0.5, max_new_tokens=2)


def test_it_stays_with_its_folder_and_holds_wherever_its_weights_are(folder: Path, tmp_path: Path) -> None:
    model = write(folder)
    model.save_pretrained(folder)
    assert starting_threshold(OuroForCausalLM.from_pretrained(folder), 2.5) == pytest.approx(0.7)
    other = tmp_path / "other"
    model.save_pretrained(other)
    copy = OuroForCausalLM.from_pretrained(other)
    assert starting_threshold(copy, 2.5) == 0.5 and not (other / CALIBRATION).exists()
    (other / CALIBRATION).write_bytes((folder / CALIBRATION).read_bytes())
    assert starting_threshold(copy, 2.5) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weights": 1, "rules": {}}', '{"weights": "x", "rules": {"q": {"table": []}}}']
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION).write_text(text)
    with pytest.raises(ValueError, match="is no calibration that can be read; run `looplm calibrate"):
        read_calibration(tmp_path)


def test_fingerprints_know_every_weight() -> None:
    model, same, other = tiny_model(), tiny_model(), tiny_model(1)
    assert weights_fingerprint(model) == weights_fingerprint(same) != weights_fingerprint(other)
    with torch.no_grad():
        same.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-9
    assert weights_fingerprint(model) != weights_fingerprint(same)

"""Whole runs of fine-tuning on a small model: what they learn, leave and refuse, and that a killed one goes on."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from killing import CONTEXT, Moment, run_command
from small_run import read_lines
from transformers import AutoModelForCausalLM
from tuned import save_base, sft_recipe, sft_values, weights

from looplm.model.loading import load_model
from looplm.model.saving import Provenance, write_model
from looplm.objectives.token_losses import IGNORED
from looplm.tuning.conversations import prepare_conversations, windows
from looplm.tuning.recalibration import measure_rows
from looplm.tuning.resuming import MARK
from looplm.tuning.sft import tune

CONTEXT.set_forkserver_preload(["looplm.cli", "looplm.training.run", "looplm.training.report", "looplm.tuning.sft"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(autouse=True)
def calm(quiet):
    """Without chatter of transformers."""


def steps_of(folder: Path):
    return [record for record in read_lines(folder / "metrics.jsonl") if "loss" in record and "step" in record]


def test_a_run_learns_and_leaves_a_folder_that_loads_anywhere(tmp_path, base):
    recipe = sft_recipe(tmp_path, base, steps=20)
    report = tune(recipe)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "model", "report.json", "before.json", "metrics.jsonl", "recipe.yaml", "data", "checkpoints"
    }  # fmt: skip
    before, after = report["before"]["losses"], report["after"]["losses"]
    assert len(before) == len(after) == 5 and all(b > a + 1 for b, a in zip(before[:3], after, strict=False))
    records = steps_of(out)
    assert [record["step"] for record in records] == list(range(1, 21)) and report["steps"] == 20
    assert all(len(record["losses"]) == 3 and 1 < record["expected_depth"] < 3 for record in records)
    loaded = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    data = prepare_conversations(recipe, load_model(str(base))[1], out / "data")
    again = measure_rows(loaded, windows(data.validation, 2, 8), 5)
    assert again.losses == pytest.approx(after, rel=1e-5) and again.tokens == report["measured_tokens"]
    assert loaded.generation_config.eos_token_id == [0, 2]  # <|im_end|> ends a turn
    card = (out / "model" / "README.md").read_text()
    assert "Supervised fine-tuning by looplm of model: all weights, 20 steps." in card
    assert str(tmp_path) not in card
    assert (out / "model" / "recipe.yaml").read_text() == recipe.to_yaml() == (out / "recipe.yaml").read_text()
    assert tune(recipe) == report  # finished: nothing is done again


def test_the_first_step_has_the_loss_of_its_rows_and_micro_batches_change_nothing(tmp_path, base):
    runs = {size: tmp_path / str(size) for size in (1, 4)}
    for size, folder in runs.items():
        tune(sft_recipe(folder, base, micro_batch_size=size, steps=3))
    ones, fours = (steps_of(folder / "out") for folder in runs.values())
    for one, four in zip(ones, fours, strict=True):
        assert one["target_tokens"] == four["target_tokens"]
        assert one["losses"] == pytest.approx(four["losses"], rel=1e-4)
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)
    recipe = sft_recipe(tmp_path / "1", base)
    model, tokenizer = load_model(str(base))
    data = prepare_conversations(recipe, tokenizer, tmp_path / "1" / "out" / "data")
    ways = []  # mean over target tokens of every set of rows of the epoch is near the first step's: an untrained model
    for batch in windows(data.train, 4):
        out = model(batch["input_ids"], position_ids=batch["position_ids"], shift_labels=batch["labels"])
        ways.append((int((batch["labels"] != IGNORED).sum()), out.loop_losses.tolist()))
    total = sum(count for count, _ in ways)
    mean = [sum(count * losses[loop] for count, losses in ways) / total for loop in range(3)]
    assert ones[0]["losses"] == pytest.approx(mean, rel=0.05)


def test_the_last_loop_alone_leaves_the_gate(tmp_path, base):
    tune(sft_recipe(tmp_path, base, objective="last", steps=3))
    before, after = (weights(load_model(str(folder))[0]) for folder in (base, tmp_path / "out" / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "early_exit_gate" not in name}


def test_gradient_checkpointing_changes_memory_and_not_numbers(tmp_path, base):
    for name, saved in (("plain", False), ("saved", True)):
        tune(sft_recipe(tmp_path / name, base, gradient_checkpointing=saved, steps=2))
    plain, saved = ([record["loss"] for record in steps_of(tmp_path / name / "out")] for name in ("plain", "saved"))
    assert plain == pytest.approx(saved, rel=1e-6)


def test_recalibration_moves_the_gate_alone_and_shows_the_frontier(tmp_path, base):
    for name, wanted in (("without", {}), ("with", {"recalibrate_gate": True, "gate": {"tokens": 400, "epochs": 2}})):
        tune(sft_recipe(tmp_path / name, base, steps=3, packing=False, **wanted))
    report = json.loads((tmp_path / "with" / "out" / "report.json").read_text())
    assert set(report["gate"]["frontier"]["curves"]) == {
        "static depth", "gate before tuning", "tuned gate", "recalibrated gate", "max probability"
    }  # fmt: skip
    assert report["gate"]["fit"]["loss_after"] < report["gate"]["fit"]["loss_before"]
    without, fitted = (weights(load_model(str(tmp_path / n / "out" / "model"))[0]) for n in ("without", "with"))
    changed = {name for name in without if not torch.equal(without[name], fitted[name])}
    assert changed == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    bare = json.loads((tmp_path / "without" / "out" / "report.json").read_text())
    assert bare["gate"] is None and bare["after"]["losses"] == report["after"]["losses"]


def test_a_bf16_model_is_tuned_in_fp32_and_saved_as_it_came(tmp_path, base):
    model, tokenizer = load_model(str(base), torch.bfloat16)
    write_model(tmp_path / "half", model, tokenizer, Provenance("Untrained."))
    gate = {"recalibrate_gate": True, "gate": {"tokens": 300, "epochs": 1}}
    report = tune(sft_recipe(tmp_path, tmp_path / "half", steps=2, objective="last", packing=False, **gate))
    assert load_model(str(tmp_path / "out" / "model"))[0].dtype == torch.bfloat16
    assert "tuned gate" not in report["gate"]["frontier"]["curves"]  # the last loop alone leaves it as it was


# ---- killed, stopped, begun twice


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(tmp_path, base):
    recipes, lora = {}, {"rank": 2, "dropout": 0.3}  # dropout draws random numbers
    for name in ("whole", "killed"):
        recipes[name] = tmp_path / name / "recipe.yaml"
        values = sft_values(tmp_path / name, base, lora=lora, steps=7)
        recipes[name].write_text(yaml.safe_dump(values))
    code, said = run_command(["sft", str(recipes["whole"])], tmp_path / "log")
    assert code == 0, said
    moments = [
        Moment("torch.optim:AdamW.step", 2),  # before the first checkpoint
        Moment("transformers.trainer:Trainer._save_rng_state", 2),  # in the second one, which stays unmarked
        Moment("looplm.tuning.sft:write_model"),  # trained, but not saved
    ]
    for moment in moments:
        code, said = run_command(["sft", str(recipes["killed"])], tmp_path / "log", moment)
        assert code == -signal.SIGKILL, (moment, said)
    code, said = run_command(["sft", str(recipes["killed"])], tmp_path / "log")
    assert code == 0 and "going on from step 7" in said and "expected depth" in said, said
    whole, killed = (tmp_path / name / "out" for name in ("whole", "killed"))
    assert steps_of(killed) == steps_of(whole) and len(steps_of(whole)) == 7
    for path in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (killed / path).read_bytes() == (whole / path).read_bytes()
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left == ["checkpoint-6", "checkpoint-7"] and (killed / "checkpoints" / left[1] / MARK).is_file()


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, base, monkeypatch):
    from looplm.training.resume import Stopped, StopSignal
    from looplm.tuning.trainer import LoopSFTTrainer

    real, calls = LoopSFTTrainer.compute_loss, []

    def compute_loss(self, *args, **options):
        calls.append(1)
        if len(calls) == 5:  # two a step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(LoopSFTTrainer, "compute_loss", compute_loss)
    assert not StopSignal.requested
    recipe = sft_recipe(tmp_path, base, checkpoints={"every_steps": 100})
    with pytest.raises(Stopped, match="stopped and saved at step 3; start the same command again to go on"):
        tune(recipe)
    assert tune(recipe)["steps"] == 6
    assert [record["step"] for record in steps_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_another_recipe_is_refused_with_the_differences(tmp_path, base):
    tune(sft_recipe(tmp_path, base, steps=1))
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(seed: 5 before, 6 now\): go back"):
        tune(sft_recipe(tmp_path, base, steps=1, seed=6))


def test_missing_records_are_refused(tmp_path, base):
    recipe, out = sft_recipe(tmp_path, base, steps=2), tmp_path / "out"
    tune(recipe)
    (out / "report.json").unlink()
    os.truncate(out / "metrics.jsonl", 10)
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl has 10 bytes, but had \d+ at the last checkpoint: put it back"
    ):
        tune(recipe)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, base):
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is (nan|inf); lower learning_rate"):
        tune(sft_recipe(tmp_path, base, learning_rate=1e30, clip=1e30, warmup_steps=0))


# ---- what is refused, before anything is written


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequence_length": 257}, "sequence_length is 257, but .* has a context of 256 tokens"),
        ({"model": "nowhere"}, "no such model: nowhere"),
        (
            {"lora": {"target_modules": ["lm_head"]}},
            r"'lm_head', whose weight is head and embedding at once here",
        ),
        ({"lora": {"target_modules": ["q"]}}, "lora.target_modules has 'q', which is no projection of a layer; give"),
        ({"data": {"sources": {"x": {"location": "no.jsonl", "messages_field": "m"}}}}, "source x: no such file"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(tmp_path, base, changes, told):
    with pytest.raises(ValueError, match=told):
        tune(sft_recipe(tmp_path, base, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "changes", "told"),
    [
        ({"tie_word_embeddings": False}, {"lora": {"target_modules": ["lm_head"]}}, "would never be trained"),
        ({"exit_gate_pooling": "causal_mean"}, {"recalibrate_gate": True}, "gate pools over positions"),
        ({"total_ut_steps": 1}, {"recalibrate_gate": True}, "the model has 1 loop"),
    ],
)
def test_what_a_model_cannot_do(tmp_path, fields, changes, told):
    model = save_base(tmp_path / "model", **fields)
    with pytest.raises(ValueError, match=told):
        tune(sft_recipe(tmp_path, model, **changes))


def test_a_template_without_markers_is_refused(tmp_path):
    model = save_base(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"a chat template without \{% generation %\} markers"):
        tune(sft_recipe(tmp_path, model))
    assert not (tmp_path / "out").exists()

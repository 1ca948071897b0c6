"""The trainer: it learns, repeats itself, accumulates, clips, decays what it should, stops at a bad number."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch
from small_run import encoded, small_model

from looplm.data.mixture import Mixture, batch
from looplm.data.pipeline import Windows
from looplm.files import save_folder
from looplm.objectives.loop_regulariser import loop_regulariser
from looplm.training import acceleration
from looplm.training.loop_counts import LoopCountSettings, sampled_loop_count
from looplm.training.planning import PlannedStage, plan
from looplm.training.recipe import Recipe, Stage
from looplm.training.schedule import exit_beta, learning_rate_factor
from looplm.training.tracking import Tracker, read_metrics
from looplm.training.trainer import Trainer, TrainingState, build_optimizer

TRAIN, VALIDATION = encoded([300, 500, 400]), encoded([90, 60], seed=1)
QUICK = {"warmup_steps": 2, "learning_rate": 3e-3, "compile": "off", "autocast": "none", "evaluations": 2}


def planned(model, **settings) -> PlannedStage:
    """The plan of a recipe with one stage of 6 steps of 4 sequences of 24 tokens."""
    if not {"steps", "tokens", "minutes"} & set(settings):
        settings["steps"] = 6
    batch = {"sequence_length": 24, "batch_tokens": 96, "micro_batch_size": 4}
    recipe = {
        "output": "unused",
        "data": {"sources": {"text": {"location": "unused"}}},
        "tokenizer": {"pretrained": "unused"},
        "stages": [{"name": "only", **QUICK, **batch, **settings}],
    }
    return plan(Recipe.validated(recipe, "r"), model.config)[0]


def make(folder: Path, model=None, save=lambda evaluation: None, **settings) -> Trainer:
    if model is None:
        torch.manual_seed(0)
        model = small_model()
    stage = planned(model, **settings)
    state = TrainingState(model, build_optimizer(model, stage.settings))
    mixture = Mixture({"text": TRAIN}, {"text": 1.0}, 24, seed=5)
    validation = {"text": Windows(VALIDATION, 24, keep_remainder=True)}
    return Trainer(state, stage, mixture, validation, 5, Tracker(folder), save)


def steps_of(folder: Path) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl")["step"]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in steps_of(folder)]


def test_the_loss_of_every_loop_falls(tmp_path):
    result = make(tmp_path, steps=60, batch_tokens=8 * 24, learning_rate=1e-2).run()
    first, last = steps_of(tmp_path)[0]["loop_losses"], steps_of(tmp_path)[-1]["loop_losses"]
    assert len(first) == 3 and first == pytest.approx([math.log(40)] * 3, abs=0.2)
    assert all(after < before - 1 for before, after in zip(first, last, strict=True))
    assert max(result.final.losses[:3]) < math.log(40) - 1  # on text it has not seen too
    assert (result.steps, result.tokens) == (60, 60 * 8 * 24)
    assert not result.compiled and result.autocast is None


@pytest.mark.parametrize(
    "fields",
    [
        {"num_prelude_layers": 1, "num_coda_layers": 1, "exit_gate_pooling": "causal_mean"},
        {"input_injection": "add", "sandwich_norm": False, "num_key_value_heads": 1},
        {"exit_prior": 0.4},
    ],
)
def test_every_variant_of_the_model_trains(tmp_path, fields):
    torch.manual_seed(0)
    make(tmp_path, small_model(**fields), steps=40, learning_rate=1e-2).run()
    records = steps_of(tmp_path)
    assert records[-1]["loop_losses"][-1] < records[0]["loop_losses"][-1] - 0.5


def test_the_same_seed_gives_the_same_losses(tmp_path):
    for name in "ab":
        make(tmp_path / name, steps=31).run()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(one["step"]) == 31
    assert one["evaluation"] == two["evaluation"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_accumulation_equals_the_larger_batch(tmp_path, dtype, tolerance):
    torch.manual_seed(0)
    start = small_model().to(dtype)
    whole, parts = (
        make(tmp_path, copy.deepcopy(start), batch_tokens=8 * 24, micro_batch_size=size, learning_rate=1e-3)
        for size in (8, 3)  # 3 + 3 + 2 sequences
    )
    for step in range(3):
        one, two = whole.step(step / 3), parts.step(step / 3)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["loop_losses"] == pytest.approx(two["loop_losses"], rel=1e-5)
        assert one["exit_probabilities"] == pytest.approx(two["exit_probabilities"], rel=1e-5)
        assert one["gate_entropy"] == pytest.approx(two["gate_entropy"], rel=1e-5)
        assert one["loop_grad_norms"] == pytest.approx(two["loop_grad_norms"], rel=1e-4)
        assert one["tokens"] == two["tokens"] == (step + 1) * 8 * 24
    for a, b in zip(whole.state.model.parameters(), parts.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_memory_only(tmp_path):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = small_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        folder = tmp_path / str(checkpointing)
        make(folder, model, steps=31).run()
        results.append(steps_of(folder))
    for one, two in zip(*results, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["loop_grad_norms"] == pytest.approx(two["loop_grad_norms"], rel=1e-4)


def test_gradients_are_clipped_and_the_norm_before_is_recorded(tmp_path, monkeypatch):
    trainer, seen = make(tmp_path, clip=0.01), []

    def norm() -> float:
        gradients = [p.grad.norm() for p in trainer.state.model.parameters() if p.grad is not None]
        return torch.stack(gradients).norm().item()

    trainer.state.optimizer.register_step_pre_hook(lambda *_: seen.append(norm()))
    records = [trainer.step(step / 3) for step in range(3)]
    assert all(record["grad_norm"] > 0.1 for record in records)
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(parameter.grad is None for parameter in trainer.state.model.parameters())


def test_only_the_matrices_of_the_layers_decay():
    model = small_model(num_prelude_layers=1, num_coda_layers=1, tie_word_embeddings=False)
    optimizer = build_optimizer(model, Stage(name="x", steps=1, weight_decay=0.5, learning_rate=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert len(decayed) == 4 * 7 and all(".self_attn." in name or ".mlp." in name for name in decayed)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.coda_norm.weight"} <= kept
    assert {"model.early_exit_gate.weight", "model.early_exit_gate.bias"} <= kept
    assert len(decayed) + len(kept) == len(names)


def test_decay_by_hand():
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, Stage(name="x", steps=1, weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight * (1 - 0.1 * 0.5)
    )
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert torch.equal(model.model.early_exit_gate.bias, before.model.early_exit_gate.bias)


def test_a_record_has_the_rate_and_beta_that_were_used(tmp_path):
    trainer = make(
        tmp_path,
        steps=10,
        warmup_steps=4,
        decay_fraction=0.5,
        final_learning_rate=5e-4,
        exit_beta_start=1.0,
        exit_beta=0.1,
        learning_rate=1e-2,
    )
    for step in (0, 3, 5, 9):
        trainer.state.step = step
        record = trainer.step(step / 10)
        expected = 1e-2 * learning_rate_factor(step, step / 10, 4, 0.5, 0.05)
        assert record["learning_rate"] == pytest.approx(expected)
        assert {group["lr"] for group in trainer.state.optimizer.param_groups} == {record["learning_rate"]}
        assert record["exit_beta"] == exit_beta(step / 10, 1.0, 0.6, 0.1)
        p = record["exit_probabilities"]
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert record["expected_depth"] == pytest.approx(p[0] + 2 * p[1] + 3 * p[2])


def test_the_loss_is_the_models_own_objective(tmp_path):
    trainer = make(tmp_path)
    reference, first = copy.deepcopy(trainer.state.model).train(), batch(trainer.mixture, 0, 4)
    out = reference(first["input_ids"], shift_labels=first["labels"], exit_beta=0.05)
    record = trainer.step(0.0)
    assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-6)
    assert record["loop_losses"] == pytest.approx(out.loop_losses.tolist(), rel=1e-6)
    p = out.exit_probabilities
    assert record["exit_probabilities"] == pytest.approx(p.mean((0, 1)).tolist(), rel=1e-5)
    assert record["gate_entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)


def test_bf16_autocast_trains_fp32_parameters(tmp_path):
    torch.manual_seed(0)
    model = small_model()
    result = make(tmp_path, model, steps=41, autocast="bfloat16", learning_rate=1e-2).run()
    assert result.autocast == "bfloat16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


@pytest.mark.parametrize("bad", [0, 4])
def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path, monkeypatch, bad):
    trainer, steps = make(tmp_path, steps=8, evaluations=1), []
    real = trainer.step

    def step(progress):
        if trainer.state.step == bad:
            torch.nn.init.constant_(trainer.state.model.model.norm.weight, math.nan)
        steps.append(trainer.state.step)
        return real(progress)

    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(FloatingPointError, match=rf"^stage 1 only, step {bad}: the loss is nan.*lower learning_rate"):
        trainer.run()
    assert steps == list(range(bad + 1))
    records = steps_of(tmp_path) if bad else []
    assert [record["step"] for record in records] == list(range(bad))


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path):
    trainer = make(tmp_path)
    weight = trainer.state.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.detach().clone()
    trainer.state.step = 4
    with pytest.raises(FloatingPointError, match=r"step 4: .* the gradient norm (nan|inf)"):
        trainer.step(0.5)
    assert torch.equal(weight, before)


def test_a_diverged_model_is_not_saved(tmp_path):
    saved = []
    trainer = make(tmp_path, steps=1, save=saved.append)
    trainer.state.optimizer.register_step_post_hook(
        lambda *_: torch.nn.init.constant_(trainer.state.model.lm_head.weight, math.nan)
    )
    with pytest.raises(FloatingPointError, match=r"^stage 1 only, step 1: the validation loss by loop is \[nan"):
        trainer.run()
    assert saved == []


def test_metrics_are_valid_and_complete(tmp_path):
    trainer = make(tmp_path, steps=21, evaluations=3)
    result = trainer.run()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in metrics["step"]] == list(range(21))
    assert {record["stage"] for record in metrics["step"]} == {"only"}
    assert [record["step"] for record in metrics["evaluation"]] == [7, 14, 21]
    assert metrics["evaluation"][-1]["loop_losses"] == result.final.losses and len(result.final.losses) == 5  # T + 2
    assert metrics["evaluation"][-1]["source_losses"] == {"text": result.final.losses}


def test_the_model_is_saved_at_every_evaluation(tmp_path):
    saved = []
    trainer = make(tmp_path, steps=8, evaluations=4)
    trainer.save = lambda evaluation: saved.append(trainer.state.tokens // 96)
    trainer.run()
    assert saved == [2, 4, 6, 8]


def test_a_step_takes_the_samples_that_the_plan_gives_it(tmp_path, monkeypatch):
    taken = []
    trainer = make(tmp_path, steps=9, batch_tokens=6 * 24, batch_tokens_start=2 * 24, batch_ramp_steps=4)
    trainer.state.first_sample = 100
    monkeypatch.setattr(
        "looplm.training.trainer.batch",
        lambda mixture, first, size: taken.append((first, size)) or batch(mixture, first, size),
    )
    records = [trainer.step(0.0) for _ in range(6)]
    # 2, 2, 4, 4 sequences while it grows (in twos, which micro-batches of 4 and both ends share), then 6 = 4 + 2
    assert taken == [(100, 2), (102, 2), (104, 4), (108, 4), (112, 4), (116, 2), (118, 4), (122, 2)]
    assert [record["tokens"] // 24 for record in records] == [2, 4, 8, 12, 18, 24]
    assert records[-1]["source_tokens"] == {"text": 24 * 24}


def test_a_state_taken_up_in_the_middle_goes_on_as_before(tmp_path):
    whole = make(tmp_path / "whole", steps=12)
    records = [whole.step(step / 12) for step in range(5)]
    plain = json.loads(json.dumps(whole.state.plain()))
    other = make(tmp_path / "rest", copy.deepcopy(whole.state.model), steps=12)
    other.state.optimizer.load_state_dict(copy.deepcopy(whole.state.optimizer.state_dict()))
    other.state.restore(plain)
    assert other.state.plain() == whole.state.plain() and other.state.step == 5
    for step in range(5, 12):
        one, two = whole.step(step / 12), other.step(step / 12)
        assert one == two  # bit for bit, counts included
        records.append(one)
    assert [record["step"] for record in records] == list(range(12))


def test_drawn_loop_counts_are_those_of_the_seed_and_step(tmp_path):
    counts = {"distribution": "uniform", "least": 1, "most": 3}
    trainer = make(tmp_path, steps=12, loop_counts=counts)
    lengths = [len(trainer.step(step / 12)["loop_losses"]) for step in range(12)]
    settings = LoopCountSettings(**counts)
    assert lengths == [sampled_loop_count(settings, 5 + 1, step) for step in range(12)] and len(set(lengths)) > 1


@pytest.mark.parametrize("objective", ["last", "mean"])
def test_the_plainer_objectives(tmp_path, objective):
    record = make(tmp_path, objective=objective).step(0.0)
    expected = record["loop_losses"][-1] if objective == "last" else sum(record["loop_losses"]) / 3
    assert record["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_loop_regulariser_joins_the_loss_and_its_gradient_once_a_step(tmp_path):
    torch.manual_seed(0)
    start = small_model()
    settings = {"batch_tokens": 8 * 24, "micro_batch_size": 4}
    plain = make(tmp_path, copy.deepcopy(start), **settings).step(0.0)
    trainer = make(tmp_path, copy.deepcopy(start), loop_regulariser={"block": 1, "weight": 2.0}, **settings)
    term = loop_regulariser(trainer.state.model.model.layers, trainer.settings.loop_regulariser).item()
    record = trainer.step(0.0)
    assert record["regulariser"] == pytest.approx(term) and term > 0.1
    assert record["loss"] == pytest.approx(plain["loss"] + term, rel=1e-6)
    assert record["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_gradients_of_the_states_by_hand(tmp_path):
    trainer = make(tmp_path)
    reference, first = copy.deepcopy(trainer.state.model).train(), batch(trainer.mixture, 0, 4)
    out = reference(first["input_ids"], shift_labels=first["labels"], exit_beta=0.05, output_hidden_states=True)
    expected = torch.autograd.grad(out.loss, out.hidden_states[1:])
    record = trainer.step(0.0)
    assert record["loop_grad_norms"] == pytest.approx([g.norm().item() for g in expected], rel=1e-5)


def test_a_source_that_runs_dry_is_said(tmp_path, capsys):
    windows = (1200 - 1) // 24
    steps = windows // 4 + 2
    make(tmp_path, steps=steps, evaluations=1).run()
    warnings = read_metrics(tmp_path / "metrics.jsonl")["warning"]
    assert [(w["text"], w["step"]) for w in warnings] == [("source text begins epoch 2", windows // 4 + 1)]
    assert "source text begins epoch 2" in capsys.readouterr().err


@pytest.mark.parametrize(("loops", "count"), [(None, 5), (2, 2), (4, 4)])
def test_how_many_loops_are_evaluated(tmp_path, loops, count):
    assert len(make(tmp_path, evaluation_loops=loops).evaluate(1).losses) == count


def test_minutes_bound_the_run_and_drive_the_schedules(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trainer = make(tmp_path, minutes=1.0, evaluations=5, decay_fraction=0.5, final_learning_rate=1e-3, warmup_steps=0)
    real, evaluated = trainer.step, []

    def step(progress):
        now[0] += 6
        return real(progress)

    def slow_evaluation(windows, evaluate=trainer.evaluate):
        evaluated.append(now[0])
        now[0] += 15  # longer than the time between evaluations
        return evaluate(windows)

    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(trainer, "evaluate", slow_evaluation)
    result = trainer.run()
    # due every 12 s: after step 2 (12 s), 3 (33 s, for two at once), 4 (54 s); at 69 s the minute is over
    assert evaluated == [12, 33, 54, 69]
    assert result.steps == 4 and result.minutes == pytest.approx(84 / 60)
    records = steps_of(tmp_path)
    assert [record["minutes"] for record in records] == pytest.approx([0.1, 0.2, 0.55, 0.9])
    # the steps begin at 0, 6, 27 and 48 s: the last at 0.8, six tenths into the decay
    assert [record["learning_rate"] for record in records] == pytest.approx([3e-3, 3e-3, 3e-3, 3e-3 - 0.6 * 2e-3])


def test_no_compiler_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acceleration, "compiler_fault", lambda: "g++ not found")
    result = make(tmp_path, compile="auto", steps=2).run()
    said = capsys.readouterr().err
    assert "layers are not compiled: no working C++ compiler; install g++" in said and "(g++ not found)" in said
    assert result.steps == 2 and not result.compiled


def test_progress_shows_rate_time_left_loss_and_depth(tmp_path, capsys):
    make(tmp_path, steps=12).run()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("stage 1 only ")]
    assert all(word in lines[-1] for word in ("tok/s", "left", "loss ", "depth "))
    assert "stage 1 only, step 6: validation loss by loop  " in captured.err


def write_marker(text):
    def write(folder):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)

    return write


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "a" / "model"
    for text in ("one", "two"):
        save_folder(folder, write_marker(text))
        assert (folder / "weights").read_text() == text
        assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_write_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    save_folder(folder, write_marker("one"))

    def fail(path):
        write_marker("half")(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_folder(folder, fail)
    assert (folder / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_a_killed_save_do_not_matter(tmp_path):
    for name in ("model.tmp", "model.old"):
        write_marker("left")(tmp_path / name)
    save_folder(tmp_path / "model", write_marker("new"))
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_only_whole_copy_survives_until_the_new_one_is_whole(tmp_path):
    write_marker("only")(tmp_path / "model.old")  # killed between the two renames

    def look(folder):
        assert (tmp_path / "model.old" / "weights").read_text() == "only"
        write_marker("new")(folder)

    save_folder(tmp_path / "model", look)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

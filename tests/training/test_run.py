"""A recipe from text to a folder that transformers loads, and nothing written where the input is wrong."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from small_run import read_lines, small_recipe, small_values
from transformers import AutoModelForCausalLM, AutoTokenizer

from looplm.files import plain
from looplm.model.modeling import OuroForCausalLM
from looplm.training import acceleration, tracking
from looplm.training.evaluation import evaluate_loops
from looplm.training.recipe import Recipe, load_recipe
from looplm.training.report import save_report
from looplm.training.run import begin_stage, build_model, recipe_tokenizer, train
from looplm.training.summary import build_report
from looplm.training.tracking import read_metrics
from looplm.training.trainer import TrainingState, build_optimizer

LEFT = {"checkpoints", "data", "model", "metrics.jsonl", "recipe.yaml"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one stage."""
    return train(small_recipe(tmp_path_factory.mktemp("run")))


def folder(recipe) -> Path:
    return Path(recipe.output)


def test_what_a_run_leaves(finished):
    recipe, out = finished.recipe, folder(finished.recipe)
    assert {path.name for path in out.iterdir()} == LEFT
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml"}
    assert expected <= {path.name for path in (out / "model").iterdir()}
    assert load_recipe(out / "recipe.yaml") == load_recipe(out / "model" / "recipe.yaml") == recipe
    assert "stage_result" in read_lines(out / "metrics.jsonl")[-1]
    (result,) = finished.results
    assert (result.steps, result.tokens, finished.state.tokens) == (12, 12 * 4 * 32, 12 * 4 * 32)


def test_the_saved_folder_gives_the_same_loss(finished):
    path, model, data = folder(finished.recipe) / "model", finished.state.model, finished.data
    reloaded, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert type(reloaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    again = evaluate_loops(reloaded, data.windows(finished.stages[0]), 5, 4)
    assert dataclasses.astuple(again) == dataclasses.astuple(finished.results[0].final)
    text = "the citizen — naïve ☃ 123\n"
    assert tokenizer(text)["input_ids"] == data.tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_released_code_can_read_the_configuration(finished):
    config = json.loads((folder(finished.recipe) / "model" / "config.json").read_text())
    assert config["model_type"] == "ouro" and config["total_ut_steps"] == 3
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    assert config["rope_theta"] == 10_000.0 and "auto_map" not in config


def test_the_model_follows_the_recipe(tmp_path):
    shape = {
        "num_key_value_heads": 1,
        "num_prelude_layers": 1,
        "num_coda_layers": 1,
        "exit_gate_pooling": "causal_mean",
    }
    recipe = small_recipe(
        tmp_path,
        model={**shape, "rope_theta": 500.0, "gate_bias": 0.25, "tie_word_embeddings": False},
        defaults={"exit_beta": 0.2, "exit_prior": 0.3},
    )
    tokenizer = recipe_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    config = model.config
    assert {name: getattr(config, name) for name in shape} == shape
    assert (config.vocab_size, config.rope_theta, config.total_ut_steps) == (len(tokenizer), 500.0, 3)
    assert (config.exit_beta, config.exit_prior, config.tie_word_embeddings) == (0.2, 0.3, False)
    assert model.model.early_exit_gate.bias.item() == 0.25
    again = build_model(recipe, tokenizer)
    other = build_model(recipe.model_copy(update={"seed": 4}), tokenizer)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_the_default_gate_starts_near_uniform_over_four_loops(tmp_path):
    recipe = small_recipe(tmp_path, model={"total_ut_steps": 4})
    model = build_model(recipe, recipe_tokenizer(recipe)).eval()
    p = model(torch.tensor([[0, 5, 6, 7]])).exit_probabilities.mean((0, 1))
    assert p.tolist() == pytest.approx([0.25, 0.19, 0.14, 0.42], abs=0.03)  # 0.25 0.75^(t-1), 0.75^3


def test_the_gain_of_the_norms_behind_attention_and_mlp(tmp_path):
    recipe = small_recipe(tmp_path, model={"post_norm_gain": 0.2, "num_prelude_layers": 1})
    model = build_model(recipe, recipe_tokenizer(recipe))
    gains = {name: set(p.tolist()) for name, p in model.named_parameters() if "norm" in name}
    behind = {name for name in gains if name.endswith("layernorm_2.weight")}
    assert len(behind) == 2 * 3  # two of each of three layers
    assert all(list(gain) == pytest.approx([0.2 if name in behind else 1.0]) for name, gain in gains.items())


@pytest.mark.parametrize("loops", [3, 8])
def test_a_begin_token_alone_has_a_finite_gradient(tmp_path, loops):
    # it was the padding token too, whose embedding is zero: through the norms of a zero state gradients overflow
    recipe = small_recipe(tmp_path, model={"total_ut_steps": loops, "hidden_size": 256, "num_prelude_layers": 1})
    model = build_model(recipe, recipe_tokenizer(recipe))
    ids = torch.tensor([[0, 5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert bool(model.model.embed_tokens.weight[0].abs().sum() > 0) and bool(gradient[0].abs().sum() > 0)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) < 1000


def test_the_data_section_counts_by_hand(finished):
    recipe, data = finished.recipe, finished.data
    summary = data.summary()
    texts = {path.read_text() for path in (folder(recipe).parent / "corpus").iterdir()}
    held_out = data.tokenizer.batch_decode(_documents(data.sources["words"].validation))
    held_out = [text.removeprefix("<|endoftext|>") for text in held_out]
    assert set(held_out) < texts and len(texts) == 12
    assert (summary["train_documents"], summary["validation_documents"]) == (12 - len(held_out), len(held_out))
    assert summary["validation_characters"] == sum(map(len, held_out))
    count = sum(1 + len(data.tokenizer(text)["input_ids"]) for text in held_out)
    assert summary["validation_tokens"] == count
    assert summary["sources"] == ["words"]


def _documents(corpus):
    return [corpus.tokens[a:b].tolist() for a, b in itertools.pairwise(corpus.offsets)]


def test_an_existing_tokenizer_is_used(finished, tmp_path):
    tokenizer = {"train_bpe": None, "pretrained": str(folder(finished.recipe) / "model")}
    again = train(small_recipe(tmp_path, tokenizer=tokenizer, stage={"steps": 1}))
    assert again.data.tokenizer.get_vocab() == finished.data.tokenizer.get_vocab()
    assert again.state.model.config.vocab_size == len(finished.data.tokenizer)


def test_training_goes_on_from_a_pretrained_folder(finished, tmp_path):
    place = str(folder(finished.recipe) / "model")
    values = small_values(tmp_path, stage={"steps": 2, "loops": 2}, defaults={"warmup_steps": 0})
    values["model"] = {"pretrained": place}
    del values["tokenizer"]
    run = train(Recipe.validated(values, "r"))
    first, before = read_metrics(folder(run.recipe) / "metrics.jsonl")["step"][0], finished.results[0].final
    assert first["loop_losses"][0] == pytest.approx(before.losses[0], abs=0.2)  # it has learnt: 5.7 at the start
    assert len(first["loop_losses"]) == 2
    config = json.loads((folder(run.recipe) / "model" / "config.json").read_text())
    assert config["total_ut_steps"] == 2 and config["hidden_size"] == 32


def test_the_report_is_complete_plain_and_renders(finished, tmp_path):
    report = build_report("a title", "looplm train x", finished)
    assert json.loads(json.dumps(plain(report))) == report  # nothing but plain values, nothing missing
    loops = report["loops"]
    assert [row["loop"] for row in loops] == [1, 2, 3, 4, 5]
    assert sum(row["exit_probability"] for row in loops[:3]) == pytest.approx(1)
    assert [row["exit_probability"] for row in loops[3:]] == [None, None]
    assert report["model"]["parameters"] == finished.state.model.num_parameters()
    assert Recipe.validated(report["recipe"], "again") == finished.recipe
    assert report["training"]["steps"] == 12 and report["training"]["minutes"] > 0
    assert len(report["history"]) == 12 and len(report["evaluations"]) == 2
    page = save_report(tmp_path, report)
    assert "a title" in page.read_text() and (tmp_path / "report.json").is_file()


STAGES = [
    {"name": "1a", "steps": 6, "exit_beta": 0.1},
    {"name": "1b", "tokens": 700, "loops": 2, "upcycle": {"num_hidden_layers": 4}, "warmup_steps": 1},
    {
        "name": "long",
        "steps": 3,
        "sequence_length": 64,
        "rope_theta": 40_000,
        "learning_rate": 1e-3,
        "betas": [0.8, 0.9],
    },
    {"name": "more", "steps": 2, "sequence_length": 64, "weight_decay": 0.2, "gradient_checkpointing": True},
]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A finished run of four stages."""
    return train(small_recipe(tmp_path_factory.mktemp("staged"), stages=STAGES))


def test_every_stage_boundary_leaves_a_model(staged):
    out = folder(staged.recipe)
    folders = ["stage-1-1a", "stage-2-1b", "stage-3-long", "model"]
    assert {path.name for path in out.iterdir() if (path / "config.json").is_file()} == set(folders)
    shapes = []
    for name in folders:
        model = AutoModelForCausalLM.from_pretrained(out / name)
        config = model.config
        shapes.append((config.num_hidden_layers, config.total_ut_steps, config.rope_theta, config.exit_beta))
        assert load_recipe(out / name / "recipe.yaml") == staged.recipe
        card = (out / name / "README.md").read_text()
        assert "Trained by looplm" in card and "## Loss by loop" in card and "held-out documents" in card
    assert shapes == [(2, 3, 1e4, 0.1), (4, 2, 1e4, 0.05), (4, 2, 4e4, 0.05), (4, 2, 4e4, 0.05)]


def test_the_records_of_all_stages_follow_each_other(staged):
    metrics = read_metrics(folder(staged.recipe) / "metrics.jsonl")
    where = [(record["stage"], record["step"]) for record in metrics["step"]]
    steps = {"1a": 6, "1b": 6, "long": 3, "more": 2}  # 700 tokens are 5.5 batches of 128
    assert where == [(name, step) for name, count in steps.items() for step in range(count)]
    tokens = [record["tokens"] for record in metrics["step"]]
    assert tokens == [128 * (k + 1) for k in range(17)] and staged.state.tokens == 17 * 128
    assert staged.state.source_tokens == {"words": 17 * 128}
    assert [result["name"] for result in metrics["stage_result"]] == list(steps)
    assert [len(record["loop_losses"]) for record in metrics["step"]] == [3] * 6 + [2] * 11


def test_upcycling_duplicates_and_begins_a_new_optimizer(staged):
    before = AutoModelForCausalLM.from_pretrained(folder(staged.recipe) / "stage-1-1a")
    moments = {id(p): state for p, state in staged.state.optimizer.state.items()}
    updates = {float(moments[id(p)]["step"]) for p in staged.state.model.parameters()}
    assert updates == {11.0}  # of the three stages since the upcycling, as the state goes on between them
    state = TrainingState(before, build_optimizer(before, staged.recipe.stages[0]))
    begin_stage(state, staged.stages[1], staged.stages[0])
    for new, old in ((0, 0), (1, 1), (2, 0), (3, 1)):
        weight, origin = (m.model.layers[i].mlp.up_proj.weight for m, i in ((state.model, new), (before, old)))
        assert torch.equal(weight, origin)
    assert not state.optimizer.state and state.step == 0 and state.stage == 2


def test_a_stage_brings_its_settings_to_the_optimizer(staged):
    groups = staged.state.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.95)}  # those of `more`, not of `long`
    assert staged.state.model.model.gradient_checkpointing


def test_a_stage_of_the_same_view_goes_on_in_its_samples(staged):
    assert [stage.view for stage in staged.stages] == [0, 0, 1, 1]
    assert staged.state.first_sample == 3 * 2  # `more` begins where `long` stopped
    state = TrainingState(staged.state.model, staged.state.optimizer, stage=1, step=6)
    begin_stage(state, dataclasses.replace(staged.stages[1], settings=staged.stages[0].settings), staged.stages[0])
    assert state.first_sample == 6 * 4
    state.step = 6
    begin_stage(state, staged.stages[2], staged.stages[1])
    assert state.first_sample == 0


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_losses(finished, tmp_path):
    run = train(small_recipe(tmp_path, defaults={"gradient_checkpointing": True}))
    assert run.state.model.model.gradient_checkpointing
    assert run.results[0].final.losses == pytest.approx(finished.results[0].final.losses, rel=1e-6)


def test_a_run_with_prelude_coda_and_a_pooled_gate(tmp_path):
    fields = {"num_prelude_layers": 1, "num_coda_layers": 1, "exit_gate_pooling": "causal_mean"}
    recipe = small_recipe(tmp_path, model=fields, defaults={"separate_documents": True}, stage={"steps": 21})
    train(recipe)
    records = read_metrics(folder(recipe) / "metrics.jsonl")["step"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    reloaded = AutoModelForCausalLM.from_pretrained(folder(recipe) / "model")
    assert reloaded.generate(torch.tensor([[0, 40, 41]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


WRONG = [
    ({"data": {"sources": {"x": {"location": "nowhere.txt"}}}}, "no such file or folder: nowhere.txt"),
    ({"defaults": {"sequence_length": 65}}, "sequence_length is 65, beyond max_position_embeddings = 64"),
    ({"model": {"num_key_value_heads": 3}}, "num_key_value_heads is 3"),
    ({"tokenizer": {"train_bpe": None, "pretrained": "./no/such/tokenizer"}}, "no tokenizer at ./no/such/tokenizer"),
    ({"defaults": {"compile": "on"}}, "compile is 'on', but no compiler works here"),
    ({"model": {"vocab_size": 299}}, "model.vocab_size is 299, fewer than the tokenizer's 300 entries"),
    ({"tracking": ["tensorboard"]}, "pip install 'looplm\\[track\\]'"),
]


@pytest.mark.parametrize(("sections", "message"), WRONG)
def test_nothing_is_written_where_the_input_is_wrong(tmp_path, monkeypatch, sections, message):
    monkeypatch.setattr(acceleration, "compiler_fault", lambda: "g++ not found")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    recipe = small_recipe(tmp_path, **sections)
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_too_little_text_leaves_the_prepared_data_only(tmp_path):
    recipe = small_recipe(
        tmp_path, defaults={"sequence_length": 6000, "batch_tokens": 6000}, model={"max_position_embeddings": 6000}
    )
    with pytest.raises(ValueError, match=r"source words: corpus has .* fewer than one sequence of 6001"):
        train(recipe)
    assert [path.name for path in folder(recipe).iterdir()] == ["data"]


def test_a_failing_save_leaves_the_last_model(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path, defaults={"evaluations": 3})
    real, saves = OuroForCausalLM.save_pretrained, []

    def save_pretrained(self, path, **options):
        saves.append(path)
        real(self, path, **options)
        if len(saves) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(OuroForCausalLM, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="disk full"):
        train(recipe)
    assert {path.name for path in folder(recipe).iterdir()} == LEFT
    AutoModelForCausalLM.from_pretrained(folder(recipe) / "model")

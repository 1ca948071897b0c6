"""A recipe from text to a folder that transformers loads, and nothing written where the input is wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from small_run import read_lines, small_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from looplm.data.pipeline import Windows
from looplm.files import plain
from looplm.model.modeling import OuroForCausalLM
from looplm.training import acceleration
from looplm.training.evaluation import evaluate_loops
from looplm.training.recipe import load_recipe
from looplm.training.report import save_report
from looplm.training.run import build_model, build_report, prepare_data, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: recipe, model, data, result."""
    recipe = small_recipe(tmp_path_factory.mktemp("run"))
    return recipe, *train(recipe)


def folder(recipe) -> Path:
    return Path(recipe.output)


def test_what_a_run_leaves(finished):
    recipe, _, _, result = finished
    out = folder(recipe)
    assert {path.name for path in out.iterdir()} == {"model", "metrics.jsonl", "recipe.yaml"}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml"}
    assert expected <= {path.name for path in (out / "model").iterdir()}
    assert load_recipe(out / "recipe.yaml") == load_recipe(out / "model" / "recipe.yaml") == recipe
    assert "evaluation" in read_lines(out / "metrics.jsonl")[-1]
    assert result.steps == 12 and result.tokens == 12 * 4 * 32


def test_the_saved_folder_gives_the_same_loss(finished):
    recipe, model, data, result = finished
    path = folder(recipe) / "model"
    reloaded, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert type(reloaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    windows = Windows(data.validation, 32, keep_remainder=True)
    again = evaluate_loops(reloaded, windows, 5, 4, data.validation.characters)
    assert dataclasses.astuple(again) == dataclasses.astuple(result.final)
    text = "the citizen — naïve ☃ 123\n"
    assert tokenizer(text)["input_ids"] == data.tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_released_code_can_read_the_configuration(finished):
    config = json.loads((folder(finished[0]) / "model" / "config.json").read_text())
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
        training={"exit_beta": 0.2, "exit_prior": 0.3},
    )
    tokenizer = prepare_data(recipe).tokenizer
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
    model = build_model(recipe, prepare_data(recipe).tokenizer).eval()
    p = model(torch.tensor([[0, 5, 6, 7]])).exit_probabilities.mean((0, 1))
    assert p.tolist() == pytest.approx([0.25, 0.19, 0.14, 0.42], abs=0.03)  # 0.25 0.75^(t-1), 0.75^3


def test_the_gain_of_the_norms_behind_attention_and_mlp(tmp_path):
    recipe = small_recipe(tmp_path, model={"post_norm_gain": 0.2, "num_prelude_layers": 1})
    model = build_model(recipe, prepare_data(recipe).tokenizer)
    gains = {name: set(p.tolist()) for name, p in model.named_parameters() if "norm" in name}
    behind = {name for name in gains if name.endswith("layernorm_2.weight")}
    assert len(behind) == 2 * 3  # two of each of three layers
    assert all(list(gain) == pytest.approx([0.2 if name in behind else 1.0]) for name, gain in gains.items())


@pytest.mark.parametrize("loops", [3, 8])
def test_a_begin_token_alone_has_a_finite_gradient(tmp_path, loops):
    # it was the padding token too, whose embedding is zero: through the norms of a zero state gradients overflow
    recipe = small_recipe(tmp_path, model={"total_ut_steps": loops, "hidden_size": 256, "num_prelude_layers": 1})
    model = build_model(recipe, prepare_data(recipe).tokenizer)
    ids = torch.tensor([[0, 5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert bool(model.model.embed_tokens.weight[0].abs().sum() > 0) and bool(gradient[0].abs().sum() > 0)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) < 1000


def test_the_data_section_counts_by_hand(finished):
    recipe, _, data, _ = finished
    summary = data.summary(recipe.data.sources)
    assert (summary["train_documents"], summary["validation_documents"]) == (10, 2)  # every 6th of 12
    texts = [path.read_text() for path in sorted((folder(recipe).parent / "corpus").iterdir())]
    held_out = [texts[5], texts[11]]
    assert summary["validation_characters"] == sum(map(len, held_out))
    count = sum(1 + len(data.tokenizer(text)["input_ids"]) for text in held_out)
    assert summary["validation_tokens"] == count
    assert summary["sources"] == recipe.data.sources


def test_an_existing_tokenizer_is_used(finished, tmp_path):
    first, _, data, _ = finished
    recipe = small_recipe(
        tmp_path, tokenizer={"train_bpe": None, "pretrained": str(folder(first) / "model")}, training={"steps": 1}
    )
    model, again, _ = train(recipe)
    assert again.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert model.config.vocab_size == len(data.tokenizer)


def test_the_report_is_complete_plain_and_renders(finished, tmp_path):
    recipe, model, data, result = finished
    report = build_report("a title", "looplm train x", recipe, model, data, result)
    assert json.loads(json.dumps(plain(report))) == report  # nothing but plain values, nothing missing
    loops = report["loops"]
    assert [row["loop"] for row in loops] == [1, 2, 3, 4, 5]
    assert sum(row["exit_probability"] for row in loops[:3]) == pytest.approx(1)
    assert [row["exit_probability"] for row in loops[3:]] == [None, None]
    assert report["model"]["parameters"] == model.num_parameters()
    assert report["recipe"] == yaml.safe_load(recipe.to_yaml())
    assert report["training"]["steps"] == 12 and report["training"]["minutes"] > 0
    page = save_report(tmp_path, report)
    assert "a title" in page.read_text() and (tmp_path / "report.json").is_file()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_losses(finished, tmp_path):
    recipe = small_recipe(tmp_path, training={"gradient_checkpointing": True})
    model, _, result = train(recipe)
    assert model.model.gradient_checkpointing
    assert result.final.losses == pytest.approx(finished[3].final.losses, rel=1e-6)


def test_a_run_with_prelude_coda_and_a_pooled_gate(tmp_path):
    fields = {"num_prelude_layers": 1, "num_coda_layers": 1, "exit_gate_pooling": "causal_mean"}
    recipe = small_recipe(tmp_path, model=fields, data={"separate_documents": True}, training={"steps": 21})
    _, _, result = train(recipe)
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.5
    reloaded = AutoModelForCausalLM.from_pretrained(folder(recipe) / "model")
    assert reloaded.generate(torch.tensor([[0, 40, 41]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


WRONG = [
    ({"data": {"sources": ["nowhere.txt"]}}, "no such file or folder: nowhere.txt"),
    ({"data": {"sequence_length": 60_000}, "model": {"max_position_embeddings": 60_000}}, "fewer than one sequence"),
    ({"data": {"sequence_length": 65}}, "data.sequence_length is 65, beyond model.max_position_embeddings = 64"),
    ({"model": {"num_key_value_heads": 3}}, "num_key_value_heads is 3"),
    ({"tokenizer": {"train_bpe": None, "pretrained": "./no/such/tokenizer"}}, "no tokenizer at ./no/such/tokenizer"),
    ({"training": {"compile": "on"}}, "compile is 'on', but no compiler works here"),
]


@pytest.mark.parametrize(("sections", "message"), WRONG)
def test_nothing_is_written_where_the_input_is_wrong(tmp_path, monkeypatch, sections, message):
    monkeypatch.setattr(acceleration, "compiler_fault", lambda: "g++ not found")
    recipe = small_recipe(tmp_path, **sections)
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_failing_save_leaves_the_last_model(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path, training={"evaluations": 3})
    real, saves = OuroForCausalLM.save_pretrained, []

    def save_pretrained(self, path, **options):
        saves.append(path)
        real(self, path, **options)
        if len(saves) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(OuroForCausalLM, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="disk full"):
        train(recipe)
    assert {path.name for path in folder(recipe).iterdir()} == {"model", "metrics.jsonl", "recipe.yaml"}
    AutoModelForCausalLM.from_pretrained(folder(recipe) / "model")

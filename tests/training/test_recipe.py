"""Recipes: strict about keys and values, one line an error, and a resolved recipe that reads back as itself."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_run import small_recipe

from looplm.training.recipe import ModelSettings, Recipe, load_recipe

MINIMAL = {
    "output": "out",
    "data": {"sources": ["sotu"]},
    "tokenizer": {"train_bpe": 300},
    "training": {"steps": 10},
}


def changed(**sections):
    return {
        name: {**MINIMAL.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in {**MINIMAL, **sections}.items()
    }


def fault(values) -> str:
    with pytest.raises(ValueError, match=r"^r\.yaml: ") as caught:
        Recipe.validated(values, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("r.yaml: ")


def test_a_minimal_recipe_takes_the_papers_defaults():
    recipe = Recipe.validated(MINIMAL, "r.yaml")
    training = recipe.training
    assert (training.betas, training.weight_decay, training.clip, training.exit_beta) == ((0.9, 0.95), 0.1, 1.0, 0.05)
    assert (training.steps, training.minutes) == (10, None)
    assert recipe.model == ModelSettings() and recipe.model.total_ut_steps == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(modle={}), "unknown key 'modle'; did you mean 'model'?"),
        (changed(training={"learning_rte": 1}), "unknown key 'training.learning_rte'; did you mean 'learning_rate'?"),
        (changed(model={"total_ut_step": 3}), "unknown key 'model.total_ut_step'; did you mean 'total_ut_steps'?"),
        (changed(data={"source": ["x"]}), "unknown key 'data.source'; did you mean 'sources'?"),
        (
            changed(tokenizer={"zzz": 1}),
            "unknown key 'tokenizer.zzz'; known keys: train_bpe, pretrained",
        ),
        (
            {**MINIMAL, "qqq": 1},
            "unknown key 'qqq'; known keys: output, seed, data, tokenizer, model, training",
        ),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known_one(values, message):
    assert fault(values) == message


def test_a_mistyped_required_key_is_called_mistyped_not_missing():
    values = changed(data={"sources_": ["sotu"]})
    del values["data"]["sources"]
    assert fault(values) == "unknown key 'data.sources_'; did you mean 'sources'?"


@pytest.mark.parametrize("key", ["output", "data", "tokenizer", "training"])
def test_missing_sections(key):
    assert fault({name: value for name, value in MINIMAL.items() if name != key}) == f"{key} is missing"


def test_missing_key_of_a_section():
    assert fault({**MINIMAL, "data": {}}) == "data.sources is missing"


@pytest.mark.parametrize("bounds", [{"steps": None}, {"minutes": 1}])
def test_both_or_neither_of_steps_and_minutes(bounds):
    message = fault(changed(training=bounds))
    assert message.startswith("training is {") and message.endswith("give exactly one of steps and minutes")


@pytest.mark.parametrize("tokenizer", [{"train_bpe": None}, {"pretrained": "x"}])
def test_both_or_neither_tokenizer(tokenizer):
    message = fault(changed(tokenizer=tokenizer))
    assert message.startswith("tokenizer is {") and message.endswith("give exactly one of train_bpe and pretrained")


OUT_OF_RANGE = [
    ("training", "steps", 0, "greater than 0"),
    ("training", "steps", 1.5, "valid integer"),
    ("training", "learning_rate", 0, "greater than 0"),
    ("training", "learning_rate", math.inf, "finite"),
    ("training", "learning_rate", "fast", "valid number"),
    ("training", "batch_size", -1, "greater than 0"),
    ("training", "accumulation", 0, "greater than 0"),
    ("training", "warmup_steps", -1, "greater than or equal to 0"),
    ("training", "decay_fraction", 1.5, "less than or equal to 1"),
    ("training", "final_learning_rate", -0.1, "greater than or equal to 0"),
    ("training", "final_learning_rate", math.nan, "less than or equal to 1"),
    ("training", "weight_decay", -1, "greater than or equal to 0"),
    ("training", "weight_decay", math.inf, "finite"),
    ("training", "clip", 0, "greater than 0"),
    ("training", "exit_beta", -1, "greater than or equal to 0"),
    ("training", "exit_beta", math.inf, "finite"),
    ("training", "exit_beta_start", math.inf, "finite"),
    ("training", "exit_beta_hold", 2, "less than or equal to 1"),
    ("training", "exit_prior", 2.0, "'uniform', or Input should be less than 1"),
    ("training", "exit_prior", "unifrom", "'uniform', or Input should be a valid number"),
    ("training", "autocast", "fp8", "'auto', 'bfloat16' or 'none'"),
    ("training", "compile", "maybe", "'auto', 'on' or 'off'"),
    ("training", "evaluations", 0, "greater than 0"),
    ("training", "evaluation_loops", 0, "greater than 0"),
    ("data", "sources", [], "at least 1 item"),
    ("data", "sources", "sotu", "valid list"),
    ("data", "validation_every", 1, "greater than or equal to 2"),
    ("data", "sequence_length", 0, "greater than 0"),
    ("tokenizer", "train_bpe", 258, "greater than or equal to 259"),
    ("model", "total_ut_steps", 0, "greater than 0"),
    ("model", "num_prelude_layers", -1, "greater than or equal to 0"),
    ("model", "input_injection", "concat", "'none' or 'add'"),
    ("model", "exit_gate_pooling", "mean", "'token' or 'causal_mean'"),
    ("model", "rope_theta", 0, "greater than 0"),
    ("model", "gate_bias", math.nan, "finite"),
    ("model", "initializer_range", 0, "greater than 0"),
    ("model", "post_norm_gain", 0, "greater than 0"),
]


@pytest.mark.parametrize(("section", "key", "value", "accepted"), OUT_OF_RANGE)
def test_values_out_of_range_name_key_value_and_what_is_accepted(section, key, value, accepted):
    message = fault(changed(**{section: {key: value}}))
    assert message.startswith(f"{section}.{key} is {value!r}: ") and accepted in message


def test_optimizer_betas_must_be_below_one():
    # 1.0 would be refused by AdamW, but only after the output folder was made
    assert fault(changed(training={"betas": [0.9, 1.0]})).startswith("training.betas.1 is 1.0: ")


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("seed", 2**32), ("output", ""), ("output", 3)])
def test_top_level_values_out_of_range(key, value):
    assert fault({**MINIMAL, key: value}).startswith(f"{key} is {value!r}: ")


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_a_recipe_is_a_mapping(values):
    assert fault(values) == "a mapping is needed, with the keys output, seed, data, tokenizer, model, training"


@pytest.mark.parametrize("section", [None, [1], "x"])
def test_a_section_is_a_mapping(section):
    assert fault({**MINIMAL, "model": section}).startswith(f"model is {section!r}: ")


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ValueError, match="no such recipe: ") as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "a:\n\t- b", "a: b: c", "\x00", "--- 1\n--- 2\n"])
def test_a_file_that_is_not_yaml(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="not valid YAML") as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"output: \xff\xfe")
    with pytest.raises(ValueError, match=r"r\.yaml: not valid YAML"):
        load_recipe(path)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = small_recipe(tmp_path, training={"exit_prior": 0.3, "betas": [0.8, 0.9], "exit_beta_start": 1.0})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(path).to_yaml() == recipe.to_yaml()
    assert yaml.safe_load(recipe.to_yaml())["training"]["decay_fraction"] == 0.3  # defaults are filled in


@given(
    st.builds(
        dict,
        steps=st.integers(1, 10**9),
        learning_rate=st.floats(1e-12, 10, exclude_min=True),
        betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)).map(list),
        exit_beta=st.floats(0, 100),
        exit_prior=st.just("uniform") | st.floats(0, 1, exclude_min=True, exclude_max=True),
        warmup_steps=st.integers(0, 10**6),
    )
)
def test_any_recipe_survives_the_file_format(training):
    recipe = Recipe.validated(changed(training=training), "r.yaml")
    assert Recipe.validated(yaml.safe_load(recipe.to_yaml()), "again") == recipe


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "r.yaml"  # YAML 1.1 reads 3e-4 as text
    path.write_text(yaml.safe_dump(changed()).replace("steps: 10", "steps: 10\n  learning_rate: 3e-4"))
    assert load_recipe(path).training.learning_rate == 3e-4


def test_with_training_replaces_only_what_is_named(tmp_path):
    recipe = small_recipe(tmp_path)
    longer = recipe.with_training(steps=99)
    assert longer.training == recipe.training.model_copy(update={"steps": 99})
    assert longer.data == recipe.data and recipe.training.steps == 12

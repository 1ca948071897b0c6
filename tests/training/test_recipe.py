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
    "data": {"sources": {"text": {"location": "sotu"}}},
    "tokenizer": {"train_bpe": 300},
    "stages": [{"name": "one", "steps": 10}],
}
KEYS = "output, seed, data, tokenizer, model, tracking, checkpoints, defaults, stages"


def changed(**sections):
    return {
        name: {**MINIMAL.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in {**MINIMAL, **sections}.items()
    }


def stage(**changes):
    """The minimal recipe with its stage changed."""
    return {**MINIMAL, "stages": [{**MINIMAL["stages"][0], **changes}]}


def fault(values) -> str:
    with pytest.raises(ValueError, match=r"^r\.yaml: ") as caught:
        Recipe.validated(values, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("r.yaml: ")


def test_a_minimal_recipe_takes_the_papers_defaults():
    recipe = Recipe.validated(MINIMAL, "r.yaml")
    (stage,) = recipe.stages
    assert (stage.betas, stage.weight_decay, stage.clip, stage.exit_beta) == ((0.9, 0.95), 0.1, 1.0, 0.05)
    assert (stage.steps, stage.tokens, stage.minutes, stage.gate, stage.objective) == (10, None, None, None, "expected")
    assert recipe.model == ModelSettings() and recipe.model.total_ut_steps == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(modle={}), "unknown key 'modle'; did you mean 'model'?"),
        (changed(defaults={"learning_rte": 1}), "unknown key 'defaults.learning_rte'; did you mean 'learning_rate'?"),
        (stage(learning_rte=1), "unknown key 'stages.0.learning_rte'; did you mean 'learning_rate'?"),
        (
            stage(upcycle={"layers": 4}),
            "unknown key 'stages.0.upcycle.layers'; known keys: num_hidden_layers, arrangement",
        ),
        (stage(gate={"targt": "lookahead"}), "unknown key 'stages.0.gate.targt'; did you mean 'target'?"),
        (
            changed(data={"sources": {"text": {"locaton": "sotu"}}}),
            "unknown key 'data.sources.text.locaton'; did you mean 'location'?",
        ),
        (changed(model={"total_ut_step": 3}), "unknown key 'model.total_ut_step'; did you mean 'total_ut_steps'?"),
        (changed(data={"source": {}}), "unknown key 'data.source'; did you mean 'sources'?"),
        (
            changed(tokenizer={"zzz": 1}),
            "unknown key 'tokenizer.zzz'; known keys: train_bpe, pretrained",
        ),
        (
            {**MINIMAL, "qqq": 1},
            "unknown key 'qqq'; known keys: " + KEYS,
        ),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known_one(values, message):
    assert fault(values) == message


def test_a_mistyped_required_key_is_called_mistyped_not_missing():
    values = changed(data={"sources_": {"text": {"location": "sotu"}}})
    del values["data"]["sources"]
    assert fault(values) == "unknown key 'data.sources_'; did you mean 'sources'?"


@pytest.mark.parametrize("key", ["output", "data", "stages"])
def test_missing_sections(key):
    assert fault({name: value for name, value in MINIMAL.items() if name != key}) == f"{key} is missing"


def test_missing_key_of_a_section():
    assert fault({**MINIMAL, "data": {}}) == "data.sources is missing"


def test_a_tokenizer_is_needed_unless_the_model_brings_one():
    values = {name: value for name, value in MINIMAL.items() if name != "tokenizer"}
    assert fault(values) == "tokenizer is missing"
    assert Recipe.validated({**values, "model": {"pretrained": "some/model"}}, "r").tokenizer is None


BUDGET = "give exactly one of tokens, steps and minutes"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": None}, BUDGET),
        ({"minutes": 1}, BUDGET),
        ({"tokens": 4096}, BUDGET),
        ({"gate": {}}, "a stage that fits the gate has its budget in `gate`; drop tokens, steps, minutes, upcycle"),
        ({"batch_tokens_start": 2048}, "batch_tokens_start and batch_ramp_steps go together"),
        ({"batch_ramp_steps": 3}, "batch_tokens_start and batch_ramp_steps go together"),
        ({"final_learning_rate": 4e-4}, "final_learning_rate is above learning_rate = 0.0003"),
    ],
)
def test_a_stage_that_contradicts_itself(changes, reason):
    message = fault(stage(**changes))
    assert message.startswith("stages.0 is {") and message.endswith(reason)


def test_a_pretrained_model_brings_its_own_shape():
    message = fault(changed(model={"pretrained": "x", "hidden_size": 64, "num_hidden_layers": 2}))
    assert message.endswith("pretrained brings its own shape; drop hidden_size, num_hidden_layers")


def test_stages_need_names_of_their_own():
    stages = [{"name": "one", "steps": 1}, {"name": "one", "steps": 2}]
    assert "two stages are called 'one'" in fault({**MINIMAL, "stages": stages})


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x"])
def test_a_stage_name_that_cannot_be_a_folder(name):
    assert fault(stage(name=name)).startswith(f"stages.0.name is {name!r}: ")


def test_budgets_are_a_stages_own():
    assert fault(changed(defaults={"steps": 3})).startswith("unknown key 'defaults.steps'; known keys: loops, ")


def test_stages_override_the_defaults_whole():
    defaults = {"sequence_length": 64, "mixture": {"a": 1, "b": 2}, "exit_beta": 0.1}
    stages = [{"name": "1", "steps": 1}, {"name": "2", "steps": 1, "mixture": {"b": 1}, "exit_beta": 0.05}]
    recipe = Recipe.validated({**MINIMAL, "defaults": defaults, "stages": stages}, "r")
    assert [s.mixture for s in recipe.stages] == [{"a": 1, "b": 2}, {"b": 1}]
    assert [(s.sequence_length, s.exit_beta) for s in recipe.stages] == [(64, 0.1), (64, 0.05)]


def test_a_fault_of_the_defaults_is_told_there():
    assert fault(changed(defaults={"learning_rate": -1})).startswith("defaults.learning_rate is -1: ")


@pytest.mark.parametrize("tokenizer", [{"train_bpe": None}, {"pretrained": "x"}])
def test_both_or_neither_tokenizer(tokenizer):
    message = fault(changed(tokenizer=tokenizer))
    assert message.startswith("tokenizer is {") and message.endswith("give exactly one of train_bpe and pretrained")


OUT_OF_RANGE = [
    ("defaults", "learning_rate", 0, "greater than 0"),
    ("defaults", "learning_rate", math.inf, "finite"),
    ("defaults", "learning_rate", "fast", "valid number"),
    ("defaults", "micro_batch_size", -1, "greater than 0"),
    ("defaults", "batch_tokens", 0, "greater than 0"),
    ("defaults", "warmup_steps", -1, "greater than or equal to 0"),
    ("defaults", "decay_fraction", 1.5, "less than or equal to 1"),
    ("defaults", "final_learning_rate", -0.1, "greater than 0"),
    ("defaults", "final_learning_rate", math.nan, "finite"),
    ("defaults", "weight_decay", -1, "greater than or equal to 0"),
    ("defaults", "weight_decay", math.inf, "finite"),
    ("defaults", "clip", 0, "greater than 0"),
    ("defaults", "exit_beta", -1, "greater than or equal to 0"),
    ("defaults", "exit_beta", math.inf, "finite"),
    ("defaults", "exit_beta_start", math.inf, "finite"),
    ("defaults", "exit_beta_hold", 2, "less than or equal to 1"),
    ("defaults", "exit_prior", 2.0, "'uniform', or Input should be less than 1"),
    ("defaults", "exit_prior", "unifrom", "'uniform', or Input should be a valid number"),
    ("defaults", "autocast", "fp8", "'auto', 'bfloat16' or 'none'"),
    ("defaults", "compile", "maybe", "'auto', 'on' or 'off'"),
    ("defaults", "evaluations", 0, "greater than 0"),
    ("defaults", "objective", "first", "'expected', 'last' or 'mean'"),
    ("defaults", "decay", "steps", "'linear' or 'cosine'"),
    ("defaults", "decay_fraction", 0, "greater than 0"),
    ("defaults", "mixture", {"text": 0}, "greater than 0"),
    ("defaults", "loops", 0, "greater than 0"),
    ("defaults", "evaluation_loops", 0, "greater than 0"),
    ("data", "sources", {}, "at least 1 item"),
    ("data", "sources", "sotu", "valid dictionary"),
    ("data", "validation_every", 1, "greater than or equal to 2"),
    ("defaults", "sequence_length", 0, "greater than 0"),
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
    assert message.startswith(f"{section}.{key}") and accepted in message
    assert message.startswith(f"{section}.{key} is {value!r}: ") or isinstance(value, dict)


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("steps", 1.5), ("tokens", -1), ("minutes", 0)])
def test_budgets_out_of_range(key, value):
    message = fault(stage(steps=None, **{key: value}) if key != "steps" else stage(steps=value))
    assert message.startswith(f"stages.0.{key} is {value!r}: ")


def test_optimizer_betas_must_be_below_one():
    # 1.0 would be refused by AdamW, but only after the output folder was made
    assert fault(changed(defaults={"betas": [0.9, 1.0]})).startswith("defaults.betas.1 is 1.0: ")


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("seed", 2**32), ("output", ""), ("output", 3)])
def test_top_level_values_out_of_range(key, value):
    assert fault({**MINIMAL, key: value}).startswith(f"{key} is {value!r}: ")


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_a_recipe_is_a_mapping(values):
    assert fault(values) == "a mapping is needed, with the keys " + KEYS


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
    stages = [
        {"name": "1a", "tokens": 4096, "mixture": {"words": 1.0}, "exit_prior": 0.3, "betas": [0.8, 0.9]},
        {"name": "1b", "steps": 3, "loops": 2, "upcycle": {"num_hidden_layers": 4}, "autocast": "auto"},
        {"name": "gate", "gate": {"epochs": 2}},
    ]
    recipe = small_recipe(tmp_path, stages=stages, defaults={"loop_counts": {"distribution": "uniform", "most": 3}})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(path).to_yaml() == recipe.to_yaml()
    values = yaml.safe_load(recipe.to_yaml())
    assert values["defaults"]["exit_beta_hold"] == 0.6  # defaults are filled in
    assert values["stages"][1] == {  # what differs from them, and no more: `auto` is the field's default, not theirs
        "autocast": "auto",
        "name": "1b",
        "steps": 3,
        "loops": 2,
        "upcycle": {"num_hidden_layers": 4, "arrangement": "ABAB"},
    }


def test_a_recipe_over_a_pretrained_model_reads_back_as_itself():
    recipe = Recipe.validated({**MINIMAL, "model": {"pretrained": "some/model"}}, "r")
    values = yaml.safe_load(recipe.to_yaml())
    assert values["model"] == {"pretrained": "some/model"}
    assert Recipe.validated(values, "again") == recipe


@given(
    st.builds(
        dict,
        learning_rate=st.floats(1e-12, 10, exclude_min=True),
        betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)).map(list),
        exit_beta=st.floats(0, 100),
        exit_prior=st.just("uniform") | st.floats(0, 1, exclude_min=True, exclude_max=True),
        warmup_steps=st.integers(0, 10**6),
    )
)
def test_any_recipe_survives_the_file_format(defaults):
    recipe = Recipe.validated(changed(defaults=defaults), "r.yaml")
    assert Recipe.validated(yaml.safe_load(recipe.to_yaml()), "again") == recipe


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "r.yaml"  # YAML 1.1 reads 3e-4 as text
    path.write_text(yaml.safe_dump(changed()).replace("steps: 10", "steps: 10\n  learning_rate: 3e-4"))
    assert load_recipe(path).stages[0].learning_rate == 3e-4


def test_with_stages_replaces_only_what_is_named(tmp_path):
    recipe = small_recipe(tmp_path)
    longer = recipe.with_stages(steps=99)
    assert longer.stages == [recipe.stages[0].model_copy(update={"steps": 99})]
    assert longer.data == recipe.data and recipe.stages[0].steps == 12

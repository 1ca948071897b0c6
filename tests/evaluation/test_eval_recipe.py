"""Recipes: what they cover, how they are read back, and what two of them differ in."""

import json
from dataclasses import replace

import pytest
from eval_models import save_pair
from hypothesis import given
from hypothesis import strategies as st

from looplm.evaluation.recipe import (
    Recipe,
    differences,
    digest,
    fingerprint_model,
    prompts_digest,
    versions,
)

RECIPE = Recipe("m", "f" * 64, "float32", 4, task="gsm8k", num_fewshot=5, generation={"until": ("\n",), "t": 0.0})


def test_it_is_read_back_from_json():
    again = Recipe.from_dict(json.loads(json.dumps(RECIPE.as_dict())))
    assert differences(again, RECIPE) == [] and again.key == RECIPE.key


@pytest.mark.parametrize(
    ("values", "said"),
    [({"model": "m"}, "recipe has no 'fingerprint'"), ({**RECIPE.as_dict(), "mood": 1}, "unknown field 'mood'")],
)
def test_what_is_no_recipe(values, said):
    with pytest.raises(ValueError, match=said):
        Recipe.from_dict(values)


def test_the_differences_by_kind_the_measure_first():
    other = replace(
        RECIPE, loops=8, num_fewshot=0, seed=3, chat_template="a" * 64, generation={"until": ("\n",), "t": 1.0}
    )
    found = [(difference.field, difference.kind) for difference in differences(RECIPE, other)]
    assert found[:3] == [("num_fewshot", "measure"), ("generation.t", "measure"), ("chat_template", "measure")] or {
        name for name, kind in found if kind == "measure"
    } == {"num_fewshot", "chat_template", "generation.t"}
    assert found[3:] == [("loops", "subject"), ("seed", "circumstances")]
    shown = {difference.field: str(difference) for difference in differences(RECIPE, other)}
    assert shown["chat_template"] == "chat_template: none against aaaaaaaaaaaa"
    assert shown["loops"] == "loops: 4 against 8"


def test_the_key_leaves_out_how_it_was_called():
    assert replace(RECIPE, command="x", model="other").key == RECIPE.key != replace(RECIPE, loops=3).key


def test_a_fingerprint_follows_weights_configuration_and_tokenizer_alone(tmp_path):
    folder = save_pair(tmp_path / "model")
    first = fingerprint_model(str(folder))
    (folder / "README.md").write_text("something else")
    moved = folder.rename(tmp_path / "elsewhere")
    assert fingerprint_model(str(moved)) == first
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = moved / name
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + b" ")
        assert fingerprint_model(str(moved)) != first
        path.write_bytes(kept)
    assert fingerprint_model(str(moved)) == first


def test_models_without_a_fingerprint(tmp_path):
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        fingerprint_model(str(tmp_path))
    with pytest.raises(ValueError, match="no hub model that has been downloaded"):
        fingerprint_model("nobody/nothing")


@given(
    st.dictionaries(st.text('aé\n"{', max_size=6), st.integers() | st.text("b:ß", max_size=6), max_size=4), st.randoms()
)
def test_a_digest_does_not_depend_on_the_order_of_keys(values, draw):
    keys = list(values)
    draw.shuffle(keys)
    assert digest({key: values[key] for key in keys}) == digest(values)


def test_prompts_depend_on_order_and_bounds():
    assert prompts_digest(["a", "b"]) != prompts_digest(["b", "a"]) != prompts_digest(["ba"])


def test_versions_name_what_is_installed():
    assert {"looplm", "torch", "transformers"} <= set(versions())

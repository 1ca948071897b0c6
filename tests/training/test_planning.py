"""Plans: stages resolved and counted by hand, stages that cannot follow each other, and the shipped recipes."""

import io
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_run import small_model, small_values
from torch.utils.flop_counter import FlopCounterMode

import looplm
from looplm.model.configuration import OuroConfig
from looplm.training import planning
from looplm.training.planning import count_parameters, forward_flops, plan, plan_recipe, plan_table
from looplm.training.recipe import Recipe, Stage, load_recipe
from looplm.training.schedule import BatchPlan

TUNING = {"ouro-sft", "sft-cpu", "sums-sft-cpu", "grpo-cpu"}  # see tests/tuning
RECIPES = sorted(p for p in (Path(looplm.__file__).parent / "recipes").glob("*.yaml") if p.stem not in TUNING)


def recipe(stages, **sections) -> Recipe:
    values = {
        "output": "unused",
        "data": {"sources": {"a": {"location": "a.txt"}, "b": {"location": "b.txt"}}},
        "tokenizer": {"train_bpe": 300},
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": 64},
        "defaults": {"sequence_length": 32, "batch_tokens": 128},
        "stages": [{"name": str(number), "steps": 10, **stage} for number, stage in enumerate(stages, start=1)],
    }
    return Recipe.validated({**values, **sections}, "r")


def test_what_a_stage_leaves_open_stays_as_it_was():
    stages = plan_recipe(
        recipe(
            [
                {},
                {"loops": 2, "rope_theta": 4e4, "upcycle": {"num_hidden_layers": 6}},
                {"sequence_length": 64},
                {"sequence_length": 64, "mixture": {"b": 1}},
                {"loops": 2, "mixture": {"b": 1}, "sequence_length": 64},
            ]
        )
    )
    assert [(s.layers, s.loops, s.rope_theta) for s in stages] == [(2, 4, 1e4)] + [(6, 2, 4e4)] * 4
    assert [s.view for s in stages] == [0, 0, 1, 2, 2]
    assert [s.folder for s in stages[:2]] == ["stage-1-1", "stage-2-2"]


def test_steps_and_tokens_by_hand():
    growing = {"batch_tokens_start": 64, "batch_ramp_steps": 2}
    stages = plan_recipe(
        recipe(
            [
                {},
                {"steps": None, "tokens": 1281},
                {"steps": None, "minutes": 3},
                {**growing, "micro_batch_size": 1},
                {**growing, "steps": None, "tokens": 289, "micro_batch_size": 1},
                {"steps": None, "gate": {"tokens": 500}},
            ]
        )
    )
    counted = [(s.steps, s.tokens) for s in stages]
    # steps of 2, 3, 4, 4, ... sequences of 32: 160 tokens after two, 288 after three
    assert counted == [(10, 1280), (11, 1408), (None, None), (10, 160 + 8 * 128), (4, 416), (None, 500)]


def test_loops_may_fall_and_rise():
    stages = plan_recipe(recipe([{"loops": 2}, {"loops": 5}, {}]))
    assert [stage.loops for stage in stages] == [2, 5, 5]


def test_parameters_are_those_of_the_model():
    shape = small_model(num_prelude_layers=1, num_coda_layers=1, tie_word_embeddings=False)
    assert count_parameters(shape.config) == sum(p.numel() for p in shape.parameters())
    # 24 layers of 4 x 2048^2 + 3 x 2048 x 5632 + 4 x 2048, embedding and head, final norm, gate
    by_hand = 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 4 * 2048) + 2 * 49152 * 2048 + 2048 + 2049
    assert count_parameters(OuroConfig(num_hidden_layers=24)) == by_hand == 1_434_652_673
    (_, gate) = plan_recipe(recipe([{}, {"steps": None, "gate": {}}]))
    assert gate.trained == 33 and gate.parameters > 20_000


def test_flops_by_hand():
    config = OuroConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, total_ut_steps=4, num_prelude_layers=1, num_coda_layers=2,
    )  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, MLP
    stage = Stage(name="x", steps=1, sequence_length=9)
    passes = 4 * 3 + 1 + 4 * 2
    assert forward_flops(config, stage) == 2 * (passes * layer + 4 * 100 * 8) + 4 * passes * 8 * 5
    last = stage.model_copy(update={"objective": "last"})
    assert forward_flops(config, last) == 2 * (15 * layer + 100 * 8) + 4 * 15 * 8 * 5


@pytest.mark.parametrize("fields", [{}, {"num_prelude_layers": 1, "num_coda_layers": 1, "num_key_value_heads": 1}])
def test_flops_are_those_that_torch_counts(fields):
    model = small_model(vocab_size=128, **fields).eval()
    model.set_attn_implementation("eager")  # the fused one is not counted
    ids = torch.randint(1, 100, (1, 48))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model.model(ids)
        for state in out.loop_states:  # every loop is read, through the coda where there is one
            model.lm_head(state)
    stage = Stage(name="x", steps=1, sequence_length=48)
    ours = 48 * forward_flops(model.config, stage)
    extra = 0 if not fields else 2 * 48 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 48) * 2  # coda in two more loops
    attention = 4 * 48 * 32 * (48 - 49 / 2)  # torch counts all keys of every query, not the causal half
    passes = 3 * 2 + (0 if not fields else 1 + 1)
    coda = 0 if not fields else 2 * 4 * 48 * 32 * 49 / 2
    assert counter.get_total_flops() == pytest.approx(ours - extra - coda + passes * attention, rel=1e-3)


CANNOT = [
    ([{}, {"upcycle": {"num_hidden_layers": 1}}], "2: upcycle.num_hidden_layers is 1; upcycling only adds layers"),
    ([{"upcycle": {"num_hidden_layers": 5}}], "1: upcycle.num_hidden_layers is 5; it must be a multiple"),
    ([{}, {"sequence_length": 128}], "2: sequence_length is 128, beyond max_position_embeddings = 64"),
    ([{"batch_tokens": 31}], "1: batch_tokens is 31, less than one sequence of 32 tokens"),
    ([{"batch_tokens": 100}], "1: batch_tokens is 100, no multiple of sequence_length = 32; 96 would be"),
    ([{"batch_tokens_start": 16, "batch_ramp_steps": 2}], "1: batch_tokens_start is 16, less than one sequence of 32"),
    ([{"batch_tokens_start": 256, "batch_ramp_steps": 2}], "1: batch_tokens_start is 256, above batch_tokens = 128"),
    ([{"steps": None, "tokens": 127}], "1: tokens is 127, less than the first batch of 128"),
    ([{"mixture": {"a": 1, "c": 1}}], r"1: mixture names 'c', which is not in data.sources \(a, b\)"),
    ([{"mixture": {"a": 1}}, {"mixture": {"a": 2}}], "data.sources.b is in no stage's mixture"),
    ([{"loop_regulariser": {"block": 2}}], "1: loop_regulariser.block is 2; it must divide the 2 layers and be fewer"),
    (
        [{"loops": 2, "loop_counts": {"distribution": "uniform", "most": 3}}],
        "1: loop_counts.most is 3, more than the 2",
    ),
    ([{"loops": 1}, {"steps": None, "gate": {}}], "2: the model has 1 loop; a gate has something to decide from 2 on"),
]


@pytest.mark.parametrize(("stages", "message"), CANNOT)
def test_stages_that_cannot_follow_each_other(stages, message):
    start = message if message.startswith("data") else f"stages: {message}"
    with pytest.raises(ValueError, match=start) as caught:
        plan_recipe(recipe(stages))
    assert "\n" not in str(caught.value)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 9), st.integers(1, 6), st.integers(1, 400))
def test_batches_grow_evenly_and_miss_no_sample(start, more, ramp, micro, samples):
    batches = BatchPlan(start, start + more, ramp, micro)
    sizes = [batches.first(step + 1) - batches.first(step) for step in range(ramp + 5)]
    assert batches.first(0) == 0
    assert sizes == sorted(sizes) and sizes[0] == (start if ramp else start + more)
    assert set(sizes[ramp:]) == {start + more}
    steps = batches.steps(samples)
    assert batches.first(steps) >= samples > batches.first(steps - 1)


def test_batches_by_hand():
    batches = BatchPlan(start=4, end=8, ramp=4, micro=2)
    assert [batches.first(step) for step in range(7)] == [0, 4, 8, 14, 20, 28, 36]  # 4, 4, 6, 6, 8, 8
    assert batches.first(10**6) == 20 + (10**6 - 4) * 8


def test_the_table_folds_and_loses_nothing():
    screen = io.StringIO()
    stages = plan_recipe(recipe([{"final_learning_rate": 1e-4}, {"steps": None, "gate": {}}]))
    Console(file=screen, width=80).print(plan_table(stages))
    shown = screen.getvalue()
    for text in ("tokens", "parameters", "FLOPs", "RoPE base", "learning rate", "1.28k", "0.0003 > 0.0001", "10000"):
        assert text in shown
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


def test_a_plan_builds_no_weights_and_reads_no_data(monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: made.append(tensor.device.type) or tensor)
    plan_recipe(load_recipe(next(path for path in RECIPES if path.stem == "ouro-2.6b")))
    assert set(made) <= {"meta"}


# ---- the recipes that are shipped


@pytest.fixture
def hub(monkeypatch):
    """A released configuration stands in for the one on the hub."""
    monkeypatch.setattr(planning, "load_config", lambda place: OuroConfig(rope_parameters={"rope_theta": 1e6}))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_resolves(path, hub):
    loaded = load_recipe(path)
    assert Recipe.validated(yaml.safe_load(loaded.to_yaml()), "again") == loaded
    for stage in plan_recipe(loaded):
        assert stage.parameters > 0 and (stage.flops is None or stage.flops > 0)


TRILLION, K = 10**12, 1024
TABLE_1 = {  # final learning rate, decay, batch, sequence, tokens, loops, beta, RoPE base
    "1a-pretrain": (3e-4, None, (2**22, 2**23), 4 * K, 3 * TRILLION, 8, 0.1, 1e4),
    "1b-pretrain": (3e-4, None, 2**23, 4 * K, 3 * TRILLION, 4, 0.05, 1e4),
    "2-anneal": (3e-5, "cosine", 2**23, 16 * K, 1.4 * TRILLION, 4, 0.05, 4e4),
    "3-long-context": (3e-5, None, 2**23, 64 * K, 20 * 10**9, 4, 0.05, 1e6),
    "4-mid-training": (1e-5, "cosine", 2**23, 32 * K, 300 * 10**9, 4, 0.05, 1e6),
}


@pytest.mark.parametrize(("name", "layers", "parameters"), [("ouro-1.4b", 24, 1.435e9), ("ouro-2.6b", 48, 2.668e9)])
def test_the_papers_recipes_have_the_papers_numbers(name, layers, parameters):
    loaded = load_recipe(next(path for path in RECIPES if path.stem == name))
    *stages, gate = plan_recipe(loaded)
    assert [stage.settings.name for stage in stages] == list(TABLE_1)
    for stage, (rate, decay, batch, length, tokens, loops, beta, theta) in zip(stages, TABLE_1.values(), strict=True):
        s = stage.settings
        final = s.learning_rate if s.final_learning_rate is None else s.final_learning_rate
        assert (final, None if s.final_learning_rate is None else s.decay, s.decay_fraction) == (rate, decay, 1.0)
        assert (s.batch_tokens if s.batch_tokens_start is None else (s.batch_tokens_start, s.batch_tokens)) == batch
        assert (s.sequence_length, s.tokens, stage.loops) == (length, tokens, loops)
        assert (s.exit_beta, s.exit_beta_start, s.exit_prior, stage.rope_theta) == (beta, None, "uniform", theta)
        assert (s.betas, s.weight_decay, s.clip, s.objective) == ((0.9, 0.95), 0.1, 1.0, "expected")
        assert tokens <= stage.tokens < tokens + 2**23
    assert [stage.layers for stage in stages] == [24, *[layers] * 4] and gate.layers == layers
    assert stages[-1].parameters == pytest.approx(parameters, rel=1e-3)
    assert (gate.settings.gate.k, gate.settings.gate.gamma) == (50.0, 0.005)
    shape = loaded.model
    assert (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads) == (2048, 5632, 16)
    assert shape.vocab_size == 49_152 and not shape.tie_word_embeddings


@pytest.mark.parametrize("name", ["ouro-1.4b", "ouro-2.6b"])
def test_the_papers_mixtures_are_its_tables(name):
    loaded = load_recipe(next(path for path in RECIPES if path.stem == name))
    mixtures = {stage.name: stage.mixture for stage in loaded.stages}
    assert mixtures["1a-pretrain"] == mixtures["1b-pretrain"]
    assert list(mixtures["1a-pretrain"].values()) == [73.4, 13.0, 2.0, 7.5, 4.1]
    assert list(mixtures["2-anneal"].values()) == [66.5, 15.0, 4.6, 0.5, 3.8, 3.4, 6.2]
    assert sum(mixtures["1a-pretrain"].values()) == pytest.approx(100)
    assert sum(mixtures["2-anneal"].values()) == pytest.approx(100)
    last = mixtures["4-mid-training"]
    english = {source: weight for source, weight in mixtures["1a-pretrain"].items() if source != "map-cc"}
    del english["ultra-fineweb-zh"]
    expected = {"mid-training": 90.0}
    expected |= {source: 30 * weight / sum(english.values()) for source, weight in english.items()}
    expected |= {source: 180 * weight / 100 for source, weight in mixtures["2-anneal"].items()}
    assert last == pytest.approx(expected, abs=1e-3) and sum(last.values()) == pytest.approx(300, abs=1e-3)


def test_what_is_not_in_the_paper_is_marked():
    for name in ("ouro-1.4b", "ouro-2.6b"):
        text = next(path for path in RECIPES if path.stem == name).read_text()
        marked = {line.split(":")[0].strip() for line in text.splitlines() if "not in the paper" in line}
        assert {"seed", "num_attention_heads", "warmup_steps", "batch_ramp_steps", "tie_word_embeddings"} <= marked


def test_the_recipe_of_the_documentation_resolves():
    text = (Path(looplm.__file__).parents[1] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    stages = plan_recipe(Recipe.validated(yaml.safe_load(block), "docs/training.md"))
    assert [(stage.layers, stage.loops) for stage in stages] == [(4, 8), (8, 4), (8, 4)]


def test_a_pretrained_model_is_planned_from_its_own_shape(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    values = small_values(tmp_path, model={}, stage={"loops": 2})
    values["model"] = {"pretrained": str(tmp_path / "model")}
    (stage,) = plan_recipe(Recipe.validated(values, "r"))
    assert (stage.layers, stage.loops) == (2, 2) and stage.parameters == small_model().num_parameters()


def test_planning_twice_gives_the_same():
    chosen = recipe([{}, {"loops": 2}])
    assert plan_recipe(chosen) == plan_recipe(chosen) == plan(chosen, planning.new_config(chosen.model, 300))

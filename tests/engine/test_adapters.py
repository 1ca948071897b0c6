"""A row with an adapter gives what `generate` gives on the model that PEFT merged; bad adapters are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import ADAPTIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from references import asking, blocks_are_free, check, close, play, table
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tokens

from looplm.engine import Engine, SamplingParams
from looplm.engine.adapters import PROJECTIONS, Adaptation, Adapter, load_adapter
from looplm.engine.kv_pool import BLOCK
from looplm.exits import SampledExit
from looplm.model.modeling import OuroForCausalLM

POLICIES = ["per_loop", "last"]
NAMES = [None, "all", "queries", "inner"]
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": list(PROJECTIONS)},
    "queries": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "inner": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": ["o_proj", "gate_proj", "down_proj"],
        "rank_pattern": {"down_proj": 5, "layers.1.self_attn.o_proj": 1},
        "alpha_pattern": {r"layers\.0\..*": 9},
    },
}
PROMPTS = [tokens(length, seed=seed).tolist() for length, seed in ((6, 11), (19, 12), (1, 13), (33, 14))]


def save_adapter(folder: Path, seed: int = 0, variant: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A PEFT folder with random factors, made by PEFT on a tiny model."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.1, **fields)
    get_peft_model(tiny_model(**(variant or {})), config).save_pretrained(folder)
    return folder


def merged(folder: Path, model: OuroForCausalLM) -> OuroForCausalLM:
    """The reference: PEFT's own merge."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Path], dict[Any, Any]]]:
    """Adapter folders of a variant, and its models by adapter's name, each made once."""
    known: dict[str, tuple[dict[str, Path], dict[Any, Any]]] = {}

    def make(variant: str) -> tuple[dict[str, Path], dict[Any, Any]]:
        if variant not in known:
            place, fields = tmp_path_factory.mktemp(variant), ADAPTIVE[variant]
            folders = {
                name: save_adapter(place / name, seed, fields, **SETTINGS[name]) for seed, name in enumerate(SETTINGS)
            }
            models = {name: merged(folder, tiny_model(**fields)) for name, folder in folders.items()}
            known[variant] = folders, {None: tiny_model(**fields), **models}
        return known[variant]

    return make


@pytest.mark.parametrize("variant", list(ADAPTIVE))
@pytest.mark.parametrize(("policy", "prefill"), [("per_loop", "adaptive"), ("last", "full")])
def test_rows_with_different_adapters_equal_the_merged_models(made, variant: str, policy: str, prefill: str) -> None:
    folders, models = made(variant)
    model = tiny_model(**ADAPTIVE[variant])
    engine = Engine(model, kv_policy=policy, kv_bytes=4 << 20, max_rows=5, chunk_tokens=24, adapters=folders)
    asked = [
        (prompt, asking(exit_threshold=0.6, prefill=prefill, adapter=name))
        for prompt, name in zip([*PROMPTS, PROMPTS[0]], [*NAMES, "inner"], strict=True)
    ]
    found = engine.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for completion, (_, params) in zip(found, asked, strict=True):
        check(models[params.adapter], completion, policy)(params)
    assert found[0].token_ids != found[4].token_ids, "the adapter says something"
    blocks_are_free(engine)


ASKED = st.tuples(
    st.sampled_from([0, 1, 17, 33]),
    st.lists(st.integers(3, 63), min_size=1, max_size=5),
    st.sampled_from(NAMES),
    st.integers(2, 6),
    st.sampled_from(
        [{}, {"exit_threshold": 0.5}, {"exit_threshold": 0.5, "prefill": "adaptive"}, {"exit_rule": SampledExit(3)}]
    ),
)


@settings(max_examples=20, deadline=None)
@given(
    work=st.lists(ASKED, min_size=2, max_size=5),
    policy=st.sampled_from(POLICIES),
    rows=st.integers(1, 4),
    chunk=st.sampled_from([5, 16, 40]),
    waits=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    interrupted=st.dictionaries(st.integers(1, 20), st.integers(0, 3), max_size=3),
)
def test_any_schedule_gives_what_the_merged_models_give(made, work, policy, rows, chunk, waits, interrupted) -> None:
    """Prompts that begin alike under different adapters, arrivals at any time, preemption while reading or decoding."""
    folders, models = made("plain")
    engine = Engine(
        tiny_model(), kv_policy=policy, kv_bytes=1 << 19, max_rows=rows, chunk_tokens=chunk, adapters=folders
    )
    start = tokens(33, seed=1).tolist()
    asked = (
        (start[:shared] + own, asking(max_tokens=count, adapter=name, **depth), 0)
        for shared, own, name, count, depth in work
    )
    seen = play(engine, asked, waits, interrupted)
    for sequence in seen:
        check(models[sequence.params.adapter], sequence.completion(), policy)(sequence.params)
    blocks_are_free(engine)


def test_float32_agrees_too(made) -> None:
    folders, _ = made("gqa")
    engine = Engine(tiny_model(**ADAPTIVE["gqa"]).float(), kv_bytes=1 << 20, adapters=folders)
    params = [asking(exit_threshold=0.6, adapter=name) for name in NAMES]
    for completion, asked in zip(engine.generate(PROMPTS, params), params, strict=True):
        model = tiny_model(**ADAPTIVE["gqa"]).float()
        model = model if asked.adapter is None else merged(folders[asked.adapter], model)
        prompt = torch.tensor([completion.prompt_token_ids])
        result = model.generate(
            prompt,
            exit_threshold=0.6,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert completion.token_ids == result.sequences[0, prompt.shape[1] :].tolist()
        assert completion.exit_depths == result.exit_depths[0].tolist()
        close(table(completion), torch.stack(result.logits)[:, 0].log_softmax(-1), 1e-5)


def test_all_rows_share_one_pass(made) -> None:
    folders, _ = made("plain")
    model = tiny_model()
    engine = Engine(model, kv_bytes=1 << 20, adapters=folders)
    calls: list[tuple[int, ...]] = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: calls.append(tuple(inputs[0].shape[:2])))
    engine.generate([[5]] * 4, [SamplingParams(max_tokens=3, adapter=name) for name in NAMES])
    assert calls == [(4, 1)] * 9, "a prompt and two more tokens, three loops each, all rows in every pass"


def test_a_prefix_belongs_to_its_adapter(made) -> None:
    folders, _ = made("plain")
    engine, prompt = Engine(tiny_model(), kv_bytes=1 << 20, adapters=folders), tokens(BLOCK + 4, seed=3).tolist()
    for extra in ({}, {"exit_threshold": 0.4, "prefill": "adaptive"}):
        cached = [engine.generate([prompt], asking(adapter=name, **extra))[0].cached_tokens for name in NAMES * 2]
        assert cached == [0] * len(NAMES) + [BLOCK + 4] * len(NAMES)


def test_the_addition_by_hand() -> None:
    """x = (1, 2), A = (3, 1), s B = (2, -1): A x = 5, and 10 and -5 are added; other layers, names and rows are not."""
    adapter = Adapter("one", {(1, "q_proj"): (torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0], [-1.0]]))})
    rows = Adaptation([None, adapter, adapter], torch.device("cpu"))
    x, y = torch.tensor([[[1.0, 2.0]]]).expand(3, 1, 2), torch.ones(3, 1, 2)
    assert rows.add("q_proj", x, y, 1).tolist() == [[[1, 1]], [[11, -4]], [[11, -4]]]
    assert rows.add("q_proj", x, y, 0) is y and rows.add("k_proj", x, y, 1) is y
    assert rows.take(torch.tensor([False, True, False])).add("q_proj", x[:1], y[:1], 1).tolist() == [[[11, -4]]]
    assert Adaptation.of([None, None], torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 8, "lora_alpha": 16}, (8, 2.0)),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, (4, 8.0)),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 2, "q_proj": 4}}, (4, 4.0)),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 2}}, (8, 0.25)),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"proj": 2}}, (8, 2.0)),
    ],
    ids=["plain", "rank-stabilised", "rank", "the first pattern that matches", "no part of a name"],
)
def test_the_scale(tmp_path: Path, fields: dict[str, Any], expected: tuple[int, float]) -> None:
    """s = alpha / r, or alpha / sqrt(r): B of ones comes back as s."""
    rank, scale = expected
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{path}A.weight": torch.ones(rank, 32), f"{path}B.weight": torch.ones(32, rank)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    down, up = load_adapter("one", tmp_path, tiny_model()).factors[0, "q_proj"]
    assert (down == 1).all() and (up == scale).all()


def change_settings(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def change_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)

    return change


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "another method": (change_settings(peft_type="IA3"), "peft_type is 'IA3'; the engine serves 'LORA'"),
    "DoRA": (change_settings(use_dora=True), "use_dora is True; the engine serves plain LoRA"),
    "bias": (change_settings(bias="all"), "bias is 'all'"),
    "bias of B": (change_settings(lora_bias=True), "lora_bias is True"),
    "modules_to_save": (change_settings(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "a setting of tomorrow": (change_settings(use_new=1), "use_new is 1"),
    "changed base": (
        change_settings(init_lora_weights="pissa"),
        "init_lora_weights is 'pissa', which changes the base",
    ),
    "no alpha": (change_settings(lora_alpha="8"), "lora_alpha of model.layers.0.* is '8'; it must be a number above 0"),
    "a pattern that is none": (change_settings(rank_pattern={"(": 2}), r"rank_pattern is \{'\(': 2\}; it must map"),
    "another rank": (change_settings(r=3), r"has lora_A \[2, 32\] and .* rank 3 on this model takes \[3, 32\]"),
    "no weights file": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "pickle": (pickle_weights, "has only adapter_model.bin, a pickle, which is not read"),
    "cut": (cut_weights, "adapter_model.safetensors cannot be read"),
    "NaN": (change_weights(lambda w: w[KEY].fill_(float("nan"))), f"weight {KEY} is not finite"),
    "half": (change_weights(lambda w: w.pop(KEY)), "q_proj has lora_B alone"),
    "empty": (change_weights(lambda w: w.clear()), "holds no weights"),
    "magnitudes": (
        change_weights(lambda w: w.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)})),
        "has base_model.*lora_magnitude_vector, which is not served",
    ),
    "another width": (
        change_weights(lambda w: w.update({KEY: torch.ones(2, 40)})),
        r"has lora_A \[2, 40\] .*was it trained on another base model\?",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_refusals(tmp_path: Path, made, fault: str) -> None:
    folders, _ = made("plain")
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((folders["queries"] / name).read_bytes())
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Engine(tiny_model(), kv_bytes=1 << 20, adapters={"good": folders["all"], "bad": folder})
    assert str(caught.value).startswith("adapter 'bad' (") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "module"),
    [({}, "lm_head"), ({"tie_word_embeddings": True}, "lm_head"), ({}, "early_exit_gate"), ({}, "embed_tokens")],
)
def test_only_projections_of_layers_are_adapted(tmp_path: Path, variant: dict[str, Any], module: str) -> None:
    save_adapter(tmp_path, variant=variant, r=2, target_modules=["q_proj", module])
    with pytest.raises(ValueError, match=f"has base_model.model.*{module}.*, which is not served"):
        load_adapter("bad", tmp_path, tiny_model(**variant))


def test_a_deeper_base_model(tmp_path: Path) -> None:
    save_adapter(tmp_path, variant={"num_hidden_layers": 3}, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"has base_model.*layers.2.self_attn.q_proj.*, which is not served"):
        load_adapter("bad", tmp_path, tiny_model())


def test_a_request_for_an_adapter_that_is_not_there(made) -> None:
    folders, _ = made("plain")
    engine = Engine(tiny_model(), kv_bytes=1 << 20, adapters=folders)
    with pytest.raises(ValueError, match="adapter is 'other'; this engine was made with all, queries, inner"):
        engine.generate([[3, 4]], SamplingParams(adapter="other"))
    with pytest.raises(ValueError, match="adapter is 'all'; this engine was made with none"):
        Engine(tiny_model(), kv_bytes=1 << 20).prepare([3, 4], SamplingParams(adapter="all"))
    assert not engine.busy

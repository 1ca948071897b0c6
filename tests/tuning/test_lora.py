"""Adapters: trained, served by the engine, merged, and refused where they belong to another model."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuned import save_base, sft_recipe, weights

from looplm.engine import Engine, SamplingParams
from looplm.model.loading import load_model
from looplm.tuning.lora import merge_adapter, weights_digest
from looplm.tuning.sft import tune


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """The output of a LoRA run whose gate was recalibrated."""
    folder = tmp_path_factory.mktemp("run")
    gate = {"recalibrate_gate": True, "gate": {"tokens": 300, "epochs": 2}}
    tune(sft_recipe(folder, base, lora={"rank": 4, "alpha": 16}, steps=8, learning_rate=3e-2, **gate))
    return folder / "out"


def test_the_engine_serves_the_adapter_as_the_merged_model_speaks(run, base):
    tuned = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    plain, tokenizer = load_model(str(base))
    tuned.model.early_exit_gate.load_state_dict(plain.model.early_exit_gate.state_dict())  # the engine has one gate
    prompts = [tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )["input_ids"] for text in ("What is 1 + 2?", "Which is larger, 4 or 9?")]  # fmt: skip
    engine = Engine(plain, tokenizer, kv_bytes=4 << 20, adapters={"sums": run / "adapter"})
    for depth in ({}, {"exit_threshold": 0.6}):
        params = SamplingParams(temperature=0, max_tokens=12, adapter="sums", **depth)
        served = engine.generate(prompts, [params] * 2)
        bare = engine.generate(prompts, [SamplingParams(temperature=0, max_tokens=12, **depth)] * 2)
        for prompt, completion in zip(prompts, served, strict=True):
            out = tuned.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=0, **depth)
            assert completion.token_ids == out[0, len(prompt) :].tolist()
        assert [each.token_ids for each in bare] != [each.token_ids for each in served]


def test_merging_gives_the_model_of_the_run_and_is_pefts(run, base, tmp_path, looplm_command):
    code, out, err = looplm_command("merge", run / "adapter", "--output", tmp_path / "merged")
    assert code == 0, err
    assert out == f"model   {tmp_path}/merged\n"
    merged, ours = (weights(AutoModelForCausalLM.from_pretrained(f)) for f in (tmp_path / "merged", run / "model"))
    assert all(torch.equal(merged[name], ours[name]) for name in ours)
    peft = PeftModel.from_pretrained(load_model(str(base))[0], str(run / "adapter")).merge_and_unload()
    gate = load_file(run / "adapter" / "gate.safetensors")
    for name, weight in weights(peft).items():
        expected = gate[name.rpartition(".")[2]] if "early_exit_gate" in name else weight
        assert torch.equal(merged[name], expected), name
    assert "The adapter adapter merged by looplm into model." in (tmp_path / "merged" / "README.md").read_text()


def test_only_the_adapter_learns(run, base):
    before, after = weights(load_model(str(base))[0]), weights(load_model(str(run / "model"))[0])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name or "early_exit_gate" in name}


def test_an_adapter_of_another_model_is_refused(run, base, tmp_path, refused):
    other = save_base(tmp_path / "other", seed=1)
    line = refused("merge", run / "adapter", "--output", tmp_path / "merged", "--model", other)
    assert line == f"adapter {run}/adapter was trained on other weights than these; merge it into {base}"
    wider = save_base(tmp_path / "wider", hidden_size=48)
    line = refused("merge", run / "adapter", "--output", tmp_path / "merged", "--model", wider)
    assert "was it trained on another base model?" in line
    assert not (tmp_path / "merged").exists()


def test_a_gate_makes_no_other_model(base):
    model, _ = load_model(str(base))
    digest = weights_digest(model)
    torch.nn.init.ones_(model.model.early_exit_gate.weight)
    assert weights_digest(model) == digest
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert weights_digest(model) != digest


def test_damaged_adapters_are_refused(run, base, tmp_path, refused):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, folder / "gate.safetensors")
    with pytest.raises(ValueError, match=r"gate\.safetensors cannot be used"):
        merge_adapter(folder, load_model(str(base))[0])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        merge_adapter(folder, load_model(str(base))[0])
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    line = refused("merge", folder, "--output", tmp_path / "merged")
    assert line == f"{folder} does not say which model it was trained on; give it with --model"
    line = refused("merge", tmp_path / "nowhere", "--output", tmp_path / "merged")
    assert line.startswith(f"{tmp_path}/nowhere is no adapter that PEFT saved: adapter_config.json cannot be read (")
    assert not (tmp_path / "merged").exists()

"""Saved folders: they load after `import looplm`, older readers understand them, and a card says what they are."""

import json
import re
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny import VARIANTS, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM

import looplm
from looplm.data.tokenizers import train_bpe
from looplm.model.configuration import OuroConfig
from looplm.model.loading import load_model
from looplm.model.modeling import OuroForCausalLM
from looplm.model.saving import Provenance, model_card, require_new_folder, save_model

TOKENIZER = train_bpe(["a model that is saved can be loaded again " * 4], 270)
IDS = tokens(2, 7)


def small(**fields):
    return tiny_model(vocab_size=len(TOKENIZER), **fields)


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_it_loads_through_the_auto_class_whole_or_sharded(fields, sharded, tmp_path):
    model = small(**fields)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is looplm.OuroForCausalLM
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    model = small().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_released_names_and_keys(tmp_path):
    model = small(rope_parameters={"rope_type": "default", "rope_theta": 4e4})
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 4e4 and config["rope_parameters"]["rope_theta"] == 4e4
    assert config["torch_dtype"] == config["dtype"] == "float64" and "auto_map" not in config
    assert config["model_type"] == "ouro" and config["architectures"] == ["OuroForCausalLM"]
    layer = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj "
    layer += "mlp.down_proj input_layernorm input_layernorm_2 post_attention_layernorm post_attention_layernorm_2"
    names = {f"model.layers.{index}.{name}.weight" for index in (0, 1) for name in layer.split()}
    names |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == names


def test_device_map_without_accelerate_is_refused_by_name(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path)
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
        if "is_accelerate_available" in vars(module):
            monkeypatch.setattr(module, "is_accelerate_available", lambda *version: False)
    with pytest.raises((ValueError, ImportError), match="accelerate"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")


def test_device_map_with_accelerate_gives_the_same_model(tmp_path):
    model, ids = small().eval(), torch.arange(1, 6)[None]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", dtype=model.dtype)
    assert torch.equal(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


# ---- the card


def test_the_card_of_a_plain_save_says_what_the_configuration_knows(tmp_path):
    model = small(num_prelude_layers=2, num_coda_layers=1)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card == model_card(model)
    assert header(card)["library_name"] == "transformers" and "looped-language-model" in header(card)["tags"]
    assert "2 layers, applied 3 times to every token, 2 layers before the loop, 1 layer after the loop;" in card
    assert f"- parameters: {sum(p.numel() for p in model.parameters()):,} (float64)" in card
    assert "## Origin" not in card and "## Loss" not in card


def test_a_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_the_main_process_writes_it(tmp_path):
    small().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_the_card_of_a_model_with_a_history():
    told = Provenance("Trained for 12 steps.", ["speeches", "plays"], [2.5, 2.25, 2.125, 3], "held-out speeches")
    card = model_card(small(), told)
    assert "## Origin\n\nTrained for 12 steps.\n\nTrained on:\n\n- speeches\n- plays\n" in card
    table = ["| 1 | 2.5000 |", "| 2 | 2.2500 |", "| 3 | 2.1250 |", "| 4 (beyond training) | 3.0000 |"]
    assert "\n".join(table) in card and "Nats a token, on held-out speeches." in card


def test_the_code_of_the_card_runs(tmp_path):
    save_model(str(tmp_path / "m"), small().float(), TOKENIZER, Provenance("made here"))
    card = (tmp_path / "m" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace("this folder, or its name on the hub", str(tmp_path / "m")).replace("=40", "=3")
    exec(compile(code, "card", "exec"), {})


# ---- whole folders


def test_save_model_writes_all_that_loading_needs(tmp_path):
    model = small().float()
    save_model(str(tmp_path / "a" / "m"), model, TOKENIZER, Provenance("made here"))
    loaded, tokenizer = load_model(str(tmp_path / "a" / "m"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert "made here" in (tmp_path / "a" / "m" / "README.md").read_text()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["m"]


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="exists and is not an empty folder; give a new one"):
            save_model(str(taken), small(), TOKENIZER, Provenance(""))
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    assert require_new_folder(str(tmp_path / "empty")) == tmp_path / "empty"


def test_nothing_is_left_where_saving_fails(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_model(str(tmp_path / "m"), small(), TOKENIZER, Provenance(""))
    assert list(tmp_path.iterdir()) == []


def test_what_is_pushed_to_the_hub_loads_again(tmp_path, monkeypatch):
    """`push_to_hub` is inherited: with the network cut off at its three calls, this is what would be uploaded."""
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    pushed = {}

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

    def upload(self, folder, repo_id, *_, **__):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        pushed[repo_id] = loaded(IDS).logits, json.loads((tmp_path / folder / "config.json").read_text())

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard("---\nlibrary_name: transformers\n---\n"))
    monkeypatch.setattr(OuroForCausalLM, "_upload_modified_files", upload)
    model = small()
    model.push_to_hub("owner/name")
    logits, config = pushed["owner/name"]
    assert torch.equal(logits, model(IDS).logits)
    assert "auto_map" not in config and config["torch_dtype"] == "float64"


def test_a_configuration_reads_back_as_it_was(tmp_path):
    for fields in VARIANTS.values():
        config = tiny_config(**fields)
        config.save_pretrained(tmp_path)
        assert OuroConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()

"""What the headers of a checkpoint tell, for every variant, and for files that are cut, gone or of another model."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, tiny_config, tiny_model

from looplm.model import checkpoint
from looplm.model.checkpoint import RELEASED, differences, expected_shapes, local_folder, stored_weights
from looplm.model.configuration import OuroConfig


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_what_is_saved_is_what_is_expected(fields, size, tmp_path):
    model = tiny_model(**fields).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=size)
    stored = stored_weights(tmp_path)
    assert differences(model.config, stored) == []
    assert stored.parameters == sum(p.numel() for p in model.parameters()) and stored.dtypes == ["BF16"]


@pytest.mark.parametrize(("layers", "count", "name"), [(24, 1_434_652_673, "1.4B"), (48, 2_667_974_657, "2.6B")])
def test_the_released_shapes_have_the_released_counts(layers, count, name):
    shapes = expected_shapes(OuroConfig(num_hidden_layers=layers))
    assert sum(map(prod, shapes.values())) == count and name in RELEASED[count]
    assert shapes["model.early_exit_gate.weight"] == (1, 2048) and shapes["lm_head.weight"] == (49152, 2048)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (2048, 5632)


def test_every_difference_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = tiny_config(num_hidden_layers=1, num_coda_layers=1, intermediate_size=50)
    faults = differences(config, stored_weights(tmp_path))
    assert "model.coda.0.mlp.up_proj.weight is missing" in faults
    assert "model.layers.1.input_layernorm.weight is unexpected" in faults
    assert "model.layers.0.mlp.down_proj.weight is [32, 48], not [32, 50]" in faults


def test_a_tied_head_may_be_stored_twice(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert differences(model.config, stored_weights(tmp_path)) == []


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"there is neither model\.safetensors nor model\.safetensors\.index\.json"):
        stored_weights(tmp_path)
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"{shards[1].name} cannot be read \(.*\); download it again"):
        stored_weights(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} of model.safetensors.index.json is missing; download it"):
        stored_weights(tmp_path)
    for text in ("{", "[]", json.dumps({"weight_map": 3})):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
            stored_weights(tmp_path)


def test_a_hub_name_is_downloaded_without_code(tmp_path, monkeypatch):
    asked = {}

    def snapshot(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    assert local_folder("owner/name") == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path and list(asked) == ["owner/name"]
    assert not any(pattern.endswith((".py", "*", ".bin")) for pattern in asked["owner/name"] if pattern != "tokenizer*")


def test_no_weight_is_read(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    data = bytearray(file.read_bytes())
    data[8 + size :] = b"\xff" * (len(data) - 8 - size)  # NaN everywhere
    file.write_bytes(bytes(data))
    assert differences(tiny_config(), stored_weights(tmp_path)) == []
    assert torch.isnan(load_file(file)["model.norm.weight"]).all()

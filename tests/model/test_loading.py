"""Loading a folder: what was saved comes back in evaluation mode, and every fault is one line that names it."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tokens

from looplm.data.tokenizers import train_bpe
from looplm.model.configuration import OuroConfig
from looplm.model.loading import load_model
from looplm.model.modeling import OuroForCausalLM

TOKENIZER = train_bpe(["the loop goes round the loop " * 4], 270)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = OuroForCausalLM(tiny_config(vocab_size=len(TOKENIZER), num_coda_layers=1))
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return model, path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved folder to damage."""
    return shutil.copytree(saved[1], tmp_path / "model")


def fault(path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each test looks at the text
        load_model(str(path))
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def test_what_was_saved_comes_back(saved):
    model, path = saved
    loaded, tokenizer = load_model(str(path))
    assert type(loaded) is OuroForCausalLM and not loaded.training
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_saved_one_or_the_one_asked_for(saved, tmp_path, stored):
    path = tmp_path / "model"
    OuroForCausalLM(saved[0].config).to(stored).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    assert load_model(str(path))[0].dtype == stored
    assert load_model(str(path), torch.float64)[0].dtype == torch.float64


def test_tied_weights_are_not_missed(tmp_path):
    OuroForCausalLM(tiny_config(vocab_size=len(TOKENIZER), tie_word_embeddings=True)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c"])
def test_no_such_folder(name):
    assert fault(name) == f"no such model: {name} is no folder here, and a hub name has the form OWNER/NAME"


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    def unreachable(name, **_):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(OuroConfig, "get_config_dict", unreachable)
    assert fault("owner/name") == "no such model: owner/name is neither a folder here nor reachable on the hub"


def test_a_file_is_not_a_folder(folder):
    assert fault(folder / "config.json").endswith("is a file; give the model folder that holds config.json")


def test_a_folder_without_a_model(tmp_path):
    assert fault(tmp_path).endswith("is not a model folder: it has no config.json")


@pytest.mark.parametrize("text", ["{", "", "\x00"])
def test_a_configuration_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    assert f"{folder}/config.json cannot be read: " in fault(folder)


@pytest.mark.parametrize(("text", "kind"), [('{"model_type": "llama"}', "'llama'"), ("{}", "None"), ("[]", "'list'")])
def test_another_kind_of_model(folder, text, kind):
    (folder / "config.json").write_text(text)
    assert f"is a {kind} model; looplm runs 'ouro' models" in fault(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number of at least 1"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"use_sliding_window": True}, "use_sliding_window is True; it must be false"),
        ({"dtype": "float31"}, "float31"),
        ({"rope_parameters": 3}, ""),
    ],
)
def test_a_configuration_out_of_range(folder, change, said):
    edit_config(folder, **change)
    message = fault(folder)
    assert message.startswith(f"{folder}/config.json: ") and said in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "missing keys: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "unexpected keys: model.layers.1.input_layernorm.weight"),
        ({"num_coda_layers": 0}, "unexpected keys: model.coda.0.input_layernorm.weight"),
        ({"intermediate_size": 52}, "mismatched keys: model.coda.0.mlp.down_proj.weight"),
    ],
)
def test_weights_that_do_not_fit_the_configuration(folder, change, said):
    edit_config(folder, **change)
    message = fault(folder)
    assert f"{folder}: the weights do not fit config.json, {said}" in message
    assert "in all); use the files of one and the same model" in message


def test_a_missing_weight_is_not_made_up(folder):
    edit_weights(folder, lambda weights: weights.pop("model.early_exit_gate.bias"))
    assert "missing keys: model.early_exit_gate.bias (1 in all)" in fault(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(folder, value):
    edit_weights(folder, lambda weights: weights["model.norm.weight"][5:6].fill_(value))
    assert f"{folder}: weight model.norm.weight holds NaN or infinity" in fault(folder)


def test_the_first_damaged_weight_is_named_whatever_its_dtype(folder):
    def change(weights):
        for name in weights:
            weights[name] = weights[name].bfloat16()
        weights["lm_head.weight"][3, 3] = float("nan")

    edit_weights(folder, change)
    assert "weight lm_head.weight holds NaN" in fault(folder)


def test_weights_cut_short_or_gone(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    assert f"{folder} is not a complete model folder: " in fault(folder)
    path.write_bytes(b"12345")
    assert f"{folder} is not a complete model folder: " in fault(folder)
    path.unlink()
    assert "is not a complete model folder: Error no file named model.safetensors" in fault(folder)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', None])
def test_a_tokenizer_that_is_damaged_or_gone(folder, text):
    path = folder / "tokenizer.json"
    path.unlink() if text is None else path.write_text(text)
    assert f"{folder} has no tokenizer that can be read: save one there with save_pretrained" in fault(folder)


def test_no_tokenizer_at_all(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer that can be read" in fault(folder)


def test_nothing_else_is_printed_and_the_log_level_is_given_back(folder, capfd):
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    edit_config(folder, num_hidden_layers=3)
    fault(folder)
    assert logger.level == before
    captured = capfd.readouterr()
    assert captured.out == "" and "MISSING" not in captured.err

"""`looplm upcycle`, `convert` and `verify` from end to end: tables, folders, exit codes, and nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from sound_model import TEXT, save, sound_model

from looplm.model.loading import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model, one without a tokenizer, and a text."""
    model, tokenizer = sound_model()
    save(model, tokenizer, tmp_path / "model")
    model.save_pretrained(tmp_path / "mute")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def looplm(looplm_command, monkeypatch, folder):
    """Runs a command in the folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    return looplm_command


@pytest.fixture
def refused(looplm, folder: Path):
    """Runs a command that must fail with exit code 2 and one line, and must write nothing; gives the line."""

    def run(*arguments: object) -> str:
        before = sorted(folder.rglob("*"))
        code, out, err = looplm(*arguments)
        lines = err.splitlines()
        assert (code, out) == (2, "") and lines[-1].startswith("looplm: ") and "Traceback" not in err
        assert sorted(folder.rglob("*")) == before
        return lines[-1].removeprefix("looplm: ")

    return run


def rows(out: str) -> list[list[str]]:
    """The cells of the tables in what was printed."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]


# ---- upcycle


def test_upcycle_shows_the_loss_of_every_loop_before_and_after(looplm, folder):
    arguments = ("--output", "new", "--layers", 2, "--loops", 2, "--arrangement", "AABB", "--text", "text.txt")
    code, out, err = looplm("upcycle", "model", *arguments)
    assert code == 0 and err == "measuring the old model ...\nmeasuring the new model ...\n"
    assert "1 layers x 3 loops" in out and "2 layers x 2 loops" in out and "model   new" in out
    table = rows(out)
    assert [row[1] for row in table] == ["1.8680", "1.5787", "1.5077"] and table[2][2].startswith("(")
    model, tokenizer = load_model(str(folder / "new"))
    assert (model.config.num_hidden_layers, model.config.total_ut_steps) == (2, 2)
    assert tokenizer.decode(tokenizer("more")["input_ids"]) == "more"
    card = (folder / "new" / "README.md").read_text()
    assert "Upcycled from model: 1 layers x 3 loops became 2 layers x 2 loops, AABB. Not trained since." in card
    assert f"| 1 | {table[0][2]} |" in card and "on text.txt" in card and str(folder) not in card


def test_upcycle_of_the_loops_alone_on_the_shipped_text(looplm, folder):
    code, out, _ = looplm("upcycle", "model", "--output", "new", "--loops", 4)
    assert code == 0
    assert all(old.strip("()") == new for _, old, new in rows(out))  # the same states
    assert load_model(str(folder / "new"))[0].config.total_ut_steps == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to change: give --layers, --loops or both"),
        (("--layers", 0), "--layers is 0; it must be at least 1"),
        (("--loops", -1), "--loops is -1; it must be at least 1"),
        (("--loops", 2, "--text", "none.txt"), "the text none.txt cannot be read: No such file or directory"),
    ],
)
def test_upcycle_refuses(refused, arguments, said):
    assert refused("upcycle", "model", "--output", "new", *arguments) == said


def test_upcycle_refuses_fewer_layers_and_no_multiple(refused, folder):
    model, tokenizer = sound_model()
    from looplm.model.upcycling import upcycle

    save(upcycle(model, num_hidden_layers=2), tokenizer, folder / "deep")
    fewer = refused("upcycle", "deep", "--output", "new", "--layers", 1)
    assert fewer == "num_hidden_layers is 1; upcycling only adds layers, and the model has 2"
    assert "it must be a multiple of the model's 2" in refused("upcycle", "deep", "--output", "new", "--layers", 3)


@pytest.mark.parametrize("command", [("upcycle", "--loops", 2), ("convert",)])
def test_folders_that_will_not_do(refused, command):
    name, *options = command
    taken = refused(name, "model", "--output", "mute", *options)
    assert taken == "mute exists and is not an empty folder; give a new one"
    assert refused(name, "nowhere", "--output", "new", *options).startswith("no such model: nowhere")
    assert "mute has no tokenizer that can be read" in refused(name, "mute", "--output", "new", *options)


# ---- convert


def test_convert_sets_tokens_template_and_dtype(looplm, folder):
    code, out, err = looplm("convert", "model", "--output", "new", "--dtype", "bf16")
    assert (code, err) == (0, "")
    assert "bos 0 -> 1, eos 0 -> 2, pad None -> 0" in out and "dtype    bfloat16" in out
    model, tokenizer = load_model(str(folder / "new"))
    assert model.dtype == torch.bfloat16 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / "new" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 0)
    config = json.loads((folder / "new" / "config.json").read_text())
    assert config["rope_theta"] == 10000 and config["torch_dtype"] == "bfloat16" and "auto_map" not in config


def test_converting_again_changes_nothing(looplm, folder):
    assert looplm("convert", "model", "--output", "new")[0] == looplm("convert", "new", "--output", "again")[0] == 0
    files = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    for name in files:
        assert (folder / "new" / name).read_bytes() == (folder / "again" / name).read_bytes()


def test_a_released_folder_with_its_pointer_to_remote_code(looplm, folder):
    path = folder / "model" / "config.json"
    values = json.loads(path.read_text())
    values.pop("rope_parameters")
    released = {"rope_theta": 1000000.0, "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig"}}
    path.write_text(json.dumps({**values, **released}))
    assert looplm("convert", "model", "--output", "new")[0] == 0
    config = json.loads((folder / "new" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6 and "auto_map" not in config


# ---- verify


def test_verify_passes_a_sound_model_and_writes_all_to_json(looplm, folder):
    code, out, err = looplm("verify", "model", "--text", "text.txt", "--json", "found.json")
    assert (code, err) == (0, "verifying model ...\n")
    checks = {row[0]: row[1] for row in rows(out) if len(row) == 3 and row[1] in ("pass", "note", "FAIL")}
    assert set(checks) == {"weights", "loading", "tokens", "precision", "training", "loops", "exits"}
    assert ["3", "1.5077", "0.250"] in rows(out) and ["4 (beyond training)", "1.5801", ""] in rows(out)
    assert "verdict: whole, trained, and better with every loop up to the trained depth" in out
    assert json.loads((folder / "found.json").read_text())["passed"] is True


def test_verify_fails_with_code_1_and_still_writes(looplm, folder):
    code, out, _ = looplm("verify", "mute", "--text", "text.txt", "--json", "found.json")
    assert code == 1 and "verdict: the checkpoint is incomplete or damaged" in out
    found = json.loads((folder / "found.json").read_text())
    assert found["passed"] is False and found["measurement"] is None


def test_verify_on_the_shipped_text_finds_a_model_of_other_words_wanting(looplm):
    code, out, _ = looplm("verify", "model")
    assert code == 1 and "weights look untrained" in out


def test_verify_refuses_what_is_no_model(refused):
    assert refused("verify", "nowhere").startswith("no such model: nowhere is no folder here")
    assert refused("verify", "model", "--text", "none.txt").startswith("the text none.txt cannot be read")

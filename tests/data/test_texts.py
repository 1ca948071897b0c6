"""The text that models are measured on: the shipped one, a file, and files that are none."""

import pytest

from looplm.data.texts import read_text


def test_the_shipped_text_is_whole():
    text = read_text()
    assert text.startswith("Four score and seven years ago our fathers brought forth")
    assert text.endswith("just and lasting peace among ourselves and with all nations.\n")
    assert len(text.split("\n\n")) == 7 and len(text.split()) > 900
    assert text.isascii()  # so that every tokenizer reads the same characters


def test_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_text(str(path)) == "Grüße\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "is not UTF-8 text"), (b"", "holds no text"), (b" \n\t", "holds no text")],
)
def test_files_that_hold_no_text(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_text(str(path))
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"the text .*none.txt cannot be read: No such file"):
        read_text(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_text(str(tmp_path))

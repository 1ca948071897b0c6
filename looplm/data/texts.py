"""A text to measure a model on: the one that ships with the package, or a file.

The shipped one is Lincoln's Gettysburg Address (1863, Bliss copy) and his Second Inaugural Address (1865), both in the
public domain. Neither is among the demo's training texts. Both are so well known that a large model has read them many
times: they tell whether a model works, not how good it is.
"""

import importlib.resources
from pathlib import Path


def read_text(path: str | None = None) -> str:
    """The text of a file, or the shipped text.

    Raises:
        ValueError: no such file, not UTF-8, or nothing but white space.
    """
    if path is None:
        return (importlib.resources.files("looplm") / "texts" / "lincoln.txt").read_text("utf-8")
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; convert it, or give another file") from None
    except OSError as error:
        raise ValueError(f"the text {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text; give a file with at least a few sentences")
    return text

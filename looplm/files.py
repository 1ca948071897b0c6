"""Files that are whole or absent: written under a temporary name beside their target, then renamed.

A reader, a crash, a full disk or an exception never meets half a file; until the rename the old one stays.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 (newlines as given) to `path`, creating its parent folders.

    Raises OSError where the folder cannot be made or written, UnicodeEncodeError for a lone surrogate;
    in both cases whatever was at `path` is untouched and nothing is left beside it.
    """
    path = Path(path)
    data = text.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path`, as `write_text` does.

    JSON has no NaN or infinity: such floats become null (`plain`). Raises TypeError for what JSON
    cannot hold.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def plain(value: Any) -> Any:
    """`value` with every NaN or infinite float in its lists and mappings replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Make what was renamed in `folder` survive a power cut (a no-op where folders cannot be opened, as on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name and put it in the place of the old one when it is whole."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def public_name(model: str) -> str:
    """The name for a card: of a hub model as it is, of a file or folder without the folders around it."""
    return Path(model).resolve().name if Path(model).exists() else model

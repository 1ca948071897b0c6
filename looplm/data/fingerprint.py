"""What prepared data depends on: the tokenizer, the source's settings and its content.

Content is known by the SHA-256 of every file. A file whose size and time of modification are those on record is not
read again, so checking terabytes takes as long as listing them. A hub data set is known by name, configuration and
split alone: that its rows are still the same is not checked.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looplm.data.encoding import Encoder
from looplm.data.sources import Source

Fingerprint = dict[str, Any]
"""JSON values: `format`, `tokenizer`, `validation_every`, `settings`, and `files` by relative name."""

FORMAT = 1
"""Raised when documents are read, split, encoded or laid out in another way than before."""
_SHOWN = 3


def fingerprint(source: Source, encoder: Encoder, validation_every: int, known: Fingerprint | None) -> Fingerprint:
    """The fingerprint of a source as it is now.

    Args:
        source: the source.
        encoder: what encodes it.
        validation_every: one document in so many is held out.
        known: an earlier fingerprint of it, which spares reading files that look unchanged.
    """
    seen: Mapping[str, Any] = known.get("files", {}) if known else {}
    files = {path.relative_to(source.root).as_posix(): path for path in source.files}
    settings = source.settings.model_dump(mode="json", exclude=None if source.settings.is_hub else {"location"})
    return {
        "format": FORMAT,
        "tokenizer": encoder.fingerprint,
        "validation_every": validation_every,
        "settings": settings,
        "files": {name: _file(path, seen.get(name)) for name, path in files.items()},
    }


def changes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What differs, in words; empty where the prepared data still fits."""
    if old.get("format") != new["format"]:
        return ["it was prepared by another version of looplm"]
    found = []
    if old["tokenizer"] != new["tokenizer"]:
        found.append("the tokenizer is another one")
    if old["validation_every"] != new["validation_every"]:
        found.append(f"validation_every was {old['validation_every']} and is {new['validation_every']}")
    settings = old["settings"].keys() | new["settings"].keys()
    for key in sorted(settings):
        before, now = old["settings"].get(key), new["settings"].get(key)
        if before != now:
            found.append(f"{key} was {before!r} and is {now!r}")
    return found + _file_changes(old["files"], new["files"])


def _file_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    files = [(name, "is new") for name in new if name not in old]
    files += [(name, "is gone") for name in old if name not in new]
    files += [(name, "changed") for name in new if name in old and new[name]["sha256"] != old[name]["sha256"]]
    shown = [f"{name} {what}" for name, what in files[:_SHOWN]]
    more = len(files) - len(shown)
    return [*shown, f"{more} more files differ"] if more else shown


def _file(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Size, time of modification in nanoseconds and hash of a file."""
    status = path.stat()
    if known and (known["bytes"], known["modified_ns"]) == (status.st_size, status.st_mtime_ns):
        return dict(known)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256": digest}

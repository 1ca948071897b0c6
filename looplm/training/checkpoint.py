"""Checkpoints on disk: whole or absent, checked before they are used, written while the training goes on.

The tensors are written by torch.distributed.checkpoint (DCP); everything else is plain JSON. A checkpoint is a folder:

    checkpoints/NAME/__0_0.distcp   tensors, one file a process
                     .metadata      DCP's table of what lies where
                     manifest.json  the plain state, whether it is a milestone, the SHA-256 of every file

It is written under a hidden name, synced, and renamed when it is whole; names sort in the order of training. While one
is being written, one staged copy of its tensors lies in main memory; it is freed afterwards.

DCP's `.metadata` is a pickle, which can run code when it is read. So checkpoints are for the run that wrote them: they
are read from the run's own folder only, after their checksums (which guard against damage, not against a forger). What
is passed on to others is the `save_pretrained` folder, which is safetensors.
"""

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from looplm.files import sync_folder, write_text

MANIFEST = "manifest.json"
_ASIDE = "damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files match their checksums.

    Attributes:
        folder: where it lies; its last part is its name.
        state: the plain values that were saved beside the tensors.
        milestone: whether it is kept for good.
    """

    folder: Path
    state: dict[str, Any]
    milestone: bool

    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor, by name."""
        table = dcp.FileSystemReader(self.folder).read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in table.items() if isinstance(entry, TensorStorageMetadata)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place; names that are only in the checkpoint are passed over.

        Raises:
            ValueError: a name that the checkpoint does not have, or of another shape.
        """
        shapes = self.shapes()
        for name, tensor in tensors.items():
            if name not in shapes:
                raise ValueError(f"checkpoint {self.folder} has no tensor {name!r}")
            if shapes[name] != tensor.shape:
                sizes = f"{tuple(shapes[name])}, not {tuple(tensor.shape)}"
                raise ValueError(f"checkpoint {self.folder}: the shape of {name!r} is {sizes}")
        _silence_single_process()
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(self.folder))


class Checkpoints:
    """The checkpoints of a run: one is written at a time, the last few and all milestones are kept.

    Args:
        folder: theirs alone; made at the first save. Leftovers of an interrupted write are removed.
        keep: how many of the newest stay, 1 or more; milestones are kept besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint has to stay")
        self.folder, self.keep = folder, keep
        self._pending: tuple[Future[Any], _Writer] | None = None
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any], milestone: bool = False) -> None:
        """Copy the tensors and write them in the background; returns when the copy is made.

        Waits for the checkpoint before this one first, so there is never more than one copy. Where the name is there
        already, nothing is done: a name stands for one moment of a run.

        Args:
            name: sorts after the names before it.
            tensors: by name; copied, so they may change at once.
            state: plain values for JSON; finite numbers only.
            milestone: keep it for good.

        Raises:
            OSError: the checkpoint *before* this one could not be written (see `wait`).
        """
        self.wait()
        if name in self.names():
            return
        writer = _Writer(self, name, state, milestone)
        _silence_single_process()
        copied = {key: tensor.detach() for key, tensor in tensors.items()}
        pending = dcp.async_save(copied, storage_writer=writer)
        assert isinstance(pending, Future)
        self._pending = pending, writer

    def wait(self) -> None:
        """Until what is being written lies on the disk.

        Raises:
            OSError: it could not be written, a full disk say. The half of it is removed, the ones before it are whole.
        """
        if self._pending is None:
            return
        (pending, writer), self._pending = self._pending, None
        try:
            pending.result()
        except (CheckpointException, Exception) as error:
            shutil.rmtree(writer.path, ignore_errors=True)
            raise self._explained(error, writer.name) from error

    def check(self) -> None:
        """Raise what `wait` would raise, if that is known already; never waits."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def names(self) -> list[str]:
        """Of the finished checkpoints, oldest first."""
        names = (path.name for path in self.folder.glob("[!.]*/"))
        return sorted(name for name in names if not name.startswith(_ASIDE))

    def remove_all(self) -> None:
        """Whole, damaged and half-written ones."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none at all.

        A damaged one is named through `note` and set aside as `damaged-NAME`.

        Raises:
            ValueError: there are checkpoints, but all of them are damaged.
        """
        for name in reversed(self.names()):
            try:
                return open_checkpoint(self.folder / name)
            except ValueError as error:
                aside = self.folder / f"{_ASIDE}{name}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / name).rename(aside)
                note(f"{error}; it is set aside as {aside.name}, the one before it is used")
        if any(self.folder.glob(f"{_ASIDE}*")):
            raise ValueError(f"no whole checkpoint is left in {self.folder}; remove that folder to start anew")
        return None

    def _finish(self, writer: "_Writer") -> None:
        """Put a written checkpoint in its place, then remove the ones that have had their day."""
        Path(writer.path).rename(self.folder / writer.name)
        sync_folder(self.folder)
        for name in self.names()[: -self.keep]:
            if not json.loads((self.folder / name / MANIFEST).read_text(encoding="utf-8"))["milestone"]:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Out of sight first, so that half a checkpoint is never met."""
        hidden = self.folder / f".old-{name}"
        (self.folder / name).rename(hidden)
        shutil.rmtree(hidden)

    def _explained(self, error: BaseException, name: str) -> BaseException:
        """What stopped a write, in words where it was the disk (DCP wraps and torch.save hides it)."""
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return error
        left = self.names()
        last = f"the last good one is {left[-1]}" if left else "there is none before it"
        reason = f"checkpoint {name} could not be written to {self.folder}: {cause.strerror}; {last}"
        return OSError(cause.errno, f"{reason}; make room and start the same command again")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the manifest of a checkpoint and compare every file with it.

    Raises:
        ValueError: a file is missing or is not what was written; names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sound = manifest.pop("digest") == _digest(manifest)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"checkpoint {folder.name} is damaged: {MANIFEST} is not what was written")
    for name, checksum in manifest["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder.name} is damaged: {name} is missing")
        if _checksum(folder / name) != checksum:
            raise ValueError(f"checkpoint {folder.name} is damaged: {name} does not match its checksum")
    return Checkpoint(folder, manifest["state"], manifest["milestone"])


class _Writer(dcp.FileSystemWriter):
    """DCP's writer into a hidden folder; when all is written it adds the manifest and puts the folder in its place."""

    def __init__(self, owner: Checkpoints, name: str, state: dict[str, Any], milestone: bool) -> None:
        super().__init__(owner.folder / f".tmp-{uuid.uuid4().hex}")
        self.owner, self.name = owner, name
        self.manifest = {"milestone": milestone, "state": json.loads(json.dumps(state, allow_nan=False))}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called once by DCP when the files of all processes have been written and synced."""
        super().finish(metadata, results)
        folder = Path(self.path)
        manifest = {**self.manifest, "files": {file.name: _checksum(file) for file in sorted(folder.iterdir())}}
        text = json.dumps({**manifest, "digest": _digest(manifest)}, indent=2, ensure_ascii=False)
        write_text(folder / MANIFEST, text + "\n")
        self.owner._finish(self)


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _silence_single_process() -> None:
    """DCP warns at every call outside `torchrun`, where one process is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

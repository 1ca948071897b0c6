"""The recipe of a number: everything that it depends on, kept with it, and what two recipes differ in.

The same checkpoint scores 62 and 79 on GSM8K in different stacks, because few-shot count, chat template and extraction
differ and none of them is printed. Every result file of looplm holds a `Recipe`; `differences` says which fields
of two of them differ and what kind each is:

    measure       how it was measured: task, data, prompts, extraction. Scores that differ here answer other questions.
    subject       what was measured: model, depth, policy, dtype. Usually what one wants to compare.
    circumstances versions, seed, batch, command line: should not matter, and is where to look when it does.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import looplm

Kind = Literal["measure", "subject", "circumstances"]
_MEASURE = (
    "task",
    "task_version",
    "data",
    "prompts",
    "num_fewshot",
    "chat_template",
    "generation",
    "metric",
    "limit",
    "settings",
)
_SUBJECT = ("model", "fingerprint", "dtype", "loops", "exit_rule", "exit_mode", "prefill", "kv_policy")
PATTERNS = ("config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template*", "*.safetensors")
"""The files of a model folder that its fingerprint covers."""


@dataclass(frozen=True)
class Recipe:
    """What a result depends on.

    Attributes:
        model: the folder's or hub name, for people; fingerprint: SHA-256 over weights, configuration and tokenizer.
        dtype: of the weights as they were run.
        loops: T of the pass; exit_rule: as it is written, None reads the last loop; exit_mode: select or freeze;
            prefill: full or adaptive; kv_policy: see `looplm.model.cache`.
        task, task_version: of lm-eval, or the file's name; data: SHA-256 over the documents.
        prompts: SHA-256 over everything that was sent to the model, in order.
        num_fewshot: examples before each question; chat_template: SHA-256 of the template, None where none was used.
        generation: stop texts, length, temperature, where text is generated.
        metric: what the score is, with the filter that extracts the answer, e.g. "exact_match,strict-match".
        limit: documents at most, None: all.
        settings: what else a study sets.
        seed: of sampling and of few-shot examples; batch_size: rows in one pass.
        versions: of looplm, lm-eval, torch, transformers.
        command: as it was typed.
    """

    model: str
    fingerprint: str
    dtype: str
    loops: int
    exit_rule: str | None = None
    exit_mode: str | None = None
    prefill: str = "full"
    kv_policy: str = "per_loop"
    task: str = ""
    task_version: str | None = None
    data: str | None = None
    prompts: str | None = None
    num_fewshot: int | None = None
    chat_template: str | None = None
    generation: Mapping[str, Any] | None = None
    metric: str | None = None
    limit: int | None = None
    settings: Mapping[str, Any] | None = None
    seed: int = 0
    batch_size: int | None = None
    versions: Mapping[str, str] | None = None
    command: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A recipe as read from JSON.

        Raises:
            ValueError: a field that is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"recipe has the unknown field {unknown[0]!r}; it was written by another looplm")
        missing = [name for name in ("model", "fingerprint", "dtype", "loops") if name not in values]
        if missing:
            raise ValueError(f"recipe has no {missing[0]!r}; it needs model, fingerprint, dtype and loops")
        return cls(**values)

    @property
    def key(self) -> str:
        """Sixteen hex digits of what the numbers depend on: all but how it was called."""
        kept = {name: value for name, value in self.as_dict().items() if name not in ("command", "model")}
        return digest(kept)[:16]


@dataclass(frozen=True)
class Difference:
    """One field that two recipes do not share."""

    field: str
    first: Any
    second: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.first)} against {_shown(self.second)}"


def differences(first: Recipe, second: Recipe) -> list[Difference]:
    """The fields in which two recipes differ, those of the measure first; fields of mappings one by one."""
    left, right = _flat(first.as_dict()), _flat(second.as_dict())
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    found = [Difference(name, left.get(name), right.get(name), _kind(name)) for name in names]
    order = ("measure", "subject", "circumstances")
    return sorted(found, key=lambda difference: order.index(difference.kind))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        elif value is not None:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _kind(name: str) -> Kind:
    top = name.partition(".")[0]
    return "measure" if top in _MEASURE else "subject" if top in _SUBJECT else "circumstances"


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else text


def digest(value: Any) -> str:
    """SHA-256 of a value of plain JSON, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str]:
    """The installed versions of what numbers depend on; lm-eval only where it is installed."""
    found = {"looplm": looplm.__version__}
    for package in ("lm-eval", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def model_title(name_or_path: str) -> str:
    """A model's name without the folders around it: of RUN/model it is RUN, of a hub model its name."""
    folder = Path(name_or_path)
    if not folder.exists():
        return name_or_path
    return folder.parent.absolute().name if folder.name == "model" else folder.absolute().name


def fingerprint_model(name_or_path: str) -> str:
    """SHA-256 over the files of a model folder (or of a hub model's local copy) that decide what it computes.

    The order of the files and where they lie do not matter, their names do.

    Raises:
        ValueError: a folder without config.json, or a hub model that is not on this machine.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name_or_path, "config.json")
        if not isinstance(cached, str):
            raise ValueError(f"{name_or_path} is no folder here and no hub model that has been downloaded")
        folder = Path(cached).parent
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_path} is not a model folder: it has no config.json")
    files = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}, key=lambda path: path.name)
    return digest({path.name: _file_digest(path) for path in files})


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prompts_digest(texts: Iterable[Any]) -> str:
    """SHA-256 over what was sent to the model, request by request in order, without holding them all."""
    total = hashlib.sha256()
    for text in texts:
        total.update(digest(text).encode())
    return total.hexdigest()

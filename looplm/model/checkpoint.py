"""What a checkpoint's files hold, read from their headers alone: names, shapes and counts against the configuration.

No weight is read, so a damaged download of any size is found in a moment.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM

RELEASED = {1_434_652_673: "Ouro 1.4B", 2_667_974_657: "Ouro 2.6B"}
"""Exact parameter counts of the released models."""

_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja"]


@dataclass(frozen=True)
class StoredWeights:
    """Shape of every stored weight, and the dtypes that occur."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: list[str]

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(map(prod, self.shapes.values()))


def local_folder(name_or_path: str) -> Path:
    """The folder itself, or that of a hub model after downloading what is needed of it.

    Raises:
        OSError: the hub cannot be reached.
    """
    folder = Path(name_or_path)
    return folder if folder.is_dir() else Path(snapshot_download(name_or_path, allow_patterns=_FILES))


def stored_weights(folder: Path) -> StoredWeights:
    """Read the headers of `model.safetensors`, or of all shards of its index.

    Raises:
        ValueError: no such files, an index that names absent ones, or a header that cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes = set()
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    piece = file.get_slice(name)
                    shapes[name] = tuple(piece.get_shape())
                    dtypes.add(piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path.name} cannot be read ({' '.join(str(error).split())}); download it again"
            ) from None
    return StoredWeights(shapes, sorted(dtypes))


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError("there is neither model.safetensors nor model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index.name} is damaged; download it again") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{', '.join(absent)} of {index.name} is missing; download it")
    return [folder / name for name in names]


def expected_shapes(config: OuroConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a model of this configuration stores; a tied head is stored once."""
    with torch.device("meta"):
        model = OuroForCausalLM(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def differences(config: OuroConfig, stored: StoredWeights) -> list[str]:
    """What is missing, unexpected or of another shape, one sentence a weight; empty where all fits."""
    expected = expected_shapes(config)
    found = dict(stored.shapes)
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some writers store a tied head twice
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            faults.append(f"{name} is {list(found[name])}, not {list(expected[name])}")
    return faults

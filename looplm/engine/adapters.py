"""LoRA at serving time: each row of a pass may wear an adapter of its own (PEFT folders, read without PEFT).

LoRA adds s B A x to a projection W x (Hu et al. 2021, section 4.1), with s = alpha / r, or alpha / sqrt(r) where it is
rank-stabilised (Kalajdzievski 2023). Every loop uses the same weights, so it is added in every loop: what comes out is
that of the weights W + s B A, which are never made. Rows with different adapters and with none share one pass: W meets
all rows at once, and each adapter's two thin products meet its own rows.

Plain LoRA on the seven projections of a layer is served. A setting that would change the arithmetic in another way is
refused by name, and so is any setting that is not known here: an adapter that is half understood gives wrong answers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from looplm.model.loading import first_line
from looplm.model.modeling import OuroForCausalLM

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
"""What an adapter may change in a layer."""

_SETTINGS = frozenset(
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora init_lora_weights "  # read below
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules "
    "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type".split()
)
"""Settings that are read here, or that say how the adapter was trained and nothing of what it computes."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base weights alone."""
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """One adapter, ready for a model.

    Attributes:
        name: what requests call it.
        factors: layer (prelude, core and coda counted through) and projection to A (r, inputs) and s B (outputs, r).
    """

    name: str
    factors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]


class Adaptation:
    """The adapters that the rows of a pass wear, and what they add.

    Args:
        worn: an adapter or None for each of R rows.
    """

    def __init__(self, worn: Sequence[Adapter | None], device: torch.device) -> None:
        self.worn, self.device = worn, device
        rows: dict[str, list[int]] = {}
        for row, adapter in enumerate(worn):
            if adapter is not None:
                rows.setdefault(adapter.name, []).append(row)
        known = {adapter.name: adapter for adapter in worn if adapter is not None}
        self._groups = [(known[name], torch.tensor(members, device=device)) for name, members in rows.items()]

    @classmethod
    def of(cls, worn: Sequence[Adapter | None], device: torch.device) -> Adaptation | None:
        """None where no row wears anything."""
        return cls(worn, device) if any(adapter is not None for adapter in worn) else None

    def add(self, name: str, x: Tensor, y: Tensor, layer: int) -> Tensor:
        """What projection `name` of `layer` gives: y (R, S, outputs) = W x of x (R, S, inputs), and s B A x by row."""
        for adapter, rows in self._groups:
            factors = adapter.factors.get((layer, name))
            if factors is not None:
                down, up = factors
                y = y.index_add(0, rows, x[rows] @ down.t() @ up.t())
        return y

    def take(self, rows: Tensor) -> Adaptation:
        """That of some rows, (n,) indices or (R,) bool."""
        places = torch.arange(len(self.worn), device=rows.device)[rows].tolist()
        return Adaptation([self.worn[place] for place in places], self.device)


def load_adapter(name: str, folder: str | PathLike[str], model: OuroForCausalLM) -> Adapter:
    """Read a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        name: what requests call it.
        model: the base model; the factors take its dtype and device.

    Raises:
        ValueError: files that are missing or damaged, settings that are not served, or weights that are not those of
            a LoRA adapter of this model.
    """
    where = f"adapter {name!r} ({folder})"
    settings, stored = _read_settings(Path(folder), where), _read_weights(Path(folder), where)
    places, factors = _places(model), {}
    for path, (down, up) in _pairs(stored, places, where).items():
        place, linear = places[path]
        rank, scale = _scale(settings, path, where)
        needed = (rank, linear.in_features), (linear.out_features, rank)
        if (tuple(down.shape), tuple(up.shape)) != needed:
            raise ValueError(
                f"{where}: {path} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, but rank {rank} on this "
                f"model takes {list(needed[0])} and {list(needed[1])}; was it trained on another base model?"
            )
        wide = torch.promote_types(model.dtype, torch.float32)
        scaled = (up.to(model.device, wide) * scale).to(model.dtype)
        factors[place] = (down.to(model.device, model.dtype), scaled)
    return Adapter(name, factors)


def _read_settings(folder: Path, where: str) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{where} has no adapter_config.json; give a folder that PEFT saved")
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: adapter_config.json cannot be read ({first_line(error)})") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise ValueError(f"{where}: peft_type is {kind!r}; the engine serves 'LORA'")
    for key, value in settings.items():
        if key not in _SETTINGS and value and value != "none":
            raise ValueError(
                f"{where}: {key} is {value!r}; the engine serves plain LoRA, without it: merge the adapter into the "
                "model (PEFT: merge_and_unload), or train without"
            )
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changes the base weights too; save it as plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion), or merge it into the model"
        )
    return settings


def _read_weights(folder: Path, where: str) -> dict[str, Tensor]:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = "only adapter_model.bin, a pickle, which is not read" if pickled else "no adapter_model.safetensors"
        raise ValueError(f"{where} has {found}; save it with PEFT as safetensors")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: adapter_model.safetensors cannot be read ({first_line(error)})") from None
    for key, weight in stored.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{where}: weight {key} is not finite; the file is damaged or its training diverged")
    return stored


def _pairs(stored: dict[str, Tensor], places: Collection[str], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of every module that is changed, to its A and B."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, weight in stored.items():
        match = _KEY.fullmatch(key)
        if match is None or match["path"] not in places:
            raise ValueError(
                f"{where} has {key}, which is not served: an adapter may change {', '.join(PROJECTIONS)} of this "
                "model's layers by plain LoRA; train without the others, or merge the adapter into the model"
            )
        factors.setdefault(match["path"], {})[match["factor"]] = weight
    for path, found in factors.items():
        if len(found) != 2:
            raise ValueError(f"{where}: {path} has lora_{next(iter(found))} alone; the file is not complete")
    if not factors:
        raise ValueError(f"{where}: adapter_model.safetensors holds no weights")
    return {path: (found["A"], found["B"]) for path, found in factors.items()}


def _places(model: OuroForCausalLM) -> dict[str, tuple[tuple[int, str], torch.nn.Linear]]:
    """Path of every projection in the model, to (layer counted through, name) and the module."""
    counts = {
        "prelude": model.config.num_prelude_layers,
        "layers": model.config.num_hidden_layers,
        "coda": model.config.num_coda_layers,
    }
    layers = [f"model.{stack}.{number}" for stack, count in counts.items() for number in range(count)]
    places = {}
    for index, layer in enumerate(layers):
        for name in PROJECTIONS:
            path = f"{layer}.{'self_attn' if name in _ATTENTION else 'mlp'}.{name}"
            places[path] = (index, name), cast("torch.nn.Linear", model.get_submodule(path))
    return places


def _scale(settings: dict[str, Any], path: str, where: str) -> tuple[int, float]:
    """Rank and s of a module."""
    rank, alpha = (
        _number(settings, name, patterns, path, where)
        for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    return int(rank), alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _number(settings: dict[str, Any], name: str, patterns: str, path: str, where: str) -> float:
    """A module's own value: patterns match the end of its path, and the first that does decides."""
    by_pattern = settings.get(patterns) or {}
    try:
        found = [value for key, value in by_pattern.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", path)]
    except (re.error, AttributeError):
        raise ValueError(f"{where}: {patterns} is {by_pattern!r}; it must map patterns to numbers") from None
    value = found[0] if found else settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{where}: {name} of {path} is {value!r}; it must be a number above 0")
    return value

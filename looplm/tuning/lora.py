"""Adapters of a looped model: which are trained, how they are kept, and how one is merged into its model.

LoRA (Hu et al. 2021) adds alpha / r B A to a projection; all loops share the projection, so they share the adapter. An
adapter is a PEFT folder, which `Engine(adapters=...)` serves as it is. Beside PEFT's files it holds `base.json`, which
tells the model it was trained on, and `gate.safetensors` where the gate was recalibrated: merging puts that gate into
the model, while the engine, which serves many adapters with one gate, uses the model's own.
"""

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from looplm.engine.adapters import load_adapter
from looplm.files import save_folder, write_json
from looplm.model.configuration import OuroConfig
from looplm.model.loading import first_line
from looplm.model.modeling import OuroForCausalLM
from looplm.tuning.recipe import PROJECTIONS, LoraSettings

BASE, GATE = "base.json", "gate.safetensors"


def adapter_config(settings: LoraSettings, config: OuroConfig) -> LoraConfig:
    """What a recipe means to PEFT.

    Raises:
        ValueError: a module that no adapter can be on.
    """
    for name in settings.target_modules:
        if name not in PROJECTIONS:
            raise ValueError(f"lora.target_modules has {name!r}{_reason(name, config)}; give {', '.join(PROJECTIONS)}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by r; a whole number is not needed
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
    )


def _reason(name: str, config: OuroConfig) -> str:
    if name not in ("lm_head", "embed_tokens"):
        return ", which is no projection of a layer"
    if config.tie_word_embeddings:
        return ", whose weight is head and embedding at once here (tie_word_embeddings): an adapter would part them"
    return ", which the loss and the engine read without adapters, so that one would never be trained"


def keep_adapter(folder: Path, tuned: PeftModel, base: str, base_digest: str) -> None:
    """Write what `merge_adapter` needs, under a temporary name and renamed, and merge the adapter into its model.

    Args:
        base: folder or hub name of the model it was trained on.
        base_digest: `weights_digest` of that model.
    """

    def write(place: Path) -> None:
        tuned.save_pretrained(str(place))
        write_json(place / BASE, {"model": base, "weights_sha256": base_digest})

    save_folder(folder, write)
    tuned.merge_and_unload()


def save_gate(folder: Path, gate: Mapping[str, Tensor]) -> None:
    """Put a gate, weight (1, D) and bias (1,), into an adapter folder."""
    temporary = folder / f".tmp-{GATE}"
    save_file({name: tensor.contiguous() for name, tensor in gate.items()}, temporary)
    temporary.rename(folder / GATE)


def base_of(folder: str | PathLike[str]) -> str:
    """Folder or hub name of the model an adapter was trained on, as PEFT recorded it.

    Raises:
        ValueError: no adapter there, or one that does not say.
    """
    file = Path(folder) / "adapter_config.json"
    try:
        base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        reason = f"{file.name} cannot be read ({first_line(error)})"
        raise ValueError(f"{folder} is no adapter that PEFT saved: {reason}") from None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder} does not say which model it was trained on; give it with --model")
    return base


def merge_adapter(folder: str | PathLike[str], model: OuroForCausalLM) -> OuroForCausalLM:
    """The model with an adapter's weights added to its own, in place: W + s B A; and with the adapter's gate.

    Raises:
        ValueError: files that are missing or damaged, or an adapter that was trained on another model.
    """
    folder = Path(folder)
    load_adapter(folder.name, folder, model)  # refuses what is not plain LoRA of this model's shape, by name
    record = folder / BASE
    if record.is_file():
        trained_on = json.loads(record.read_text("utf-8"))
        if trained_on["weights_sha256"] != weights_digest(model):
            raise ValueError(
                f"adapter {folder} was trained on other weights than these; merge it into {trained_on['model']}"
            )
    merged: OuroForCausalLM = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    if (folder / GATE).is_file():
        try:
            merged.model.early_exit_gate.load_state_dict(load_file(folder / GATE))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"adapter {folder}: {GATE} cannot be used ({first_line(error)})") from None
    return merged.eval()


@torch.no_grad()
def weights_digest(model: OuroForCausalLM) -> str:
    """SHA-256 of all weights but the gate's: a recalibrated gate makes no other model for an adapter."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if ".early_exit_gate." not in name:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

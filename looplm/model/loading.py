"""Loading a model folder for use: strict about names, shapes and numbers, with errors a person can act on."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM


def load_model(name_or_path: str, dtype: torch.dtype | None = None) -> tuple[OuroForCausalLM, PreTrainedTokenizerBase]:
    """A looped model and its tokenizer from a `save_pretrained` folder or the hub, in evaluation mode.

    Args:
        dtype: the saved one by default.

    Raises:
        ValueError: no such model, not a looped model, missing or unexpected weights, or a weight that is not finite.
    """
    config = load_config(name_or_path)
    quiet = logging.getLogger("transformers.modeling_utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # its table of missing keys is said in one line below
    try:
        loaded: Any = OuroForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype or config.dtype or torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
        model, report = cast("tuple[OuroForCausalLM, dict[str, Any]]", loaded)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{name_or_path} is not a complete model folder: {first_line(error)}") from None
    finally:
        quiet.setLevel(level)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            names = sorted(key if isinstance(key, str) else key[0] for key in report[fault])
            raise ValueError(
                f"{name_or_path}: the weights do not fit config.json, {fault.replace('_', ' ')}: "
                f"{', '.join(names[:3])} ({len(names)} in all); use the files of one and the same model"
            )
    for name, weight in model.named_parameters():
        low, high = weight.detach().aminmax()  # a NaN shows in both; no copy is made, as isfinite would
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                f"{name_or_path}: weight {name} holds NaN or infinity; "
                "the file is damaged or its training diverged: take another copy or an earlier save"
            )
    return model.eval(), _tokenizer(name_or_path)


def _tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise ValueError(
            f"{name_or_path} has no tokenizer that can be read: save one there with save_pretrained "
            f"({first_line(error).rstrip(': ')})"
        ) from None


def load_config(name_or_path: str) -> OuroConfig:
    """The configuration of a model folder or hub name; ValueError where there is none, or none of a looped model."""
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_path} is not a model folder: it has no config.json")
    if folder.is_file():
        raise ValueError(f"{name_or_path} is a file; give the model folder that holds config.json")
    if not folder.exists() and name_or_path.count("/") != 1:
        raise ValueError(f"no such model: {name_or_path} is no folder here, and a hub name has the form OWNER/NAME")
    try:
        values, _ = OuroConfig.get_config_dict(name_or_path)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if folder.is_dir():
            raise ValueError(f"{name_or_path}/config.json cannot be read: {first_line(error)}") from None
        raise ValueError(f"no such model: {name_or_path} is neither a folder here nor reachable on the hub") from error
    if not isinstance(values, dict) or values.get("model_type") != "ouro":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{name_or_path} is a {kind!r} model; looplm runs 'ouro' models")
    try:
        return OuroConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two from fields that transformers reads
        raise ValueError(f"{name_or_path}/config.json: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

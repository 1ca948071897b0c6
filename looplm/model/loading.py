"""Loading a model folder for use: strict about names, shapes and numbers, with errors a person can act on."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
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
    config = _config(name_or_path)
    quiet = logging.getLogger("transformers.modeling_utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # its table of missing keys is said in one line below
    try:
        loaded: Any = OuroForCausalLM.from_pretrained(
            name_or_path, config=config, dtype=dtype or config.dtype or torch.float32, output_loading_info=True
        )
        model, report = cast("tuple[OuroForCausalLM, dict[str, Any]]", loaded)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{name_or_path} is not a complete model folder: {_first_line(error)}") from None
    finally:
        quiet.setLevel(level)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            names = sorted(str(key) for key in report[fault])
            raise ValueError(
                f"{name_or_path} has {fault.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)} in all)"
            )
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name_or_path}: weight {name} holds NaN or infinity; the file is damaged or diverged")
    return model.eval(), tokenizer


def _config(name_or_path: str) -> OuroConfig:
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_path} is not a model folder: it has no config.json")
    if not folder.exists() and name_or_path.count("/") != 1:
        raise ValueError(f"no such model: {name_or_path} is no folder here, and a hub name has the form OWNER/NAME")
    try:
        values, _ = OuroConfig.get_config_dict(name_or_path)
        if values.get("model_type") != "ouro":
            raise ValueError(f"{name_or_path} is a {values.get('model_type')!r} model; looplm runs 'ouro' models")
        return OuroConfig.from_dict(values)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"no such model: {name_or_path} is neither a folder here nor reachable on the hub") from error
    except StrictDataclassError as error:
        raise ValueError(f"{name_or_path}/config.json: {_first_line(error.__cause__ or error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""looplm: the toolkit for looped language models, with one meaning of depth from training to the served answer.

`import looplm` makes transformers' Auto classes know `ouro` models without remote code, and costs nothing until they
are used (see `looplm.registration`). The public names below are loaded on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from looplm.registration import register_with_transformers

if TYPE_CHECKING:
    from looplm.engine.engine import Engine
    from looplm.engine.sampling import SamplingParams
    from looplm.exits import ExitRule
    from looplm.model.configuration import OuroConfig
    from looplm.model.modeling import OuroForCausalLM
    from looplm.model.stack import OuroModel

__version__ = "0.1.0"

_HOMES = {
    "Engine": "looplm.engine.engine",
    "ExitRule": "looplm.exits",
    "OuroConfig": "looplm.model.configuration",
    "OuroForCausalLM": "looplm.model.modeling",
    "OuroModel": "looplm.model.stack",
    "SamplingParams": "looplm.engine.sampling",
}

__all__ = ["Engine", "ExitRule", "OuroConfig", "OuroForCausalLM", "OuroModel", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'looplm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


register_with_transformers()

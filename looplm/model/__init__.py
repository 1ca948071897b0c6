"""The looped model: configuration, layers, cache, modelling and generation (Ouro sections 3 and 4.1).

The functions that look inside are loaded on first use (PEP 562): importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looplm.model.hooks import loop_hook
    from looplm.model.patching import patch
    from looplm.model.tracing import trace

_HOMES = {
    "loop_hook": "looplm.model.hooks",
    "patch": "looplm.model.patching",
    "trace": "looplm.model.tracing",
}

__all__ = ["loop_hook", "patch", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'looplm.model' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)

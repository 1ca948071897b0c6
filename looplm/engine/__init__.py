"""The engine: continuous depth batching, exact (design: every tick is one pass over rows at whatever loop each is in).

The public names are loaded on first use (PEP 562): importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looplm.engine.engine import Engine
    from looplm.engine.sampling import SamplingParams
    from looplm.engine.sequence import Completion
    from looplm.engine.streaming import AsyncEngine, Piece

_HOMES = {
    "AsyncEngine": "looplm.engine.streaming",
    "Completion": "looplm.engine.sequence",
    "Engine": "looplm.engine.engine",
    "Piece": "looplm.engine.streaming",
    "SamplingParams": "looplm.engine.sampling",
}

__all__ = ["AsyncEngine", "Completion", "Engine", "Piece", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'looplm.engine' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)

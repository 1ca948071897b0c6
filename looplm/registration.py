"""Makes transformers' Auto classes know `ouro`, whichever of the two packages is imported first.

Registering needs the classes, and the classes need torch and transformers: seconds that `looplm --help` must not
cost. So the Auto module is watched instead: if transformers has loaded it already, the classes are registered at
once; if not, they are registered the moment it is loaded (our modules register their own classes when imported, so
an import that is already under way simply finishes). Nothing else of the import system is touched.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_WATCHED = {
    "transformers.models.auto.configuration_auto": "looplm.model.configuration",
    "transformers.models.auto.modeling_auto": "looplm.model.modeling",
}
"""Module of transformers -> module of ours that registers its classes there as its last act."""


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(_WATCHED[module.__name__])


class _AutoWatcher(MetaPathFinder):
    """Hands the Auto modules to `_RegisteringLoader`, each once."""

    def __init__(self) -> None:
        self.waiting = set(_WATCHED)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now what is loaded, and the rest when it is; calling it again changes nothing."""
    for name, ours in _WATCHED.items():
        if name in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, _AutoWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoWatcher())

"""The start-up hook: when mergekit is imported, install the plugin. Nothing else, and never an error.

It runs at the start of every interpreter of the environment, so it imports nothing that is not
loaded already and only adds one finder. `MERGEKIT_MEDIATOR_AUTOLOAD=0` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # importing `typing` for it would take longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Which function of `plugin` completes which module of mergekit, once that module has been executed.
_HOOKS = {
    "mergekit.merge_methods": "register_methods",
    "mergekit.merge": "take_over_run_merge",
}


class _Finder:
    """A meta path finder that wraps the loaders of the modules in `_HOOKS` and finds nothing else."""

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if name not in _HOOKS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, _HOOKS[name])  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The module's own loader, followed by one function of the plugin."""

    def __init__(self, loader: "Loader", hook: str) -> None:
        self._loader, self._hook = loader, hook

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        self._loader.exec_module(module)
        try:
            from mergekit_mediator.merge import plugin

            getattr(plugin, self._hook)(module)
        except Exception as error:  # noqa: BLE001 (other merge methods must go on working)
            import warnings

            warnings.warn(
                f"mergekit-mediator could not be loaded, so `merge_method: mediator` is missing: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def install() -> None:
    """Add the finder once, unless the environment switches it off; complete what is loaded already."""
    if os.environ.get("MERGEKIT_MEDIATOR_AUTOLOAD") == "0":
        return
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

"""The start-up hook, which installs the plugin when mergekit is imported. It never raises.

Python runs the hook at the start of every interpreter of the environment. So the hook imports only modules
that Python has loaded already, and adds one finder. `MERGEKIT_MEDIATOR_AUTOLOAD=0` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # an import of `typing` would take longer than the whole hook
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# By module of mergekit, the function of `plugin` that runs after the module has been executed.
_HOOKS = {
    "mergekit.merge_methods": "register_methods",
    "mergekit.merge": "take_over_run_merge",
}


class _Finder:
    """A meta path finder that wraps the loaders of the modules in `_HOOKS` and finds no other module."""

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
    """A loader that runs the module's own loader, then one function of the plugin."""

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
        except Exception as error:  # noqa: BLE001 (the other merge methods must still work)
            import warnings

            warnings.warn(
                f"mergekit-mediator could not be loaded, so `merge_method: mediator` is missing: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def install() -> None:
    """Add the finder once, unless the environment variable switches it off."""
    if os.environ.get("MERGEKIT_MEDIATOR_AUTOLOAD") == "0":
        return
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

"""The remote code of an artifact: two small files that call this package.

With `trust_remote_code=True`, `modeling_mediator.py` makes AutoModelForCausalLM load the routed model,
and `custom_generate/generate.py` routes generation in tools that load the stock class by its name.
"""

import json
from pathlib import Path
from typing import Any

MODELING = "modeling_mediator.py"
_NOTICE = '"""Needs `pip install mergekit-mediator`."""\n\n'
_MODELING_CODE = (
    _NOTICE
    + 'from mergekit_mediator.remote import RoutedCausalLM\n\n__all__ = ["RoutedCausalLM"]\n'
)
_GENERATE_CODE = (
    _NOTICE + 'from mergekit_mediator.remote import generate\n\n__all__ = ["generate"]\n'
)


def is_ours(reference: object) -> bool:
    """Tell whether an entry of `auto_map` names this remote code.

    Args:
        reference: `module.Class` or `repository--module.Class`.
    """
    return str(reference).rpartition("--")[2].startswith(MODELING.removesuffix("py"))


def own_modules(root: Path) -> list[str]:
    """Return the modules of a checkpoint's own code that its configuration and its tokenizer name.

    Modules of this package's remote code, and names that are no Python identifier (such as modules of another
    repository), are left out.

    Args:
        root: the directory of the checkpoint.
    """
    references: list[Any] = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the file is missing or damaged, so it names no module
            continue
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        for entry in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
            references += entry if isinstance(entry, list) else [entry]
    modules = {str(r).split(".")[0] for r in references if r is not None and not is_ours(r)}
    return sorted(module for module in modules if module.isidentifier())


def write_remote_code(root: Path) -> None:
    """Write the remote code of an artifact, and name it in its `config.json`.

    The architecture stays the stock one. A base model with remote code of its own keeps that code, so that
    `AutoModelForCausalLM` loads the dense expert; `generate` routes nevertheless.

    Args:
        root: the directory of the artifact, which holds its `config.json`.
    """
    (root / "custom_generate").mkdir(exist_ok=True)
    (root / "custom_generate" / "generate.py").write_text(_GENERATE_CODE, encoding="utf-8")
    path = root / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "AutoModelForCausalLM" in config.get("auto_map", {}):
        return
    (root / MODELING).write_text(_MODELING_CODE, encoding="utf-8")
    auto_map = {
        **config.get("auto_map", {}),
        "AutoModelForCausalLM": "modeling_mediator.RoutedCausalLM",
    }
    text = json.dumps({**config, "auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")

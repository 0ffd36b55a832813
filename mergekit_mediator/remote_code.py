"""The remote code of an artifact: two small files that hand over to this package.

With `trust_remote_code=True`, `modeling_mediator.py` makes AutoModelForCausalLM load the routed model,
and `custom_generate/generate.py` routes generation in tools that load a stock class by its name.
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
    """Whether an entry of `auto_map`, `module.Class` or `repository--module.Class`, names this remote code."""
    return str(reference).rpartition("--")[2].startswith(MODELING.removesuffix("py"))


def own_modules(root: Path) -> list[str]:
    """The modules of a checkpoint's own code that its configuration and its tokenizer name, if they are to be
    beside them."""
    references: list[Any] = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no tokenizer, or one that names nothing
            continue
        named = content.get("auto_map") if isinstance(content, dict) else None
        for entry in named.values() if isinstance(named, dict) else [named]:
            references += entry if isinstance(entry, list) else [entry]
    modules = {str(r).split(".")[0] for r in references if r is not None and not is_ours(r)}
    return sorted(module for module in modules if module.isidentifier())


def write_remote_code(root: Path) -> None:
    """Write the remote code of an artifact, and name it in its `config.json`.

    The architecture stays the stock one. A base model with remote code of its own keeps it, so that
    `AutoModelForCausalLM` gives the dense expert there; generation is routed all the same.
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

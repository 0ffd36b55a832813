"""The remote code of an artifact: two small files that hand over to this package.

With `trust_remote_code=True`, `modeling_mediator.py` makes AutoModelForCausalLM load the routed model,
and `custom_generate/generate.py` routes generation in tools that load a stock class by its name.
"""

import json
from pathlib import Path

MODELING = "modeling_mediator.py"
_NOTICE = '"""Needs `pip install mergekit-mediator`."""\n\n'
_MODELING_CODE = (
    _NOTICE
    + 'from mergekit_mediator.remote import RoutedCausalLM\n\n__all__ = ["RoutedCausalLM"]\n'
)
_GENERATE_CODE = (
    _NOTICE + 'from mergekit_mediator.remote import generate\n\n__all__ = ["generate"]\n'
)


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

"""A base model and its experts on disk, and merge configurations of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Family:
    """A base model and its experts on disk."""

    base: Path
    experts: dict[str, Path]

    def config(self, method: str = "mediator", **settings: Any) -> dict[str, Any]:
        """A merge configuration of all of them; parameters that are no top-level key go to `parameters`.

        The method of the paper is the default here: small models hardly tell what `keep` predicts.
        """
        if method == "mediator" and not settings.keys() & _STORAGE_OR_LAYERS:
            settings["route"] = "auto"
        top = {k: settings.pop(k) for k in list(settings) if k in _TOP_LEVEL}
        models = [
            {"model": str(path), "parameters": {"expert": name}}
            if method == "mediator"
            else {"model": str(path)}
            for name, path in self.experts.items()
        ]
        config = {"merge_method": method, "base_model": str(self.base), "models": models}
        return {**config, "parameters": settings, **top}


_STORAGE_OR_LAYERS = {"density", "values", "bits", "budget", "rank", "keep", "route"} | {
    "conflict_threshold",
    "routed_fraction",
    "routed_layers",
}
_TOP_LEVEL = {"models", "slices", "modules", "base_model", "tokenizer", "dtype", "out_dtype"}


def make_family(root: Path, *args: Any, **options: Any) -> Family:
    paths = pico.save_family(root, *args, **options)
    return Family(paths.pop("base"), paths)


def linear_only(family: Family) -> Family:
    """Give the experts of a family the base's embeddings and norms, so that linear layers alone differ."""
    (file,) = family.base.glob("*.safetensors")
    base = load_file(file)
    for expert in family.experts.values():
        weights = load_file(expert / file.name)
        kept = {n: w if "_proj" in n or "lm_head" in n else base[n] for n, w in weights.items()}
        save_file(kept, expert / file.name, {"format": "pt"})
    return family

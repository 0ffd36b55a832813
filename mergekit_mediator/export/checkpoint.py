"""A plain checkpoint of one expert, of a blend, or of the dense expert with some weights blended, for any tool."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.new_folder import new_folder
from mergekit_mediator.remote_code import MODELING, is_ours
from mergekit_mediator.store.manifest import CONFIG_SOURCE

_OF_THE_ARTIFACT = (MODELING, CONFIG_SOURCE)


def export_checkpoint(
    experts: StoredExperts,
    mixture: Mapping[str, float],
    out: Path,
    only: Collection[str] | None = None,
) -> int:
    """Write the model that a mixture makes, with tokenizer and configuration, as an ordinary checkpoint.

    Its weights are those of the served mixture, bit for bit. One file of weights is in memory at a time.

    Args:
        experts: the experts of an artifact whose files are verified, relative to its dense expert.
        mixture: the weights by expert, above 0.
        out: a folder that is absent or empty; it appears when the checkpoint is whole.
        only: the names of the weights that the mixture changes; None for all. The other weights are the dense
            expert's.

    Returns:
        The bytes of the checkpoint.

    Raises:
        ExportError: an expert is unknown, the experts are relative to the base, or the folder is not empty
            or cannot be written.
    """
    if experts.reference != "dense":
        raise ExportError("a checkpoint is made of the dense expert: relative to dense required")
    experts.check_names(mixture)
    changed = set(experts.weights if only is None else only)
    with new_folder(out) as folder:
        for name in experts.manifest.files:
            if "/" in name or name in _OF_THE_ARTIFACT:
                continue
            source = experts.root / name
            if name == "config.json":
                (folder / name).write_text(_stock_config(source), encoding="utf-8")
            elif name.endswith(".safetensors"):
                _write_weights(source, folder / name, experts, mixture, changed)
            else:
                shutil.copyfile(source, folder / name)
        return sum(path.stat().st_size for path in folder.iterdir())


def _write_weights(
    source: Path,
    target: Path,
    experts: StoredExperts,
    mixture: Mapping[str, float],
    changed: set[str],
) -> None:
    """Write one file of weights with the mixture in place in the weights of these names."""
    with safe_open(source, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in changed.intersection(weights):
        parts = experts.change(name, mixture).parts
        if parts:
            mix_(weights[name], parts)
    save_file(weights, target, metadata)


def _stock_config(path: Path) -> str:
    """The configuration without this package's remote code, which would look for experts."""
    config = json.loads(path.read_text(encoding="utf-8"))
    references = config.pop("auto_map", {})
    others = {name: entry for name, entry in references.items() if not is_ours(entry)}
    return json.dumps({**config, **({"auto_map": others} if others else {})}, indent=2) + "\n"

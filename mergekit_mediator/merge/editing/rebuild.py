"""Merge the original models of an artifact again without one expert."""

from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_mediator.errors import ConfigError, EditError
from mergekit_mediator.merge import plugin
from mergekit_mediator.merge.checkpoint import source_of
from mergekit_mediator.merge.editing.workspace import Edited, change
from mergekit_mediator.merge.low_rank_methods import as_mediator
from mergekit_mediator.merge.run import run
from mergekit_mediator.models.sources import is_hub_id
from mergekit_mediator.store.manifest import CONFIG_SOURCE, ExpertEntry, Manifest, read_manifest
from mergekit_mediator.store.verification import verify_files


def rebuild_without(
    out: Path, name: str, *, base: Path | None = None, trust_remote_code: bool = False
) -> Edited:
    """Merge again as the artifact's configuration says, with the present experts but one.

    Present experts are those of the manifest: experts that were added take part in the average now. The
    artifact stays as it is until the new one takes its place in one step. A calibrated router goes.

    Args:
        out: the artifact's directory.
        name: the expert that is left out.
        base: the directory of the base model; by default where the manifest says.
        trust_remote_code: let the models' own code run.

    Returns:
        The manifest of the new artifact, and the change.

    Raises:
        EditError: there is no such expert or no other one, the artifact has no configuration of a merge of whole
            models, or a model is not on this machine.
        ConfigError: see `merge.run.run`.
        InputError: see `merge.run.run`.
        ArtifactError: the artifact does not verify.
        OutputError: the artifact cannot be written. After any error it is as before.
    """
    manifest = read_manifest(out)
    verify_files(out, manifest)
    if name not in manifest.expert_names:
        names = ", ".join(manifest.expert_names)
        raise EditError(f"{out}: has no expert {name!r}: name one of {names}")
    left = [entry for entry in manifest.experts if entry.name != name]
    if not left:
        raise EditError(f"{out}: {name} is the last expert, and an artifact has at least one")
    config = _configuration(out, manifest, left, base)
    router = " and the calibrated router is gone" if manifest.router is not None else ""
    note = f"expert {name} was removed, and the other models were merged again: nothing holds it{router}"
    rebuilt = change("rebuild", name, note)
    plugin.install()
    try:
        merge_config = MergeConfiguration.model_validate(config)
    except (ValidationError, RuntimeError) as error:
        raise ConfigError(f"{out / CONFIG_SOURCE}: {' '.join(str(error).split())}") from error
    result = run(
        as_mediator(merge_config),
        str(out),
        MergeOptions(trust_remote_code=trust_remote_code),
        yaml.safe_dump(config, sort_keys=False),
        overwrite=True,
        history=(*manifest.history, rebuilt),
    )
    return Edited(result, (rebuilt,))


def _configuration(
    out: Path, manifest: Manifest, left: list[ExpertEntry], base: Path | None
) -> dict[str, Any]:
    """Make the configuration of the merge of the remaining experts.

    Raises:
        EditError: see `rebuild_without`.
    """
    path = out / CONFIG_SOURCE
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(config, dict) or not isinstance(config.get("models"), list):
        raise EditError(
            f"{path}: a configuration with `models` required, and no slices: merge again by hand"
        )
    if base is not None:
        config["base_model"] = str(base)
    entries = {_source(entry["model"]): entry for entry in config["models"]}
    base_source = _source(config["base_model"])
    models = [entries[base_source]] if base_source in entries else []
    for expert in left:
        entry = entries.get(expert.source, {"model": _reference(expert)})
        models.append(
            {**entry, "parameters": {**(entry.get("parameters") or {}), "expert": expert.name}}
        )
    for source in (base_source, *(expert.source for expert in left)):
        for part in source.split("+"):
            if not Path(part).is_dir() and not is_hub_id(part):
                raise EditError(
                    f"{part}: is not on this machine, and a rebuild reads all models of the merge: bring it there, "
                    "or leave out --rebuild"
                )
    return {**config, "models": models}


def _source(model: Any) -> str:
    return source_of(ModelReference.model_validate(model))


def _reference(expert: ExpertEntry) -> str:
    """The model of an expert that was added after the merge, with its revision."""
    return expert.source if expert.revision is None else f"{expert.source}@{expert.revision}"

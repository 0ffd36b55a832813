"""The files of an artifact besides weights: configuration, tokenizer, card and manifest."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mergekit.merge
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from tqdm import tqdm
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils.hub import cached_file

from mergekit_mediator import __version__
from mergekit_mediator.errors import first_line
from mergekit_mediator.merge.card import write_card
from mergekit_mediator.merge.experts.forms import Forms
from mergekit_mediator.merge.experts.keep import Kept
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.layers import LayerPlan
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.model_cards import license_of
from mergekit_mediator.remote_code import own_modules, write_remote_code
from mergekit_mediator.store.digests import FileDigest, digests
from mergekit_mediator.store.manifest import (
    CONFIG_SOURCE,
    FORMAT_VERSION,
    BaseEntry,
    Change,
    ExpertEntry,
    LayerEntry,
    Manifest,
    Tuned,
    vouched_for,
)


@dataclass(frozen=True)
class Merged:
    """The results of a merge's passes that the manifest states.

    Attributes:
        layers: the plans of the layers in order, all decided.
        parameter_count: the number of the dense expert's parameters.
        base_digests: the digest of each weight file of the base model by name.
        slopes: the slope of each expert, see `experts.budget.slopes_for`; empty without `bits` or `budget`.
        tuned: the figures of each tuned expert by name.
        kept: the part of its gain that each expert keeps, by name; may be empty.
        forms: the form of each expert that has a slope.
    """

    layers: Sequence[LayerPlan]
    parameter_count: int
    base_digests: Mapping[str, FileDigest]
    slopes: Mapping[ModelReference, float]
    tuned: Mapping[str, Tuned]
    kept: Mapping[str, Kept]
    forms: Forms


def write_model_files(inputs: OpenInputs, merge_config: MergeConfiguration, out: Path) -> None:
    """Write the configuration, the tokenizer and the files that go with them, by mergekit's own code.

    Args:
        inputs: the models.
        merge_config: the configuration of the merge.
        out: the directory of the artifact.
    """
    built, options = inputs.build_tokenizer(), inputs.options
    if built is not None:
        pad = merge_config.tokenizer.pad_to_multiple_of if merge_config.tokenizer else None
        mergekit.merge._update_config_vocab(
            inputs.out_config, inputs.architecture, built.tokenizer, pad_to_multiple_of=pad
        )
    write_config(inputs, out)
    if built is not None:
        mergekit.merge._set_chat_template(built.tokenizer, merge_config, options.trust_remote_code)
        built.tokenizer.save_pretrained(out)
    elif options.copy_tokenizer:
        try:
            mergekit.merge._copy_tokenizer(merge_config, str(out), options=options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the system, such as a full disk; errors of transformers have no number
            tqdm.write(
                f"warning: no tokenizer copied from {inputs.base}: {first_line(error)}: "
                "the merge goes on without a tokenizer: copy one into the output"
            )
    files = inputs.architecture.tagalong_files or []
    mergekit.merge._copy_tagalong_files(merge_config, str(out), files=files, options=options)
    _copy_code(inputs.base.model, out)


def write_config(inputs: Inputs, out: Path) -> None:
    """Write `config.json` and the remote code that it names."""
    inputs.out_config.save_pretrained(out)
    write_remote_code(out)


def _copy_code(base: ModelPath, out: Path) -> None:
    """Copy the modules that the configuration and the tokenizer name from the base, without running them.

    mergekit copies no modules, and transformers copies those of the configuration alone. A module that the
    base lacks is skipped.
    """
    modules = own_modules(out)
    while modules:
        name = f"{modules.pop()}.py"
        if not (out / name).exists():
            try:
                source = str(cached_file(base.path, name, revision=base.revision))
            except OSError:
                continue
            shutil.copyfile(source, out / name)
            modules += [name for name in get_relative_imports(source) if name.isidentifier()]


def digest_base(inputs: OpenInputs) -> dict[str, FileDigest]:
    """Compute the digests of the base model's weight files by name."""
    root = inputs.base_directory()
    files = [p.name for pattern in ("*.safetensors", "*.bin") for p in root.glob(pattern)]
    return digests(root, sorted(files))


def describe(
    inputs: Inputs,
    merge_config: MergeConfiguration,
    config_source: str | None,
    merged: Merged,
    out: Path,
    history: Sequence[Change] = (),
) -> Manifest:
    """Write the card and the configuration's text, and describe the whole artifact.

    Args:
        inputs: the models.
        merge_config: the configuration of the merge.
        config_source: the text of the configuration; None to write it from `merge_config`.
        merged: the results of the passes.
        out: the directory of the artifact, complete but for card, configuration and manifest.
        history: the changes of the artifact that this merge replaces, and the merge itself as one of them.

    Returns:
        The manifest, with the digests of the files in `out`.
    """
    parameters = _parameters(merge_config, inputs)
    if merged.slopes:
        names = inputs.config.experts
        parameters["slopes"] = {names[model]: slope for model, slope in merged.slopes.items()}
        parameters["forms"] = {names[model]: form for model, form in merged.forms.items()}
    if merged.kept:
        parameters["kept"] = {name: asdict(kept) for name, kept in merged.kept.items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        package_version=__version__,
        base=BaseEntry(
            source=str(inputs.base.model.path),
            revision=inputs.base.model.revision,
            license=license_of(str(inputs.base.model.path), inputs.base.model.revision),
            files=dict(merged.base_digests),
        ),
        experts=tuple(
            _expert(merge_config, model, name, merged.tuned.get(name))
            for model, name in inputs.config.experts.items()
        ),
        layers=tuple(
            LayerEntry(name=p.name, weights=p.weights, conflict=p.metrics, routed=bool(p.routed))
            for p in merged.layers
        ),
        parameters=parameters,
        parameter_count=merged.parameter_count,
        files={},
        history=tuple(history),
    )
    source = config_source or merge_config.to_yaml()
    (out / CONFIG_SOURCE).write_text(source, encoding="utf-8")
    manifest = manifest.model_copy(update={"files": digests(out, vouched_for(out))})
    if inputs.options.write_model_card:
        files = [given for given in inputs.config.prompts.values() if isinstance(given, str)]
        write_card(out, manifest, source, files)
    return manifest


def _expert(
    config: MergeConfiguration, model: ModelReference, name: str, tuned: Tuned | None
) -> ExpertEntry:
    source = model.lora or model.model
    return ExpertEntry(
        name=name,
        source=source_of(model),
        revision=source.revision,
        license=license_of(str(source.path), source.revision),
        weight=_setting(config, model, "weight", 1.0),
        file=f"experts/{name}.safetensors",
        tuned=tuned,
    )


def source_of(model: ModelReference) -> str:
    """Give the model's name as the user wrote it, without revisions: the manifest has a field for these."""
    return f"{model.model.path}+{model.lora.path}" if model.lora else f"{model.model.path}"


def _setting(config: MergeConfiguration, model: ModelReference, name: str, default: Any) -> Any:
    """Find a parameter of one model in the configuration: a number, a gradient or a filter."""
    for entry in config.models or []:
        if entry.model == model and name in (entry.parameters or {}):
            value = entry.parameters[name]
            return value.model_dump() if hasattr(value, "model_dump") else value
    return default


def _parameters(config: MergeConfiguration, inputs: Inputs) -> dict[str, Any]:
    """Collect the parameters of the whole merge with their defaults, as plain values."""
    hidden = {"experts", "prompts", "base_model", "storage_given"}
    settings = inputs.config.model_dump(exclude=hidden, exclude_none=True)
    selection = inputs.config.selection
    if selection.rule != settings["route"]:
        settings.pop("route")
    if selection.rule == "routed_fraction":
        settings["routed_by"] = settings["conflict"] if selection.by_conflict else "place"
    parameters = config.model_dump(mode="json", include={"parameters"}).get("parameters") or {}
    return {"density": 0.1, "lambda": 1.0, **parameters, **settings}

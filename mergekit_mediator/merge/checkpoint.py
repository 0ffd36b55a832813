"""Everything of an artifact but its weights: configuration, tokenizer, card, and the manifest."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from mergekit_mediator.merge.card import license_of, write_card
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.layers import LayerPlan
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.remote_code import own_modules, write_remote_code
from mergekit_mediator.store.manifest import (
    CONFIG_SOURCE,
    FORMAT_VERSION,
    BaseEntry,
    ExpertEntry,
    FileDigest,
    LayerEntry,
    Manifest,
    Tuned,
    digests,
    vouched_for,
)


@dataclass(frozen=True)
class Merged:
    """What the passes of a merge found out, for its manifest.

    Attributes:
        layers: in order, decided.
        parameter_count: of the dense expert.
        base_digests: by file of the base model.
        slopes: by expert, see `budget.slopes_for`; empty where experts are stored without `bits` or `budget`.
        tuned: by the name of each expert that was tuned.
    """

    layers: Sequence[LayerPlan]
    parameter_count: int
    base_digests: Mapping[str, FileDigest]
    slopes: Mapping[ModelReference, float]
    tuned: Mapping[str, Tuned]


def write_model_files(inputs: OpenInputs, merge_config: MergeConfiguration, out: Path) -> None:
    """Configuration, tokenizer and the files that go along with them, all by mergekit's own code."""
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
                raise  # of the system, such as a full disk; transformers' own have no number
            tqdm.write(
                f"warning: no tokenizer copied from {inputs.base}: {first_line(error)}: "
                "the merge goes on without, copy one from elsewhere"
            )
    files = inputs.architecture.tagalong_files or []
    mergekit.merge._copy_tagalong_files(merge_config, str(out), files=files, options=options)
    _copy_code(inputs.base.model, out)


def write_config(inputs: Inputs, out: Path) -> None:
    """`config.json`, with the remote code that it names."""
    inputs.out_config.save_pretrained(out)
    write_remote_code(out)


def _copy_code(base: ModelPath, out: Path) -> None:
    """Copy the modules that configuration and tokenizer name from the base; nothing of them runs here.

    mergekit copies none, and transformers only that of the configuration. What the base lacks itself is
    left out.
    """
    wanted = own_modules(out)
    while wanted:
        name = f"{wanted.pop()}.py"
        if not (out / name).exists():
            try:
                found = str(cached_file(base.path, name, revision=base.revision))
            except OSError:
                continue
            shutil.copyfile(found, out / name)
            wanted += [module for module in get_relative_imports(found) if module.isidentifier()]


def digest_base(inputs: OpenInputs) -> dict[str, FileDigest]:
    """The digests of the base model's weight files."""
    root = inputs.base_directory()
    files = [p.name for pattern in ("*.safetensors", "*.bin") for p in root.glob(pattern)]
    return digests(root, sorted(files))


def describe(
    inputs: Inputs,
    merge_config: MergeConfiguration,
    config_source: str | None,
    merged: Merged,
    out: Path,
) -> Manifest:
    """Write card and configuration to `out`; gives the manifest of everything that is there."""
    parameters = _parameters(merge_config, inputs)
    if merged.slopes:
        names = inputs.config.experts
        parameters["slopes"] = {names[model]: slope for model, slope in merged.slopes.items()}
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
    )
    source = config_source or merge_config.to_yaml()
    (out / CONFIG_SOURCE).write_text(source, encoding="utf-8")
    if inputs.options.write_model_card:
        write_card(out, manifest, source, inputs.config.prompts.values())
    files = digests(out, vouched_for(out))
    return manifest.model_copy(update={"files": files})


def _expert(
    config: MergeConfiguration, model: ModelReference, name: str, tuned: Tuned | None
) -> ExpertEntry:
    own = model.lora or model.model
    return ExpertEntry(
        name=name,
        source=_source(model),
        revision=own.revision,
        license=license_of(str(own.path), own.revision),
        weight=_given(config, model, "weight", 1.0),
        file=f"experts/{name}.safetensors",
        tuned=tuned,
    )


def _source(model: ModelReference) -> str:
    """What the user wrote, without revisions: they are stored beside it."""
    return f"{model.model.path}+{model.lora.path}" if model.lora else f"{model.model.path}"


def _given(config: MergeConfiguration, model: ModelReference, name: str, default: Any) -> Any:
    """A per-model parameter as the configuration gives it: a number, gradient or filter."""
    for entry in config.models or []:
        if entry.model == model and name in (entry.parameters or {}):
            value = entry.parameters[name]
            return value.model_dump() if hasattr(value, "model_dump") else value
    return default


def _parameters(config: MergeConfiguration, inputs: Inputs) -> dict[str, Any]:
    """All parameters with their defaults, as plain values."""
    hidden = {"experts", "prompts", "base_model", "storage_given"}
    own = inputs.config.model_dump(exclude=hidden, exclude_none=True)
    selection = inputs.config.selection
    if selection.rule != own["route"]:
        own.pop("route")
    if selection.rule == "routed_fraction":
        own["routed_by"] = own["conflict"] if selection.by_conflict else "place"
    given = config.model_dump(mode="json", include={"parameters"}).get("parameters") or {}
    return {"density": 0.1, "lambda": 1.0, **given, **own}

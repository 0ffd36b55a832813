"""A merge from its configuration to the published artifact.

Each worker holds one weight of the base and of one expert at a time and writes its results at once, so memory
depends neither on the number of layers nor on that of experts. A merge reads the base once, or twice within
`bits`, `budget` and `keep`, and the experts once, or twice in routed layers. Within `keep` experts are read once more to
measure random signs, and again if they become low rank plus sparse.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub.constants import HF_HUB_CACHE
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel

from mergekit_mediator.errors import ConfigError, OutputError, first_line
from mergekit_mediator.merge.checkpoint import Merged, describe, digest_base, write_model_files
from mergekit_mediator.merge.dense_pass import DensePass, write_dense
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.expert_pass import write_experts
from mergekit_mediator.merge.experts.costs import CostMeter
from mergekit_mediator.merge.experts.forms import compared_names
from mergekit_mediator.merge.experts.spectra import spectra_in
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.lessons import prepare_lessons
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.merged_reference import merged_reference
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.preparation import Preparation, prepared
from mergekit_mediator.merge.workers import workers
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store.manifest import EXPERTS, RESPONSE, Change, Manifest
from mergekit_mediator.store.staging import Staging


def run(
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    history: Sequence[Change] = (),
) -> Manifest:
    """Merge as configured and publish the artifact.

    Args:
        merge_config: a configuration with `merge_method: mediator`.
        out_path: the directory to create.
        options: mergekit's options.
        config_source: the text of the configuration, which the artifact will hold.
        overwrite: replace a model in `out_path`.
        allow_nonfinite: accept NaN and infinity in the inputs.
        history: the history that the manifest will have, for a merge that rebuilds an artifact.

    Returns:
        The manifest of the artifact.

    Raises:
        ConfigError: a merge by this configuration is not possible.
        InputError: a model cannot be read or merged.
        OutputError: the artifact cannot be written. After any error, nothing is published.
    """
    if not options.safe_serialization:
        raise ConfigError(
            "--no-safe-serialization: an artifact holds no pickle: leave out this option"
        )
    if not out_path.strip():
        raise OutputError("the name of the output directory is empty: give a name")
    staging = Staging(Path(out_path), overwrite, _directories(merge_config, options))
    try:
        with (
            prepared(OpenInputs, merge_config, options, config_source, staging) as preparation,
        ):
            manifest = _merge(
                preparation, merge_config, config_source, staging.path, allow_nonfinite, history
            )
            staging.publish(manifest)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{out_path}: cannot be written: {first_line(error)}") from error
    return manifest


def _directories(merge_config: MergeConfiguration, options: MergeOptions) -> dict[str, Path]:
    """List by name the directories that a merge reads or fills, which no output may replace."""
    cache = options.transformers_cache or HF_HUB_CACHE
    directories = {}
    for reference in _references(merge_config):
        for model in (reference.model, reference.lora):
            if model is not None and Path(model.path).is_dir():
                directories[model.path] = Path(model.path)
            elif model is not None:
                directories[model.path] = Path(cache, f"models--{model.path.replace('/', '--')}")
    if options.lora_merge_cache is not None:
        directories["--lora-merge-cache"] = Path(options.lora_merge_cache)
    return directories


def _references(value: Any) -> Iterator[ModelReference]:
    """List the models in a part of a configuration: base, experts, and sources of the tokenizer."""
    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        yield from _references([getattr(value, name) for name in type(value).model_fields])
    elif isinstance(value, Mapping):
        yield from _references(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _merge(
    preparation: Preparation[OpenInputs],
    merge_config: MergeConfiguration,
    config_source: str | None,
    out: Path,
    allow_nonfinite: bool,
    history: Sequence[Change],
) -> Manifest:
    """Write all files of an artifact but its manifest; return the manifest."""
    inputs, weights = preparation.inputs, preparation.weights
    (out / EXPERTS).parent.mkdir(parents=True)
    _check_space(out, inputs, weights)
    write_model_files(inputs, merge_config, out)
    lessons = prepare_lessons(preparation.prompts, out, inputs.options.trust_remote_code)
    with ExitStack() as stack:
        reference = None
        if inputs.config.reference_is_merged:
            named = (inputs.config.reference, inputs.options, out, inputs.reader)
            reference = stack.enter_context(merged_reference(merge_config, *named))
        threads = stack.enter_context(workers())
        beside = stack.enter_context(ThreadPoolExecutor(1))
        base_digests = beside.submit(digest_base, inputs)
        with spectra_in(out) as spectra:
            sizes = dense_sizes(inputs, weights)
            compared = compared_names(inputs.config, sorted(sizes), sizes)
            costs = CostMeter(inputs, spectra, compared)
            passes = Passes(inputs, threads, allow_nonfinite, costs, reference)
            dense = write_dense(passes, preparation, out)
            _write_directions(inputs, dense, out)
            experts = write_experts(passes, threads, weights, dense, lessons, spectra, out)
    merged = Merged(
        layers=dense.plans,
        parameter_count=dense.parameter_count,
        base_digests=base_digests.result(),
        slopes=experts.slopes,
        forms=experts.forms,
        tuned=experts.tuned,
        kept=experts.kept,
    )
    return describe(inputs, merge_config, config_source, merged, out, history)


def _write_directions(inputs: Inputs, dense: DensePass, out: Path) -> None:
    """Write the response router, if it measures any weight."""
    if dense.directions:
        names = tuple(inputs.config.experts.values())
        ResponseRouter(names, dict(dense.directions)).save(out / RESPONSE)


def _check_space(out: Path, inputs: Inputs, weights: Sequence[PlannedWeight]) -> None:
    """Refuse a disk that has not even room for the base's bytes, which the dense expert takes."""
    headers = (inputs.header(weight, inputs.base) for weight in weights)
    required = sum(header.bytes for header in headers if header)
    free = shutil.disk_usage(out).free
    if free < required:
        raise OutputError(
            f"{out.parent}: disk full: at least {required:,} bytes required, {free:,} free: make room"
        )

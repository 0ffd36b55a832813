"""Streams base and experts through conflict, plan and sparse encoding into an artifact.

Each worker holds one weight of the base and of one expert at a time, and what is made of them goes to its
file at once, so that memory depends neither on the number of layers nor on that of experts. The base is
read once, or twice within `bits` and `budget`; experts are read once more for what is stored of them.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub.constants import HF_HUB_CACHE
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel

from mergekit_mediator.errors import ConfigError, OutputError, first_line
from mergekit_mediator.merge.budget import bytes_over, check_budget, slopes_for
from mergekit_mediator.merge.checkpoint import (
    describe,
    digest_base,
    write_config,
    write_model_files,
)
from mergekit_mediator.merge.conflict import Conflict
from mergekit_mediator.merge.dense_writer import DenseWriter
from mergekit_mediator.merge.encode import Storing, adapters_for
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.inputs import Inputs
from mergekit_mediator.merge.layers import LayerPlan, select_routed
from mergekit_mediator.merge.passes import Measured, Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.tuning import Lessons, prepare_lessons, read_all_prompts, tune
from mergekit_mediator.merge.unknown_keys import check_keys
from mergekit_mediator.merge.workers import Workers, workers
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store.expert_file import ExpertWriter
from mergekit_mediator.store.manifest import EXPERTS, RESPONSE, Manifest, Tuned, files_below
from mergekit_mediator.store.staging import Staging


def run(
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Manifest:
    """Merge as configured and publish the artifact.

    Args:
        merge_config: with `merge_method: mediator`.
        out_path: the directory to create.
        options: mergekit's own.
        config_source: the configuration's text, stored beside the model.
        overwrite: replace a model that is in `out_path`.
        allow_nonfinite: accept NaN and infinity in the inputs.

    Raises:
        MediatorError: see its subclasses; nothing is published then.
    """
    if not options.safe_serialization:
        raise ConfigError("--no-safe-serialization: an artifact holds no pickle: leave it out")
    if not out_path.strip():
        raise OutputError("the output directory's name is empty: give it one")
    if config_source is not None:
        check_keys(config_source, merge_config)
    staging = Staging(Path(out_path), overwrite, _directories(merge_config, options))
    try:
        with ExitStack() as stack:
            if options.lora_merge_cache is None:
                merged_adapters = stack.enter_context(tempfile.TemporaryDirectory())
                options = options.model_copy(update={"lora_merge_cache": merged_adapters})
            inputs = Inputs(merge_config, options)
            stack.callback(inputs.close)
            stack.enter_context(staging)
            merge = _Merge(inputs, staging.path, allow_nonfinite, stack.enter_context(workers()))
            manifest = merge.run(merge_config, config_source)
            staging.publish(manifest)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{out_path}: cannot be written: {first_line(error)}") from error
    return manifest


def _directories(merge_config: MergeConfiguration, options: MergeOptions) -> dict[str, Path]:
    """The directories that a merge reads or fills, by what to call them: no output may be one of them."""
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
    """The models that a part of a configuration names: to merge, as the base, and for the tokenizer."""
    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        yield from _references([getattr(value, name) for name in type(value).model_fields])
    elif isinstance(value, Mapping):
        yield from _references(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def plan_layers(
    inputs: Inputs, weights: list[PlannedWeight], measured: Mapping[str, Measured]
) -> list[LayerPlan]:
    """The layers in order; decided if the selection needs no conflict or if it was measured."""
    names: dict[str, list[str]] = {}
    for weight in weights:
        names.setdefault(weight.layer, []).append(weight.info.name)
    plans = [
        LayerPlan(
            layer,
            tuple(dict.fromkeys(members)),
            sum((measured[m].conflict for m in members), Conflict()) if measured else None,
        )
        for layer, members in names.items()
    ]
    selection = inputs.config.selection
    if selection.needs_conflict and not measured:
        return plans
    values = {p.name: p.conflict.value(inputs.config.conflict) for p in plans if p.conflict}
    routed = select_routed([p.name for p in plans], selection, values)
    return [replace(p, routed=p.name in routed) for p in plans]


class _Merge:
    """One merge into a staging directory."""

    def __init__(self, inputs: Inputs, out: Path, allow_nonfinite: bool, over: Workers) -> None:
        self.inputs, self.out, self._over = inputs, out, over
        self._prompts = read_all_prompts(inputs.config)
        self.passes = Passes(inputs, over, allow_nonfinite)

    def run(self, merge_config: MergeConfiguration, config_source: str | None) -> Manifest:
        inputs = self.inputs
        inputs.open()
        (self.out / EXPERTS).parent.mkdir(parents=True)
        weights = inputs.weights()
        check_budget(inputs.config, dense_sizes(inputs, weights))
        _check_space(self.out, inputs, weights)
        write_model_files(inputs, merge_config, self.out)
        lessons = prepare_lessons(self._prompts, self.out, inputs.options.trust_remote_code)
        with ThreadPoolExecutor(1) as pool:
            base_digests = pool.submit(digest_base, inputs)
            plans, measured, parameter_count = self._write_dense(weights)
            routed = _routed(weights, plans)
            self._write_directions(measured)
            slopes, tuned = self._store(weights, routed, measured, lessons)
            return describe(
                inputs,
                merge_config,
                config_source,
                plans,
                parameter_count,
                base_digests,
                slopes,
                tuned,
                self.out,
            )

    def _write_dense(
        self, weights: list[PlannedWeight]
    ) -> tuple[list[LayerPlan], dict[str, Measured], int]:
        """The first pass; gives the layers with their conflict, all that was found, the parameter count."""
        config, routed = self.inputs.config, None
        if not config.selection.needs_conflict:
            routed = _names(_routed(weights, plan_layers(self.inputs, weights, {})))
        writer = DenseWriter(self.out, self.inputs.options)
        measured = {}
        for weight, found in self.passes.first(weights, routed, config.needs_costs):
            writer.write(weight.info.name, found.dense)
            measured[weight.info.name] = replace(found, dense={})
        plans = plan_layers(self.inputs, weights, measured)
        writer.finish(_names(_routed(weights, plans)))
        if self.inputs.out_dtype is None and writer.dtype is not None:
            # mergekit names the base's, in which wider weights would be loaded
            self.inputs.out_config.dtype = writer.dtype
            write_config(self.inputs, self.out)
        return plans, measured, writer.parameters

    def _store(
        self,
        weights: list[PlannedWeight],
        routed: list[PlannedWeight],
        measured: dict[str, Measured],
        lessons: Lessons,
    ) -> tuple[dict[ModelReference, float], dict[str, Tuned]]:
        """The second pass; a third one, with less, in the rare case that a budget did not suffice.

        Everything but the experts must be written. Gives what `bits` or a `budget` bought, and what tuning did.
        """
        config = self.inputs.config
        if not config.needs_costs:
            self._write_experts(weights, routed, {})
            return {}, {}
        dense = dense_sizes(self.inputs, weights)
        checkpoint, others = self._written()
        spare = 0
        while True:
            slopes = slopes_for(
                config, sorted(_names(routed)), measured, dense, checkpoint, others + spare
            )
            files = self._write_experts(weights, routed, slopes)
            with self._over.idle():
                tuned = tune(self.inputs, weights, lessons, files, self.out)
            over = bytes_over(config, list(dense), checkpoint, sum(self._written()))
            if over <= 0:
                return slopes, tuned
            spare += over
            shutil.rmtree(self.out / EXPERTS)

    def _written(self) -> tuple[int, int]:
        """Bytes of the checkpoint, and of all else that is written by now."""
        sizes = {name: (self.out / name).stat().st_size for name in files_below(self.out)}
        checkpoint = sum(size for name, size in sizes.items() if "/" not in name)
        return checkpoint, sum(sizes.values()) - checkpoint

    def _write_experts(
        self,
        weights: list[PlannedWeight],
        routed: list[PlannedWeight],
        slopes: dict[ModelReference, float],
    ) -> dict[ModelReference, Path]:
        """The second pass; gives the experts' files."""
        config = self.inputs.config
        (self.out / EXPERTS).mkdir(parents=True)
        storing = Storing(config, self.passes.device, slopes, adapters_for(self.inputs, weights))
        with ExitStack() as stack:
            paths, files = {}, {}
            for model, name in self.inputs.config.experts.items():
                paths[model] = self.out / EXPERTS / f"{name}.safetensors"
                files[model] = ExpertWriter(paths[model], name)
                stack.callback(files[model].abandon)
            for weight, model, stored in self.passes.second(routed, self.out, storing.encode):
                if stored is not None:
                    files[model].append(weight.info.name, *stored)
            for file in files.values():
                file.close()
            return paths

    def _write_directions(self, measured: dict[str, Measured]) -> None:
        directions = {n: m.directions for n, m in measured.items() if m.directions is not None}
        if directions:
            router = ResponseRouter(tuple(self.inputs.config.experts.values()), directions)
            router.save(self.out / RESPONSE)


def _names(weights: list[PlannedWeight]) -> frozenset[str]:
    return frozenset(weight.info.name for weight in weights)


def _routed(weights: list[PlannedWeight], plans: list[LayerPlan]) -> list[PlannedWeight]:
    layers = {plan.name for plan in plans if plan.routed}
    return [weight for weight in weights if weight.layer in layers]


def _check_space(out: Path, inputs: Inputs, weights: list[PlannedWeight]) -> None:
    """Refuse before any weight is read what cannot fit: the dense expert alone takes the base's bytes."""
    headers = (inputs.header(weight, inputs.base) for weight in weights)
    required = sum(header.bytes for header in headers if header)
    free = shutil.disk_usage(out).free
    if free < required:
        raise OutputError(
            f"{out.parent}: disk full: at least {required:,} bytes required, {free:,} free"
        )

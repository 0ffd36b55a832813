"""Streams base and experts through conflict, plan and sparse encoding into an artifact.

One weight of all models is in use at a time, and experts go to their files as they are encoded, so
memory does not depend on the number of layers. Each weight is read twice where the choice of routed
layers depends on what is measured, else once.
"""

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import safetensors
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_mediator import artifact, response
from mergekit_mediator.artifact import Manifest
from mergekit_mediator.checkpoint import describe, digest_base, write_model_files
from mergekit_mediator.conflict import Conflict, task_vectors
from mergekit_mediator.errors import ConfigError, OutputError
from mergekit_mediator.estimate import dense_sizes
from mergekit_mediator.expert_file import ExpertWriter
from mergekit_mediator.headers import first_line
from mergekit_mediator.passes import Measured, Passes
from mergekit_mediator.plan import LayerPlan, select_routed
from mergekit_mediator.planner import PlannedWeight
from mergekit_mediator.response import ResponseRouter
from mergekit_mediator.staging import Staging
from mergekit_mediator.storing import Storing, adapters_for, slopes_for
from mergekit_mediator.weights import Inputs
from mergekit_mediator.workers import Map, workers


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
    with ExitStack() as stack:
        if options.lora_merge_cache is None:
            merged_adapters = stack.enter_context(tempfile.TemporaryDirectory())
            options = options.model_copy(update={"lora_merge_cache": merged_adapters})
        inputs = Inputs(merge_config, options)
        stack.callback(inputs.close)
        staging = stack.enter_context(Staging(Path(out_path), overwrite))
        try:
            merge = _Merge(inputs, staging.path, allow_nonfinite, stack.enter_context(workers()))
            manifest = merge.run(merge_config, config_source)
            staging.publish(manifest)
        except (OSError, safetensors.SafetensorError) as error:
            raise OutputError(f"{out_path}: cannot be written: {first_line(error)}") from error
    return manifest


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

    def __init__(self, inputs: Inputs, out: Path, allow_nonfinite: bool, over: Map) -> None:
        self.inputs, self.out, self.over = inputs, out, over
        self.passes = Passes(inputs, over, allow_nonfinite)

    def run(self, merge_config: MergeConfiguration, config_source: str | None) -> Manifest:
        inputs, config = self.inputs, self.inputs.config
        inputs.open()
        weights = inputs.weights()
        _check_space(self.out, inputs, weights)
        with ThreadPoolExecutor(1) as pool:
            base_digests = pool.submit(digest_base, inputs)
            measured: dict[str, Measured] = {}
            if config.selection.needs_conflict or config.needs_costs:
                measured = self.passes.measure(weights, config.needs_costs)
            plans = plan_layers(inputs, weights, measured)
            storing = self._storing(weights, plans, measured)
            conflict, parameter_count = self._write_weights(weights, plans, storing, measured)
            plans = [
                replace(p, conflict=sum((conflict[w] for w in p.weights), Conflict()))
                for p in plans
            ]
            write_model_files(inputs, merge_config, self.out)
            return describe(
                inputs, merge_config, config_source, plans, parameter_count, base_digests, self.out
            )

    def _storing(
        self,
        weights: list[PlannedWeight],
        plans: list[LayerPlan],
        measured: dict[str, Measured],
    ) -> Storing:
        config = self.inputs.config
        slopes = {}
        if config.needs_costs:
            sizes = dense_sizes(self.inputs, weights)
            slopes = slopes_for(
                config,
                _routed(weights, plans),
                measured,
                {name: size.numel for name, size in sizes.items()},
                sum(size.bytes for size in sizes.values()),
            )
        adapters = adapters_for(config, weights)
        return Storing(config, self.passes.device, slopes, adapters)

    def _write_weights(
        self,
        weights: list[PlannedWeight],
        plans: list[LayerPlan],
        storing: Storing,
        measured: dict[str, Measured],
    ) -> tuple[dict[str, Conflict], int]:
        """Write dense and sparse experts; gives the conflict of all weights and the parameter count."""
        options = self.inputs.options
        routed = {weight.info.name for weight in _routed(weights, plans)}
        conflict = {name: found.conflict for name, found in measured.items()}
        directions: dict[str, Tensor] = {}
        parameter_count = 0
        writer = TensorWriter(
            str(self.out),
            max_shard_size=options.out_shard_size,
            use_async=options.async_write,
            max_write_threads=options.write_threads,
        )
        with ExitStack() as stack:
            files = []
            (self.out / artifact.EXPERTS).mkdir(parents=True)
            for name in self.inputs.config.experts.values():
                path = self.out / artifact.EXPERTS / f"{name}.safetensors"
                files.append(ExpertWriter(path, name, sorted(routed)))
                stack.callback(files[-1].abandon)
            for weight, base, experts in self.passes.read(weights, "merge and write"):
                name = weight.info.name
                parameter_count += base.numel()
                if name not in conflict:
                    conflict[name] = self.passes.conflict(base, experts)
                if response.is_measured(base.shape, self.inputs.hidden_size):
                    found = self.over(partial(self._directions, base), experts)
                    directions[name] = torch.stack(list(found))
                dense = self.passes.dense(weight, base, experts, name in routed)
                if name in routed and dense.is_floating_point():
                    store = partial(_store, storing, weight, base, dense)
                    items = zip(self.inputs.experts, files, experts, strict=True)
                    list(self.over(store, items))
                writer.save_tensor(name, dense, clone=options.clone_tensors)
            writer.finalize()
            for file in files:
                file.close()
        if directions:
            router = ResponseRouter(tuple(self.inputs.config.experts.values()), directions)
            router.save(self.out / artifact.RESPONSE)
        return conflict, parameter_count

    def _directions(self, base: Tensor, expert: Tensor) -> Tensor:
        (tau,) = task_vectors(base, [expert], self.passes.device)
        return response.leading_directions(tau).cpu()


def _store(
    storing: Storing,
    weight: PlannedWeight,
    base: Tensor,
    dense: Tensor,
    item: tuple[ModelReference, ExpertWriter, Tensor],
) -> None:
    model, file, expert = item
    stored = storing.encode(weight, model, base, dense, expert)
    if stored is not None:
        file.write(weight.info.name, stored, dense)


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

"""Streams base and experts through conflict, plan and sparse encoding into an artifact.

One weight of all models is in use at a time, and experts go to their files as they are encoded, so
memory does not depend on the number of layers. Each weight is read twice where the choice of routed
layers depends on what is measured, else once.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mergekit.merge
import safetensors
import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods.buffers import copy_non_floating_buffer
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from mergekit_mediator import __version__, artifact, conflict, response, sparse
from mergekit_mediator.artifact import BaseEntry, ExpertEntry, FileDigest, LayerEntry, Manifest
from mergekit_mediator.card import write_card
from mergekit_mediator.conflict import Conflict
from mergekit_mediator.dense import average
from mergekit_mediator.errors import ConfigError, InputError, OutputError
from mergekit_mediator.expert_file import ExpertWriter
from mergekit_mediator.headers import first_line
from mergekit_mediator.plan import LayerPlan, select_routed
from mergekit_mediator.remote_code import write_remote_code
from mergekit_mediator.response import ResponseRouter
from mergekit_mediator.sparse import SparseTensor
from mergekit_mediator.threshold import chunks
from mergekit_mediator.weights import Inputs, PlannedWeight
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
        staging = stack.enter_context(artifact.Staging(Path(out_path), overwrite))
        try:
            merge = _Merge(inputs, staging.path, allow_nonfinite, stack.enter_context(workers()))
            manifest = merge.run(merge_config, config_source)
            staging.publish(manifest)
        except (OSError, safetensors.SafetensorError) as error:
            raise OutputError(f"{out_path}: cannot be written: {first_line(error)}") from error
    return manifest


def measure_layers(
    inputs: Inputs, weights: list[PlannedWeight], over: Map, allow_nonfinite: bool = False
) -> dict[str, Conflict]:
    """The conflict of every weight by name, in one pass over all models."""
    measured = {}
    for weight in _progress(weights, inputs, "measure conflict"):
        base, experts = _load(inputs, weight, over, allow_nonfinite)
        measured[weight.info.name] = _measure(inputs, base, experts, over)
    return measured


def plan_layers(
    inputs: Inputs, weights: list[PlannedWeight], measured: dict[str, Conflict] | None
) -> list[LayerPlan]:
    """The layers in order; decided if the selection needs no conflict or if it was measured."""
    names: dict[str, list[str]] = {}
    for weight in weights:
        names.setdefault(weight.layer, []).append(weight.info.name)
    plans = [
        LayerPlan(
            layer,
            tuple(dict.fromkeys(members)),
            sum((measured[m] for m in members), Conflict()) if measured is not None else None,
        )
        for layer, members in names.items()
    ]
    selection = inputs.config.selection
    if selection.needs_conflict and measured is None:
        return plans
    values = {p.name: p.conflict.value(inputs.config.conflict) for p in plans if p.conflict}
    routed = select_routed([p.name for p in plans], selection, values)
    return [replace(p, routed=p.name in routed) for p in plans]


class _Merge:
    """One merge into a staging directory."""

    def __init__(self, inputs: Inputs, out: Path, allow_nonfinite: bool, over: Map) -> None:
        self.inputs, self.out, self.allow_nonfinite, self.over = inputs, out, allow_nonfinite, over
        self.options = inputs.options

    def run(self, merge_config: MergeConfiguration, config_source: str | None) -> Manifest:
        self.inputs.open()
        weights = self.inputs.weights()
        _check_space(self.out, self.inputs, weights)
        with ThreadPoolExecutor(1) as pool:
            base_digests = pool.submit(self._digest_base)
            measured = None
            if self.inputs.config.selection.needs_conflict:
                measured = measure_layers(self.inputs, weights, self.over, self.allow_nonfinite)
            plans = plan_layers(self.inputs, weights, measured)
            measured, parameter_count = self._write_weights(weights, plans, measured or {})
            plans = [
                replace(p, conflict=sum((measured[w] for w in p.weights), Conflict()))
                for p in plans
            ]
            self._write_checkpoint_files(merge_config)
            return self._finish(merge_config, config_source, plans, parameter_count, base_digests)

    def _write_weights(
        self, weights: list[PlannedWeight], plans: list[LayerPlan], measured: dict[str, Conflict]
    ) -> tuple[dict[str, Conflict], int]:
        """Write dense and sparse experts; gives the conflict of all weights and the parameter count."""
        routed = {plan.name for plan in plans if plan.routed}
        names = [weight.info.name for weight in weights if weight.layer in routed]
        writer = TensorWriter(
            str(self.out),
            max_shard_size=self.options.out_shard_size,
            use_async=self.options.async_write,
            max_write_threads=self.options.write_threads,
        )
        measured, parameter_count = dict(measured), 0
        directions: dict[str, Tensor] = {}
        with ExitStack() as stack:
            (self.out / artifact.EXPERTS).mkdir(parents=True)
            experts = {}
            for model, name in self.inputs.config.experts.items():
                path = self.out / artifact.EXPERTS / f"{name}.safetensors"
                experts[model] = ExpertWriter(path, name, names)
                stack.callback(experts[model].abandon)
            for weight in _progress(weights, self.inputs, "merge and write"):
                base, tensors = _load(self.inputs, weight, self.over, self.allow_nonfinite)
                name = weight.info.name
                parameter_count += base.numel()
                if name not in measured:
                    measured[name] = _measure(self.inputs, base, tensors, self.over)
                if response.is_measured(base.shape, self.inputs.hidden_size):
                    tau = partial(self._directions, base)
                    directions[name] = torch.stack(list(self.over(tau, tensors)))
                dense = self._dense(weight, base, tensors, weight.layer in routed)
                if weight.layer in routed and dense.is_floating_point():
                    densities = [weight.densities[model] for model in self.inputs.experts]
                    stored = self.over(
                        partial(self._encode, dense), zip(tensors, densities, strict=True)
                    )
                    for expert, tensor in zip(experts.values(), stored, strict=True):
                        expert.write(name, tensor, dense)
                writer.save_tensor(name, dense, clone=self.options.clone_tensors)
            writer.finalize()
            for expert in experts.values():
                expert.close()
        if directions:
            router = ResponseRouter(tuple(self.inputs.config.experts.values()), directions)
            router.save(self.out / artifact.RESPONSE)
        return measured, parameter_count

    def _directions(self, base: Tensor, expert: Tensor) -> Tensor:
        (tau,) = conflict.task_vectors(base, [expert], self.options.device or "cpu")
        return response.leading_directions(tau).cpu()

    def _encode(self, dense: Tensor, task: tuple[Tensor, float]) -> SparseTensor:
        expert, density = task
        values, device = self.inputs.config.values, self.options.device or "cpu"
        return sparse.encode(expert.to(dense.dtype), dense, density, values, device)

    def _dense(
        self, weight: PlannedWeight, base: Tensor, experts: list[Tensor], routed: bool
    ) -> Tensor:
        """The dense expert's weight, on the CPU, in the output dtype."""
        try:
            buffer: Tensor | None = copy_non_floating_buffer([base, *experts], weight.info.name)
        except (TypeError, ValueError) as error:
            raise InputError(f"{weight.info.name}: {first_line(error)}") from error
        if buffer is not None:
            return buffer.cpu()
        dtype = self._dtype(weight, base, experts)
        if routed and self.inputs.config.reference == "base":
            return base.to("cpu", dtype)
        shares = [weight.shares[model] for model in self.inputs.experts]
        scale = 1.0 if routed else weight.scale
        device = self.options.device or "cpu"
        return average(base, experts, shares, scale, dtype, device, self.over).cpu()

    def _dtype(self, weight: PlannedWeight, base: Tensor, experts: list[Tensor]) -> torch.dtype:
        named: torch.dtype | None = dtype_from_name(
            weight.info.force_dtype or self.inputs.out_dtype
        )
        if named is not None:
            return named
        dtype = base.dtype
        for expert in experts:
            dtype = torch.promote_types(dtype, expert.dtype)
        return dtype

    def _write_checkpoint_files(self, merge_config: MergeConfiguration) -> None:
        """Configuration, tokenizer and the files that go along with them, all by mergekit's own code."""
        inputs, out = self.inputs, str(self.out)
        built = inputs.build_tokenizer()
        if built is not None:
            pad = merge_config.tokenizer.pad_to_multiple_of if merge_config.tokenizer else None
            mergekit.merge._update_config_vocab(
                inputs.out_config, inputs.architecture, built.tokenizer, pad_to_multiple_of=pad
            )
        inputs.out_config.save_pretrained(out)
        if built is not None:
            mergekit.merge._set_chat_template(built.tokenizer, merge_config)
            built.tokenizer.save_pretrained(out)
        elif self.options.copy_tokenizer:
            try:
                mergekit.merge._copy_tokenizer(merge_config, out, options=self.options)
            except (OSError, ValueError, KeyError, ImportError) as error:
                tqdm.write(
                    f"warning: no tokenizer copied from {inputs.base}: {first_line(error)}: "
                    "the merge is complete, copy a tokenizer from elsewhere"
                )
        mergekit.merge._copy_tagalong_files(
            merge_config, out, files=inputs.architecture.tagalong_files or [], options=self.options
        )
        write_remote_code(self.out)

    def _digest_base(self) -> dict[str, FileDigest]:
        root = self.inputs.base_directory()
        files = [p.name for pattern in ("*.safetensors", "*.bin") for p in root.glob(pattern)]
        return artifact.digests(root, sorted(files))

    def _finish(
        self,
        merge_config: MergeConfiguration,
        config_source: str | None,
        plans: list[LayerPlan],
        parameter_count: int,
        base_digests: "Future[dict[str, FileDigest]]",
    ) -> Manifest:
        """Write card and configuration, and describe everything that was written."""
        inputs = self.inputs
        manifest = Manifest(
            format_version=artifact.FORMAT_VERSION,
            package_version=__version__,
            base=BaseEntry(
                source=str(inputs.base.model.path),
                revision=inputs.base.model.revision,
                files=base_digests.result(),
            ),
            experts=tuple(
                ExpertEntry(
                    name=name,
                    source=_source(model),
                    revision=(model.lora or model.model).revision,
                    weight=_given(merge_config, model, "weight", 1.0),
                    file=f"experts/{name}.safetensors",
                )
                for model, name in inputs.config.experts.items()
            ),
            layers=tuple(
                LayerEntry(
                    name=p.name, weights=p.weights, conflict=p.metrics, routed=bool(p.routed)
                )
                for p in plans
            ),
            parameters=_parameters(merge_config, inputs),
            parameter_count=parameter_count,
            files={},
        )
        source = config_source or merge_config.to_yaml()
        (self.out / "mergekit_config.yml").write_text(source, encoding="utf-8")
        if self.options.write_model_card:
            write_card(self.out, manifest, source)
        files = artifact.digests(self.out, artifact.files_below(self.out))
        return manifest.model_copy(update={"files": files})


def _load(
    inputs: Inputs, weight: PlannedWeight, over: Map, allow_nonfinite: bool
) -> tuple[Tensor, list[Tensor]]:
    base, experts = inputs.load(weight)
    if not allow_nonfinite:
        finite = over(_is_finite, [base, *experts])
        for model, is_finite in zip(inputs.models, finite, strict=True):
            if not is_finite:
                raise InputError(
                    f"{weight.info.name}: NaN or infinity in {model}: mend the model, or run "
                    "`mergekit-mediator merge --allow-nonfinite`"
                )
    return base, experts


def _measure(inputs: Inputs, base: Tensor, experts: list[Tensor], over: Map) -> Conflict:
    if not base.is_floating_point():
        return Conflict()
    device = inputs.options.device or "cpu"
    return conflict.measure(base, experts, inputs.config.denoise, device, over)


def _is_finite(tensor: Tensor) -> bool:
    """A sum is finite unless a term is not, or it overflows; only then does each term need a look."""
    if not tensor.is_floating_point():
        return True
    flat = tensor.reshape(-1)
    return all(
        bool(flat[part].sum(dtype=torch.float32).isfinite()) or bool(flat[part].isfinite().all())
        for part in chunks(flat.numel())
    )


def _progress(
    weights: Iterable[PlannedWeight], inputs: Inputs, description: str
) -> Iterator[PlannedWeight]:
    """Passes the weights on, with a bar in bytes read that names the weight."""
    weights = list(weights)
    sizes = [inputs.input_bytes(weight) for weight in weights]
    with tqdm(
        total=sum(sizes),
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=inputs.options.quiet,
    ) as bar:
        for weight, size in zip(weights, sizes, strict=True):
            bar.set_postfix_str(weight.info.name, refresh=False)
            yield weight
            bar.update(size)


def _check_space(out: Path, inputs: Inputs, weights: list[PlannedWeight]) -> None:
    """Refuse before any weight is read what cannot fit: the dense expert alone takes the base's bytes."""
    headers = (inputs.header(weight, inputs.base) for weight in weights)
    required = sum(header.bytes for header in headers if header)
    free = shutil.disk_usage(out).free
    if free < required:
        raise OutputError(
            f"{out.parent}: disk full: at least {required:,} bytes required, {free:,} free"
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
    own = inputs.config.model_dump(exclude={"experts", "base_model"}, exclude_none=True)
    if inputs.config.selection.rule not in ("auto", "all", "none"):
        own.pop("route")
    given = config.model_dump(mode="json", exclude_none=True).get("parameters") or {}
    return {"density": 0.1, "lambda": 1.0, **given, **own}

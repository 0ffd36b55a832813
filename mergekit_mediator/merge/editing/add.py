"""Add an expert to an artifact: the dense expert and the files of the other experts stay as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.errors import EditError
from mergekit_mediator.merge.checkpoint import source_of
from mergekit_mediator.merge.dense_pass import DensePass
from mergekit_mediator.merge.editing.names import check_new_name
from mergekit_mediator.merge.editing.routers import (
    add_to_response,
    save_router,
    with_stale_note,
)
from mergekit_mediator.merge.editing.storage import (
    AddedInputs,
    merge_configuration,
    model_of,
    storage,
)
from mergekit_mediator.merge.editing.workspace import Edited, Workspace, change, editing
from mergekit_mediator.merge.estimate import dense_sizes
from mergekit_mediator.merge.expert_pass import write_experts
from mergekit_mediator.merge.experts.costs import CostMeter
from mergekit_mediator.merge.experts.encode import adapters_for
from mergekit_mediator.merge.experts.forms import compared_names
from mergekit_mediator.merge.experts.keep import Kept
from mergekit_mediator.merge.experts.spectra import spectra_in
from mergekit_mediator.merge.layers import LayerPlan
from mergekit_mediator.merge.measured import Measured
from mergekit_mediator.merge.model_cards import license_of
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.planner import PlannedWeight
from mergekit_mediator.merge.preparation import Preparation, prepared
from mergekit_mediator.merge.workers import workers
from mergekit_mediator.models.loading import load_plain, load_tokenizer
from mergekit_mediator.models.sources import is_hub_id
from mergekit_mediator.route.calibrate import fit_artifact
from mergekit_mediator.store.manifest import CONFIG_SOURCE, ExpertEntry, Manifest
from mergekit_mediator.store.verification import verify_base


def add_expert(
    out: Path,
    model: str,
    name: str,
    *,
    base: Path | None = None,
    data: Path | None = None,
    trust_remote_code: bool = False,
    **parameters: Any,
) -> Edited:
    """Add an expert. It has a version of its own in the routed layers; averaged layers stay as they are.

    The expert comes last in the order of experts. It is stored relative to the dense expert, or to the base, as the
    other experts are.

    Args:
        out: the artifact's directory.
        model: the model of the expert as in a configuration, or the directory of an adapter of the base.
        name: the name of the expert.
        base: the directory of the base model; by default where the manifest says.
        data: a file of the expert's prompts, to which a calibrated router is fitted again; see
            `prompt_files.read_prompts`. Without it, the router chooses no request for the new expert, and the manifest
            says so.
        trust_remote_code: let the models' own code run.
        parameters: of `keep`, `bits`, `budget`, `density`, `values` and `rank`; by default those of the merge, see
            `storage`.

    Returns:
        The manifest of the changed artifact, and the change. Its details have `averaged`: the fraction of the
        expert's squared change from the base that is in averaged layers.

    Raises:
        EditError: the name cannot be used, the base is not there, or the expert cannot be stored in this form.
        ConfigError: a parameter is out of range, or the budget leaves too little.
        InputError: a model cannot be read, or is no fine-tune of the base.
        RoutingError: there is no calibrated router for `data`, or it cannot be fitted.
        PromptError: the file of prompts cannot be read.
        ArtifactError: the artifact or the base does not verify.
        OutputError: the artifact cannot be written. After any error it is as before.
    """
    reads = {part: Path(part) for part in model.split("+") if Path(part).is_dir()}
    with editing(out, reads) as work:
        check_new_name(name, work.manifest)
        if data is not None and work.manifest.router is None:
            raise EditError(
                f"{out}: has no calibrated router to fit again: leave out the prompts, and run "
                "`mergekit-mediator calibrate` with those of all experts"
            )
        _check_not_sliced(work)
        base_model = _base(work.manifest, base)
        form = storage(work, parameters)
        method = work.manifest.merged_by
        reference = {} if method is None else {"reference": method}
        source = model_of(model, base_model)
        config = merge_configuration(base_model, source, name, {**form, **reference})
        options = MergeOptions(trust_remote_code=trust_remote_code)
        with prepared(AddedInputs, config, options) as preparation:
            verify_base(preparation.inputs.base_directory(), work.manifest)
            _check_weights(work, preparation)
            if not form and not adapters_for(preparation.inputs, preparation.weights):
                raise EditError(
                    f"{model}: a plain LoRA adapter of the base required, as the other experts are: give --keep, "
                    "--bits or --budget to store another model"
                )
            added = _write(work, preparation)
        return _publish(work, preparation, added, form, data)


class _Added(NamedTuple):
    """The figures of the expert.

    Attributes:
        slope: its slope, see `experts.budget.slopes_for`; None without `keep`, `bits` and `budget`.
        form: its form, if it has a slope.
        kept: the part of its gain that it keeps; None without `keep`.
        averaged: the fraction of its squared change that is in averaged layers.
        directions: its leading directions by weight.
    """

    slope: float | None
    form: RateForm | None
    kept: Kept | None
    averaged: float
    directions: Mapping[str, Tensor]


def _base(manifest: Manifest, base: Path | None) -> str:
    """Find the base model.

    Raises:
        EditError: the manifest names a directory that is not on this machine.
    """
    if base is not None:
        return str(base)
    source, revision = manifest.base.source, manifest.base.revision
    if not Path(source).is_dir() and not is_hub_id(source):
        raise EditError(
            f"base model {source}: is not on this machine, and adding an expert reads it: name its directory "
            "with --base"
        )
    return source if revision is None else f"{source}@{revision}"


def _check_not_sliced(work: Workspace) -> None:
    """Refuse an artifact whose layers are not those of its base.

    Raises:
        EditError: the configuration of the merge has slices or modules.
    """
    path = work.root / CONFIG_SOURCE
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if isinstance(config, dict) and {"slices", "modules"} & set(config):
        raise EditError(
            f"{work.out}: was merged of slices or modules, to which no expert can be added: merge again with it"
        )


def _check_weights(work: Workspace, preparation: Preparation[AddedInputs]) -> None:
    """Refuse a base whose weights are not those of the dense expert.

    Raises:
        EditError: a name or a shape differs.
    """
    inputs, shapes = preparation.inputs, work.dense.shapes
    for weight in preparation.weights:
        header = inputs.header(weight, inputs.base)
        shape = shapes.get(weight.info.name)
        if shape is None or (header is not None and header.shape != shape):
            raise EditError(
                f"{weight.info.name}: the dense expert has another shape than the base, as the merge aligned "
                "vocabularies: merge again with the expert"
            )


def _write(work: Workspace, preparation: Preparation[AddedInputs]) -> _Added:
    """Write the file of the expert by the passes of a merge."""
    inputs, weights = preparation.inputs, preparation.weights
    routed = {w for layer in work.manifest.routed_layers for w in layer.weights}
    costed = routed if inputs.config.needs_costs else set()
    measured: dict[str, Measured] = {}
    directions: dict[str, Tensor] = {}
    with workers() as threads, spectra_in(work.root) as spectra:
        reference = work.dense.weight if inputs.config.reference_is_merged else None
        compared = compared_names(inputs.config, sorted(routed), dense_sizes(inputs, weights))
        costs = CostMeter(inputs, spectra, compared)
        passes = Passes(inputs, threads, costs=costs, reference=reference)
        for weight, averaged in passes.average(weights, routed, costed):
            measured[weight.info.name] = averaged.measured
            if averaged.directions:
                directions[weight.info.name] = averaged.directions[0]
        plans = [
            LayerPlan(layer.name, layer.weights, routed=layer.routed)
            for layer in work.manifest.layers
        ]
        dense = DensePass(plans, measured, directions, work.manifest.parameter_count)
        written = write_experts(passes, threads, weights, dense, {}, spectra, work.root)
    return _Added(
        next(iter(written.slopes.values()), None),
        next(iter(written.forms.values()), None),
        next(iter(written.kept.values()), None),
        _averaged(weights, measured, routed),
        directions,
    )


def _averaged(
    weights: Sequence[PlannedWeight], measured: Mapping[str, Measured], routed: set[str]
) -> float:
    """The fraction of the squared change from the base that is in averaged layers."""
    energy = {w.info.name: measured[w.info.name].conflict.total_energy for w in weights}
    outside = sum(value for name, value in energy.items() if name not in routed)
    return outside / sum(energy.values()) if outside else 0.0


def _publish(
    work: Workspace,
    preparation: Preparation[AddedInputs],
    added: _Added,
    form: Mapping[str, Any],
    data: Path | None,
) -> Edited:
    """Change routers and manifest, and publish."""
    ((model, name),) = preparation.inputs.config.experts.items()
    source = model.lora or model.model
    entry = ExpertEntry(
        name=name,
        source=source_of(model),
        revision=source.revision,
        license=license_of(str(source.path), source.revision),
        weight=0.0,
        file=f"experts/{name}.safetensors",
    )
    parameters = dict(work.manifest.parameters)
    if added.slope is not None:
        parameters["slopes"] = {**parameters.get("slopes", {}), name: added.slope}
        parameters["forms"] = {**parameters.get("forms", {}), name: added.form}
    if added.kept is not None:
        parameters["kept"] = {**parameters.get("kept", {}), name: asdict(added.kept)}
    experts = (*work.manifest.experts, entry)
    manifest = work.manifest.model_copy(update={"experts": experts, "parameters": parameters})
    add_to_response(work, name, added.directions)
    router = work.manifest.router
    if data is not None:
        router = _fit(work, manifest, name, data, preparation.inputs.options.trust_remote_code)
    router = with_stale_note(router, manifest.expert_names)
    stored = (
        f"by {', '.join(f'{k} {v}' for k, v in form.items())}" if form else "by its own factors"
    )
    note = (
        f"expert {name} was added, stored {stored}: {100 * added.averaged:.1f}% of its squared change is in "
        "averaged layers, which stay as they are; the dense expert does not hold it"
    )
    return work.publish(
        manifest.model_copy(update={"router": router}),
        change("add", name, note, **form, averaged=added.averaged),
    )


def _fit(
    work: Workspace, manifest: Manifest, name: str, data: Path, trust_remote_code: bool
) -> dict[str, Any]:
    """Fit the calibrated router again with the prompts of the new expert; return the figures for the manifest."""
    tokenizer = load_tokenizer(work.root, trust_remote_code)
    if tokenizer is None:
        raise EditError(
            f"{work.out}: has no tokenizer, and a prompt needs one: leave out the prompts"
        )
    model = load_plain(work.root, trust_remote_code=trust_remote_code)
    result, figures = fit_artifact(work.root, manifest, model, tokenizer, {name: data})
    save_router(work, result.router)
    return figures

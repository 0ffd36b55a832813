"""Show the content of an artifact: its experts and sizes, and the choice for every layer with its reason."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_mediator.cli.tables import size, table
from mergekit_mediator.store.description import Description
from mergekit_mediator.store.expert_header import open_header
from mergekit_mediator.store.manifest import LayerEntry, Manifest


def inspect_figures(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Describe an artifact in plain values: sizes in bytes, rates in bits per parameter.

    Raises:
        ArtifactError: an expert's file is missing or damaged.
    """
    experts: list[dict[str, Any]] = []
    files: dict[str, Mapping[str, Description]] = {}
    for entry in manifest.experts:
        header = open_header(root, entry)
        files[entry.name] = header.weights
        stored = manifest.files[f"mediator/{entry.file}"].bytes
        parameters = sum(description.numel for description in header.weights.values())
        experts.append(
            {
                "name": entry.name,
                "source": entry.source,
                "weight": entry.weight,
                "bytes": stored,
                "routed_parameters": parameters,
                "bits_per_parameter": 8 * stored / parameters if parameters else 0.0,
                "tuned": entry.tuned.model_dump() if entry.tuned else None,
                "kept": _figures(manifest.parameters.get("kept")).get(entry.name),
            }
        )
    dense = sum(
        d.bytes for name, d in manifest.files.items() if "/" not in name and _is_weights(name)
    )
    total = sum(d.bytes for d in manifest.files.values())
    return {
        "base": manifest.base.source,
        "parameters": manifest.parameter_count,
        "dense_bytes": dense,
        "total_bytes": total,
        "total_over_dense": total / dense if dense else 0.0,
        "experts": experts,
        "layers": [
            {**layer.model_dump(exclude={"weights"}), "stored": _stored(layer, files)}
            for layer in manifest.layers
        ],
        "settings": manifest.parameters,
        "router": manifest.router,
        "history": [change.model_dump() for change in manifest.history],
    }


def inspect_report(figures: dict[str, Any]) -> str:
    """Write the result of `inspect_figures` as text."""
    layers, settings = figures["layers"], figures["settings"]
    metric = settings.get("conflict", "mass")
    routed = sum(layer["routed"] for layer in layers)
    experts = [
        [
            expert["name"],
            size(expert["bytes"]),
            f"{expert['bits_per_parameter']:.3f}",
            str(expert["weight"]),
            _tuning(expert["tuned"]),
            _kept(expert["kept"]),
            expert["source"],
        ]
        for expert in figures["experts"]
    ]
    rows = []
    for layer in layers:
        stored = layer["stored"]
        rows.append(
            [
                layer["name"],
                "routed" if layer["routed"] else "averaged",
                f"{layer['conflict'].get(metric, 0.0):.3f}",
                *(
                    [
                        f"{stored['bits_per_parameter']:.3f}",
                        f"{stored['rank']:.1f}",
                        f"{100 * stored['density']:.2f}",
                    ]
                    if stored
                    else ["-", "-", "-"]
                ),
            ]
        )
    return "\n".join(
        [
            f"base {figures['base']}, {figures['parameters']:,} parameters",
            f"dense expert {size(figures['dense_bytes'])}, all files {size(figures['total_bytes'])} "
            f"= {figures['total_over_dense']:.3f} of the dense expert",
            "",
            table(
                ["expert", "bytes", "bits/param", "weight", "KL, nats", "gain kept", "source"],
                experts,
            ),
            "",
            table(["layer", "", metric, "bits/param", "mean rank", "kept, %"], rows),
            "",
            f"{routed} of {len(layers)} layers routed: {_reason(settings)}",
            *_division(figures["experts"]),
            *_router(figures["router"]),
            *_changes(figures),
        ]
    )


def _router(router: Any) -> list[str]:
    """Write the figures of the calibrated router; nothing without one."""
    figures = _figures(router)
    names = {
        "accuracy": "accuracy",
        "ece": "expected calibration error",
        "ood_auroc": "AUROC of the out-of-distribution score",
    }
    texts = [
        f"{text} {figures[name]:.3f}"
        for name, text in names.items()
        if isinstance(figures.get(name), float)
    ]
    return ["", f"the calibrated router on held-out prompts: {', '.join(texts)}"] if texts else []


def _changes(figures: Mapping[str, Any]) -> list[str]:
    """Write the changes since the merge, and whether the calibrated router is stale."""
    lines = [f"- {change['note']}" for change in figures["history"]]
    lines = ["", "changes since the merge:", *lines] if lines else []
    stale = (figures["router"] or {}).get("stale")
    return lines if stale is None else [*lines, "", f"the calibrated router is stale: {stale}"]


def _stored(
    layer: LayerEntry, files: Mapping[str, Mapping[str, Description]]
) -> dict[str, Any] | None:
    """Compute a layer's means over experts; None if no expert stores a weight of the layer.

    Returns:
        The bits per parameter, the rank of matrices, and the fraction of coordinates that are stored; and
        the bytes by expert.
    """
    by_expert = {e: [file[n] for n in layer.weights if n in file] for e, file in files.items()}
    weights = [d for stored in by_expert.values() for d in stored]
    parameters = sum(d.numel for d in weights)
    if not parameters:
        return None
    sizes = {expert: sum(map(_bytes, stored)) for expert, stored in by_expert.items()}
    ranks = [d.factors.rank if d.factors else 0 for d in weights if len(d.shape) > 1]
    return {
        "bits_per_parameter": 8 * sum(sizes.values()) / parameters,
        "rank": sum(ranks) / len(ranks) if ranks else 0.0,
        "density": sum(d.count for d in weights) / parameters,
        "bytes": sizes,
    }


def _bytes(stored: Description) -> int:
    """The bytes of all streams of a stored weight."""
    return sum(stored.sizes) + sum(stored.factors.sizes if stored.factors else ())


def _tuning(tuned: Mapping[str, Any] | None) -> str:
    """Write the divergence of a stored expert's answers from the expert's own, before and after tuning."""
    if tuned is None:
        return "-"
    before, after = tuned["divergence_before"], tuned["divergence_after"]
    by = "prompts" if tuned["data"] else "texts of its own"
    return f"{before:.2g} to {after:.2g} by {tuned['prompts']} {by}"


def _kept(kept: Any) -> str:
    """Write the part of its gain over the dense expert that an expert keeps; a dash without `keep`."""
    figures = _figures(kept)
    for source in ("measured", "predicted"):
        if isinstance(figures.get(source), float):
            return f"{figures[source]:.4f} {source}"
    return "-"


def _division(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what was measured when prompts divided a budget; nothing if none did."""
    measured = [
        f"{expert['name']} {', '.join(f'{nats:.2g}' for nats in divergences)}"
        for expert in experts
        if (divergences := _figures(expert["kept"]).get("divergences"))
    ]
    if not measured:
        return []
    return [
        "the budget is divided so that answers diverge least; measured before tuning, at each division that was tried, "
        f"in nats per answer: {'; '.join(measured)}"
    ]


def _figures(value: Any) -> Mapping[str, Any]:
    """Give a mapping of a manifest's free parameters, which may hold anything; empty if it is none."""
    return value if isinstance(value, dict) else {}


def _reason(settings: Mapping[str, Any]) -> str:
    """Write why these layers are routed, and why each has its bytes."""
    slopes = settings.get("slopes")
    if isinstance(slopes, dict) and all(isinstance(x, float) for x in slopes.values()) and slopes:
        least, most = min(slopes.values()), max(slopes.values())
        rate = f"{least:.2g}" if least == most else f"{least:.2g} to {most:.2g}, by expert,"
        return (
            f"a number is stored if it saves a squared error of {rate} or more, so that no byte would save "
            "more elsewhere in its expert"
        )
    rules = ("conflict_threshold", "routed_fraction", "routed_by", "routed_layers", "route")
    return ", ".join(f"{rule}: {settings[rule]}" for rule in rules if rule in settings)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))

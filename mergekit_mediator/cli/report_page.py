"""Write the report on an artifact: one HTML page without scripts, which loads nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mergekit_mediator.cli.plots import evaluation_panels, router_panels
from mergekit_mediator.cli.report_figures import layer_figures, quality_figure, router_figures
from mergekit_mediator.cli.report_style import STYLE
from mergekit_mediator.cli.tables import size
from mergekit_mediator.models.sources import public_name
from mergekit_mediator.store.calibration import Calibration, calibration_of
from mergekit_mediator.store.card_text import (
    LEGEND,
    example_counts,
    limits,
    results_table,
    said_of_routing,
)
from mergekit_mediator.store.evaluation import Evaluation
from mergekit_mediator.store.manifest import Manifest

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="mergekit-mediator">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1><p>{lead}</p></header>
<main>
{sections}
</main>
</body>
</html>
"""


def report_page(
    name: str, manifest: Manifest, artifact: Mapping[str, Any], evaluation: Evaluation | None
) -> str:
    """Write the page.

    Args:
        name: the name of the artifact.
        manifest: the artifact's manifest.
        artifact: the result of `inspect_figures`.
        evaluation: the artifact's evaluation, if there was one.

    Raises:
        OutputError: matplotlib is missing.
        ArtifactError: the manifest's figures of the router are damaged.
    """
    calibration = calibration_of(manifest)
    count = len(manifest.experts)
    lead = (
        f"{public_name(manifest.base.source)} and {count} expert{'s' * (count > 1)}: one dense checkpoint of "
        f"{size(artifact['dense_bytes'])}, and a small file for each expert."
    )
    sections = [
        _tiles(artifact, calibration, evaluation),
        _section("Experts", _experts(manifest, artifact)),
        _section("Layers", _layers(artifact)),
        _section("Router", _router(calibration)),
        _section("Evaluation", _evaluation(evaluation)),
        _section("Limits", _list(limits(manifest, evaluation))),
        _section("Manifest", _manifest(manifest)),
    ]
    return _PAGE.format(
        name=escape(name), lead=escape(lead), style=STYLE, sections="\n".join(sections)
    )


def _tiles(
    artifact: Mapping[str, Any], calibration: Calibration | None, evaluation: Evaluation | None
) -> str:
    """Write the figures that matter most."""
    layers = artifact["layers"]
    tiles = {
        "all files": size(artifact["total_bytes"]),
        "of the dense expert": f"{artifact['total_over_dense']:.3f} ×",
        "layers routed": f"{sum(layer['routed'] for layer in layers)} of {len(layers)}",
    }
    if calibration is not None:
        tiles["held-out prompts routed right"] = f"{100 * calibration.accuracy:.1f}%"
    routed = evaluation.systems.get("mediator") if evaluation else None
    if routed is not None and routed.normalized_mean is not None:
        tiles["of the experts' exact match"] = f"{routed.normalized_mean:.1f}%"
    items = [f"<li><b>{escape(value)}</b> {escape(text)}</li>" for text, value in tiles.items()]
    return f'<ul class="tiles">{"".join(items)}</ul>'


def _experts(manifest: Manifest, artifact: Mapping[str, Any]) -> str:
    head = ["expert", "bytes", "bits/parameter", "share of the mean", "licence", "source"]
    rows = [
        [
            entry.name,
            size(figures["bytes"]),
            f"{figures['bits_per_parameter']:.3f}",
            str(entry.weight),
            entry.license or "not stated",
            public_name(entry.source),
        ]
        for entry, figures in zip(manifest.experts, artifact["experts"], strict=True)
    ]
    return _table(head, rows)


def _layers(artifact: Mapping[str, Any]) -> str:
    metrics = list(artifact["layers"][0]["conflict"]) if artifact["layers"] else []
    head = ["layer", "", *metrics, "bits/parameter", "mean rank", "kept, %"]
    rows = [
        [
            layer["name"],
            "routed" if layer["routed"] else "averaged",
            *(f"{layer['conflict'].get(metric, 0.0):.3f}" for metric in metrics),
            *_stored(layer["stored"]),
        ]
        for layer in artifact["layers"]
    ]
    return layer_figures(artifact) + _details("Every layer", _table(head, rows))


def _stored(stored: Mapping[str, Any] | None) -> list[str]:
    if stored is None:
        return ["-", "-", "-"]
    kept = 100 * stored["density"]
    return [f"{stored['bits_per_parameter']:.3f}", f"{stored['rank']:.1f}", f"{kept:.2f}"]


def _router(calibration: Calibration | None) -> str:
    if calibration is None:
        return _paragraph(
            "The router is not calibrated: it was given no example prompts. Twenty of each expert make it better: "
            "mergekit-mediator calibrate"
        )
    text = (
        f"Calibrated with {sum(calibration.prompts.values())} prompts. Of held-out prompts, it gives "
        f"{100 * calibration.accuracy:.1f}% to their own expert; the expected calibration error is "
        f"{calibration.ece:.3f}. {calibration.said_of_ood}"
    )
    return _paragraph(text.rstrip()) + router_figures(
        router_panels(calibration.model_dump()), "router"
    )


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return _paragraph("This artifact was not evaluated yet: mergekit-mediator evaluate")
    figures = evaluation.model_dump()
    counts = example_counts(evaluation)
    sources = [f"{task}: {n} examples of {evaluation.sources[task]}" for task, n in counts.items()]
    tasks = list(evaluation.sources)
    likelihoods = [
        [name, *(f"{system.tasks[task].answer_log_likelihood:.3f}" for task in tasks)]
        for name, system in evaluation.systems.items()
    ]
    return (
        quality_figure(figures["systems"])
        + _paragraph(
            f"Exact match in percent; what is kept is relative to each task's expert. {LEGEND} "
            f"{said_of_routing(evaluation)}".rstrip()
        )
        + _table(*results_table(evaluation))
        + _details("Nats per answer token", _table(["system", *tasks], likelihoods))
        + _details("Examples", _list(sources))
        + "<h3>Routing of the examples</h3>"
        + router_figures(evaluation_panels(figures), "evaluation")
    )


def _manifest(manifest: Manifest) -> str:
    facts = {
        "written by": f"mergekit-mediator {manifest.package_version}",
        "format version": str(manifest.format_version),
        "parameters": f"{manifest.parameter_count:,}",
        "base": public_name(manifest.base.source),
        "licence of the base": manifest.base.license or "not stated",
        **{f"setting {name}": str(value) for name, value in manifest.parameters.items()},
    }
    files = [[name, f"{file.bytes:,}", file.sha256[:16]] for name, file in manifest.files.items()]
    terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{terms}</dl>" + _details(
        f"{len(files)} files", _table(["file", "bytes", "SHA-256 begins"], files)
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _breakable(name: str) -> str:
    """Let a browser break a long name after its underscores."""
    return escape(name).replace("_", "_<wbr>")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table that scrolls by itself where it is wider than the page."""
    heads = "".join(f'<th scope="col">{_breakable(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'

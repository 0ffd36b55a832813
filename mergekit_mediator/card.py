"""The model card, and the picture of the conflict profile."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_mediator.artifact import Manifest
from mergekit_mediator.errors import OutputError
from mergekit_mediator.staging_directories import output_name

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_BAR = 30

_CARD = """---
{metadata}---
# {name}

Base model and {count} experts, merged by [mergekit](https://github.com/arcee-ai/mergekit) with the
`mediator` method of mergekit-mediator (after [Mediator](https://arxiv.org/abs/2502.04411)).

- **Without** mergekit-mediator any tool loads the *dense expert*: the experts' weighted mean.
- **With** it, each request is routed to the expert it needs:

```python
from mergekit_mediator import MediatorModel
model = MediatorModel.from_pretrained("{name}")
```

Base: {base}

| expert | source | licence | share of the mean |
| --- | --- | --- | --- |
{experts}

## Conflict

`{metric}` conflict of the experts' changes by layer; `#` layers are routed, `.` layers averaged.

```
{chart}
```

## Configuration

```yaml
{config}
```
"""


def write_card(
    out: Path, manifest: Manifest, config_source: str, files: Iterable[str] = ()
) -> None:
    """Write README.md; needs no network, and shows no directory of this machine.

    Args:
        out: the artifact's directory.
        manifest: of the artifact.
        config_source: the configuration's text.
        files: that it names besides models.
    """
    models = [manifest.base.source, *(e.source for e in manifest.experts)]
    parts = {part for model in models for part in model.split("+")}
    hub = sorted(filter(is_hub_id, parts))
    for local in sorted(parts.difference(hub).union(files), key=len, reverse=True):
        config_source = config_source.replace(local, Path(local).name or local)
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["mergekit", "merge", "mergekit-mediator"],
    }
    if hub:
        metadata |= {"base_model": hub, "base_model_relation": "merge"}
    metric = manifest.parameters["conflict"]
    licenses = {manifest.base.license, *(expert.license for expert in manifest.experts)}
    if len(licenses) == 1 and None not in licenses:
        metadata["license"] = licenses.pop()
    rows = [
        f"| {e.name} | {_show(e.source)} | {e.license or 'not stated'} | {e.weight} |"
        for e in manifest.experts
    ]
    chart = conflict_chart(
        [layer.name for layer in manifest.layers],
        [layer.conflict.get(metric, 0.0) for layer in manifest.layers],
        [layer.routed for layer in manifest.layers],
    )
    text = _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=True),
        name=output_name(out),
        count=len(manifest.experts),
        base=_show(manifest.base.source),
        experts="\n".join(rows),
        metric=metric,
        chart=chart,
        config=config_source.strip(),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def conflict_chart(
    layers: Sequence[str], values: Sequence[float], routed: Sequence[bool | None]
) -> str:
    """One line of text per layer: its name, its conflict in [0, 1], and a bar."""
    width = max(map(len, layers), default=0)
    lines = []
    for layer, value, chosen in zip(layers, values, routed, strict=True):
        bar = ("#" if chosen else ".") * round(value * _BAR)
        lines.append(f"{layer:>{width}} {value:.3f} {bar}".rstrip())
    return "\n".join(lines)


def plot_conflict(
    path: Path, layers: Sequence[str], profile: Mapping[str, Sequence[float]], routed: Sequence[Any]
) -> None:
    """Draw the conflict profile: one line per metric over the layers, routed layers shaded.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("--plot needs matplotlib: pip install mergekit-mediator[plot]") from error
    figure = Figure(figsize=(max(6.0, 0.22 * len(layers)), 3.6), layout="constrained")
    axes = figure.subplots()
    for metric, values in profile.items():
        axes.plot(range(len(layers)), values, marker="o", markersize=3, label=metric)
    for index, chosen in enumerate(routed):
        if chosen:
            axes.axvspan(index - 0.5, index + 0.5, color="0.9", zorder=0)
    axes.set(xlabel="layer (routed layers shaded)", ylabel="conflict", ylim=(0, 1))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def is_hub_id(source: str) -> bool:
    """Whether a model's source names a repository on the Hub rather than a local directory."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def _show(source: str) -> str:
    parts = []
    for part in source.split("+"):
        name = Path(part).name or part
        parts.append(f"[{part}](https://huggingface.co/{part})" if is_hub_id(part) else f"`{name}`")
    return " + ".join(parts)

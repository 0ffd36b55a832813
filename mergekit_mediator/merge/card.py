"""The model card with its conflict chart, and the licences of models."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load
from tqdm import tqdm

from mergekit_mediator.errors import first_line
from mergekit_mediator.models.sources import is_hub_id, without_directories
from mergekit_mediator.store.manifest import Manifest
from mergekit_mediator.store.staging_directories import output_name

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
    """Write the model card, `README.md`, without the network and without naming local directories.

    Args:
        out: the directory of the artifact.
        manifest: the manifest of the artifact.
        config_source: the text of the configuration.
        files: the files that the configuration names besides models. The card shows their names alone.
    """
    models = [manifest.base.source, *(e.source for e in manifest.experts)]
    parts = {part for model in models for part in model.split("+")}
    hub = sorted(filter(is_hub_id, parts))
    config_source = without_directories(config_source, [*models, *files])
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
    """Draw one line of text for each layer: its name, its conflict in [0, 1], and a bar.

    Args:
        layers: the names of the layers.
        values: the conflict of each layer.
        routed: for each layer whether it is routed; None counts as averaged.
    """
    width = max(map(len, layers), default=0)
    lines = []
    for layer, value, is_routed in zip(layers, values, routed, strict=True):
        bar = ("#" if is_routed else ".") * round(value * _BAR)
        lines.append(f"{layer:>{width}} {value:.3f} {bar}".rstrip())
    return "\n".join(lines)


def _show(source: str) -> str:
    parts = []
    for part in source.split("+"):
        name = Path(part).name or part
        parts.append(f"[{part}](https://huggingface.co/{part})" if is_hub_id(part) else f"`{name}`")
    return " + ".join(parts)


def license_of(source: str, revision: str | None = None) -> str | None:
    """Read the licence of a model from its card, under the Hub's name for it, such as `apache-2.0`.

    Args:
        source: a directory, or a repository on the Hub.
        revision: the revision of the repository.

    Returns:
        None if there is no card, if the card cannot be read, or if it states no licence.
    """
    try:
        path = Path(source) / "README.md"
        if not Path(source).is_dir():
            path = Path(hf_hub_download(source, "README.md", revision=revision))
        metadata = metadata_load(path) or {}
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
    except (ValueError, yaml.YAMLError) as error:
        tqdm.write(f"warning: {source}: the model card cannot be read: {first_line(error)}")
        return None
    license = metadata.get("license")
    if license == "other":
        license = metadata.get("license_name", license)
    return license if isinstance(license, str) else None

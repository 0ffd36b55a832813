"""The model card with its conflict chart."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mergekit_mediator.merge.model_cards import disagreement, stated_by_any
from mergekit_mediator.models.sources import is_hub_id, without_directories
from mergekit_mediator.store.manifest import CARD, ExpertEntry, Manifest
from mergekit_mediator.store.staging_directories import output_name

_BAR = 30

_CARD = """---
{metadata}---
# {name}

Base model and {experts}, merged by [mergekit](https://github.com/arcee-ai/mergekit) with the
`mediator` method of mergekit-mediator (after [Mediator](https://arxiv.org/abs/2502.04411)).

- **Without** mergekit-mediator any tool loads the *dense expert*: {dense}. It has none of the
  experts' full skill: use it alone only where that is enough.
- **With** it, each request is routed to the expert it needs.

## How to load it

With [mergekit-mediator](https://pypi.org/project/mergekit-mediator/), which routes each request:

```python
from mergekit_mediator import MediatorModel
model = MediatorModel.from_pretrained("{name}")
```

With transformers and this package's remote code, routed too; without `trust_remote_code` this loads the dense expert:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```

With vLLM, which serves the experts as adapters and routes each request:

```sh
pip install "mergekit-mediator[vllm]"
VLLM_PLUGINS=mediator vllm serve {name} --enable-lora --max-loras 6 --max-lora-rank 64
```

## Models

Base: {base}

| expert | source | licence | share of the mean | bytes |
| --- | --- | --- | --- | --- |
{rows}
{kept}{warning}
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
    licenses = [manifest.base.license, *(expert.license for expert in manifest.experts)]
    differ = disagreement(licenses)
    warning = ""
    if differ is not None:
        tqdm.write(
            f"warning: the models' licences differ ({differ}): check them before you publish"
        )
        warning = (
            f"\n**The licences of these models differ: {differ}.** Check that you may do what you want "
            "to do.\n"
        )
    metric = manifest.parameters["conflict"]
    count = len(manifest.experts)
    text = _CARD.format(
        metadata=yaml.safe_dump(_metadata(manifest, models), sort_keys=True),
        name=output_name(out),
        experts=f"{count} experts" if count > 1 else "one expert",
        dense=_dense(manifest),
        base=_show(manifest.base.source),
        rows="\n".join(_row(manifest, expert) for expert in manifest.experts),
        kept=_kept(manifest),
        warning=warning,
        metric=metric,
        chart=conflict_chart(
            [layer.name for layer in manifest.layers],
            [layer.conflict.get(metric, 0.0) for layer in manifest.layers],
            [layer.routed for layer in manifest.layers],
        ),
        config=without_directories(config_source, [*models, *files]).strip(),
    )
    (out / CARD).write_text(text, encoding="utf-8")


def _metadata(manifest: Manifest, models: Sequence[str]) -> dict[str, Any]:
    """The metadata as the Hub reads them: models of the Hub in the configuration's order, each once."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "mergekit-mediator"],
    }
    hub = [part for model in models for part in model.split("+") if is_hub_id(part)]
    if hub:
        metadata |= {"base_model": list(dict.fromkeys(hub)), "base_model_relation": "merge"}
    licenses = {manifest.base.license, *(expert.license for expert in manifest.experts)}
    if len(licenses) == 1 and None not in licenses:
        metadata["license"] = licenses.pop()
    for name in ("language", "datasets"):
        if values := stated_by_any(manifest, name):
            metadata[name] = values
    return metadata


def _dense(manifest: Manifest) -> str:
    if manifest.parameters.get("reference") != "base":
        return "the experts' weighted mean"
    if all(layer.routed for layer in manifest.layers):
        return "the base model"
    return "the base model, with the experts' weighted mean in averaged layers"


def _row(manifest: Manifest, expert: ExpertEntry) -> str:
    size = manifest.files.get(f"mediator/{expert.file}")
    cells = [
        expert.name,
        _show(expert.source),
        expert.license or "not stated",
        str(expert.weight),
        f"{size.bytes:,}" if size else "",
    ]
    return f"| {' | '.join(cells)} |"


def _kept(manifest: Manifest) -> str:
    """The part of its gain over the dense expert that each expert keeps; nothing without `keep`."""
    parts: Mapping[str, Mapping[str, float | None]] = manifest.parameters.get("kept") or {}
    if not parts:
        return ""
    lines = ["", "The part of its gain over the dense expert that each expert keeps:", ""]
    for name, part in parts.items():
        if part["measured"] is not None:
            lines.append(f"- {name}: {part['measured']:.4f}, measured on held-out prompts")
        else:
            lines.append(f"- {name}: {part['predicted']:.4f}, predicted")
    return "\n".join([*lines, ""])


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

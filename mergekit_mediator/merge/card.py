"""The model card, of which people may change all but the generated part."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mergekit_mediator.merge.model_cards import disagreement, stated_by_any
from mergekit_mediator.models.sources import is_hub_id, without_directories
from mergekit_mediator.store.card import generated_part
from mergekit_mediator.store.manifest import CARD, ExpertEntry, Manifest
from mergekit_mediator.store.staging_directories import output_name

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
{warning}
{generated}

## Configuration

```yaml
{config}
```
"""
_WARNING = """
**The licences of these models differ: {licenses}.** Check that you may do what you want to do.
"""


def write_card(
    out: Path, manifest: Manifest, config_source: str, files: Iterable[str] = ()
) -> None:
    """Write the model card, `README.md`, and warn of licences that differ.

    Args:
        out: the directory of the artifact.
        manifest: the manifest of the artifact, with the digests of its files.
        config_source: the text of the configuration.
        files: the files that the configuration names besides models. The card shows their names alone.
    """
    differ = disagreement(_licenses(manifest))
    if differ is not None:
        tqdm.write(
            f"warning: the models' licences differ ({differ}): check them before you publish"
        )
    text = new_card(output_name(out), manifest, config_source, files)
    (out / CARD).write_text(text, encoding="utf-8")


def new_card(name: str, manifest: Manifest, config_source: str, files: Iterable[str] = ()) -> str:
    """Make the text of the model card, without the network and without naming local directories.

    Args:
        name: the title.
        manifest: see `write_card`.
        config_source: see `write_card`.
        files: see `write_card`.
    """
    models = [manifest.base.source, *(e.source for e in manifest.experts)]
    differ = disagreement(_licenses(manifest))
    warning = "" if differ is None else _WARNING.format(licenses=differ)
    count = len(manifest.experts)
    return _CARD.format(
        metadata=yaml.safe_dump(_metadata(manifest, models), sort_keys=True),
        name=name,
        experts=f"{count} experts" if count > 1 else "one expert",
        dense=_dense(manifest),
        base=_show(manifest.base.source),
        rows="\n".join(_row(manifest, expert) for expert in manifest.experts),
        warning=warning,
        generated=generated_part(manifest),
        config=without_directories(config_source, [*models, *files]).strip(),
    )


def _licenses(manifest: Manifest) -> list[str | None]:
    return [manifest.base.license, *(expert.license for expert in manifest.experts)]


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
    licenses = set(_licenses(manifest))
    if len(licenses) == 1 and None not in licenses:
        metadata["license"] = licenses.pop()
    for name in ("language", "datasets"):
        if values := stated_by_any(manifest, name):
            metadata[name] = values
    return metadata


def _dense(manifest: Manifest) -> str:
    if manifest.merged_by is not None:
        return f"the experts' merge by `{manifest.merged_by}`"
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


def _show(source: str) -> str:
    parts = []
    for part in source.split("+"):
        name = Path(part).name or part
        parts.append(f"[{part}](https://huggingface.co/{part})" if is_hub_id(part) else f"`{name}`")
    return " + ".join(parts)

"""The settings of an expert's PEFT adapter, and the kinds of adapters that are no change of weights."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from mergekit.common import ModelReference
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.models.sources import is_hub_id

_FILE = "adapter_config.json"


def read_adapter_config(model: ModelReference) -> PeftConfig:
    """Read the settings of a model's adapter; of an adapter on the Hub, this file alone is downloaded.

    Args:
        model: a model with an adapter, `BASE+ADAPTER`.

    Raises:
        InputError: the file is missing or unreadable, PEFT does not know the kind of adapter, or the adapter
            changes the inputs or activations of a model and not its weights.
    """
    try:
        fields = json.loads(_local(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model}: {_FILE} of an adapter required: {first_line(error)}: name the directory of a "
            "PEFT adapter"
        ) from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"model {model}: {_FILE}: a `peft_type` that PEFT knows required, got {kind!r}: update PEFT"
        )
    try:
        config: PeftConfig = PeftConfig.from_peft_type(**fields)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise InputError(f"model {model}: {_FILE}: {first_line(error)}") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"model {model}: an adapter that changes weights required, got {kind}, which changes the inputs or "
            "activations of the model: train LoRA, or leave it out"
        )
    return config


def kind_of(config: PeftConfig) -> str:
    """Return PEFT's name of an adapter's kind, such as `LORA`."""
    return str(PeftType(config.peft_type).value)


def adapter_directory(model: ModelReference) -> Path:
    """Find the files of a model's adapter on this machine; download them as needed."""
    path = Path(model.lora.path)
    if path.is_dir():
        return path
    return Path(snapshot_download(model.lora.path, revision=model.lora.revision))


def _local(model: ModelReference) -> Path:
    adapter = model.lora
    if Path(adapter.path).exists() or not is_hub_id(adapter.path):
        return Path(adapter.path, _FILE)
    return Path(hf_hub_download(adapter.path, _FILE, revision=adapter.revision))

"""An adapter that PEFT merges into a whole model, which lies on disk until the merge ends."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference, dtype_from_name, get_auto_cls
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions
from peft import PeftConfig

from mergekit_mediator.errors import InputError, OutputError, first_line
from mergekit_mediator.merge.adapters.adapted_model import adapt
from mergekit_mediator.merge.adapters.config import adapter_directory, kind_of

_LOG = logging.getLogger(__name__)


def merge_whole(
    model: ModelReference, config: PeftConfig, base: LazyTensorLoader, options: MergeOptions
) -> LazyTensorLoader:
    """Let PEFT merge an adapter into a whole model, in the directory where mergekit would put it.

    A model that is there already is used again. A new one appears when it is whole.

    Args:
        model: a model with an adapter.
        config: the adapter's settings.
        base: the loader of the base model.
        options: mergekit's options, with a cache directory.

    Returns:
        The loader of the merged model.

    Raises:
        InputError: the adapter does not fit the base, or PEFT cannot merge it.
        OutputError: the disk has no room for the merged model.
    """
    cache = Path(options.lora_merge_cache)
    out = cache / f"{model.model._unique_id()}_{model.lora._unique_id()}"
    if not out.exists():
        cache.mkdir(parents=True, exist_ok=True)
        root = Path(base.index.base_path)
        size = sum((root / file).stat().st_size for file in set(base.index.tensor_paths.values()))
        free = shutil.disk_usage(cache).free
        if free < size:
            raise OutputError(
                f"{cache}: disk full: {size:,} bytes required to merge {model}, {free:,} free: make room, or "
                "name another directory with --lora-merge-cache"
            )
        _LOG.warning(
            "%s: PEFT merges this %s adapter into a whole model: %s, %s bytes",
            *(model, kind_of(config), out, f"{size:,}"),
        )
        settings = model.config(trust_remote_code=options.trust_remote_code)
        whole: Any = get_auto_cls(settings.architectures[0]).from_pretrained(
            model.model.path,
            revision=model.model.revision,
            dtype=dtype_from_name(options.lora_merge_dtype) or "auto",
            trust_remote_code=options.trust_remote_code,
        )
        try:
            merged = adapt(whole, config, adapter_directory(model)).merge_and_unload()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"model {model}: PEFT cannot merge this {kind_of(config)} adapter: {first_line(error)}"
            ) from error
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            merged.save_pretrained(Path(partial, out.name))
            Path(partial, out.name).rename(out)
    return LazyTensorLoader.from_disk(str(out), lazy_unpickle=options.lazy_unpickle)

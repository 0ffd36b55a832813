"""A base model with an adapter, as mergekit's methods read it: weight by weight, without a merged model on disk."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from mergekit.common import ModelReference, dtype_from_name, get_auto_cls
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_mediator.errors import InputError
from mergekit_mediator.merge.adapters.adapted_model import AdaptedModel
from mergekit_mediator.merge.adapters.config import adapter_directory, kind_of, read_adapter_config
from mergekit_mediator.merge.adapters.lora import changes_base
from mergekit_mediator.merge.adapters.whole_model import merge_whole

# PEFT merges these kinds one module at a time, from the module's own weights and the adapter's file. All other
# kinds are merged as whole models: some of them decompose the base's weights when PEFT loads them.
_KINDS = """
ADALORA BOFT C3A DEFT DELORA FOURIERFT GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT PEANUT PVERA
RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
"""
ONE_BY_ONE = frozenset(_KINDS.split())


class AdapterLoader:
    """A loader of a base model that merges an adapter into each weight that it reads.

    Attributes:
        index: the index of the base model's files.
    """

    def __init__(self, base: LazyTensorLoader, adapted: AdaptedModel, dtype: str | None) -> None:
        """Read weights of the base under the adapter.

        Args:
            base: the loader of the base model.
            adapted: the base model under the adapter.
            dtype: the dtype of all floating weights; None for the dtype of the base.
        """
        self.index = base.index
        self._base, self._adapted = base, adapted
        self._dtype: torch.dtype | None = dtype_from_name(dtype)

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Read a weight, computed in float32 and rounded once; see mergekit's `LazyTensorLoader`."""
        name = next((n for n in (key, *(aliases or ())) if n in self.index.tensor_paths), key)
        weight: Tensor | None = self._base.get_tensor(
            name, device=device, raise_on_missing=raise_on_missing
        )
        if weight is None or not weight.is_floating_point():
            return weight
        dtype = self._dtype or weight.dtype
        twin = next((n for n in self._adapted.twins(name) if n in self._adapted.changed), None)
        if twin is not None:
            weight = self._adapted.weight(twin, self.base_weight)
        return weight.to(device, dtype)

    def base_weight(self, name: str) -> Tensor:
        """Read a weight of the base without the adapter; a tied weight goes by any of its names."""
        held = (n for n in self._adapted.twins(name) if n in self.index.tensor_paths)
        weight: Tensor = self._base.get_tensor(next(held, name))
        return weight

    def flush(self) -> None:
        """Close the base's file."""
        self._base.flush()


def open_adapted(
    model: ModelReference, options: MergeOptions, dtype: str | None = None
) -> AdapterLoader | LazyTensorLoader:
    """Open a model with an adapter.

    An adapter of a kind in `ONE_BY_ONE` is merged into each weight that is read. Any other adapter is merged by
    PEFT into a whole model in `--lora-merge-cache`, which is opened.

    Args:
        model: a model with an adapter.
        options: mergekit's options, with a cache directory.
        dtype: the dtype of the weights of an adapter that is merged one by one, unless the options name one; None for
            that of the base.

    Raises:
        InputError: the adapter is no change of weights, is incomplete, belongs to another base, or changes one
            of two tied weights; or PEFT cannot merge it.
        OutputError: the merged model would fill the disk.
    """
    config = read_adapter_config(model)
    base = ModelReference(model=model.model).lazy_loader(
        cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle
    )
    if kind_of(config) not in ONE_BY_ONE or changes_base(config):
        return merge_whole(model, config, base, options)
    settings = model.config(trust_remote_code=options.trust_remote_code)
    with torch.device("meta"):
        skeleton = get_auto_cls(settings.architectures[0]).from_config(
            settings, trust_remote_code=options.trust_remote_code
        )
    adapted = AdaptedModel(skeleton, config, adapter_directory(model))
    held = base.index.tensor_paths
    if not all(any(n in held for n in adapted.twins(name)) for name in adapted.changed):
        # the model joins several tensors of the checkpoint into one parameter
        return merge_whole(model, config, base, options)
    loader = AdapterLoader(base, adapted, options.lora_merge_dtype or dtype)
    for name in adapted.one_of_each_kind():
        adapted.weight(name, loader.base_weight)
    _check_ties(model, adapted, loader)
    return loader


@contextmanager
def adapters_by_weight(
    models: Iterable[ModelReference], options: MergeOptions
) -> Iterator[MergeOptions]:
    """Let mergekit's own tasks read models with adapters weight by weight.

    Args:
        models: all models of a merge.
        options: mergekit's options.

    Yields:
        The options, with a directory for what must be merged as a whole.

    Raises:
        InputError: see `open_adapted`.
    """
    loaders = LoaderCache.loaders
    adapted = [model for model in models if model.lora is not None]
    with ExitStack() as stack:
        if adapted and options.lora_merge_cache is None:
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            options = options.model_copy(update={"lora_merge_cache": cache})
        for model in adapted:
            loaders[model] = open_adapted(model, options)
            stack.callback(loaders.pop, model, None)
        yield options


def _check_ties(model: ModelReference, adapted: AdaptedModel, loader: AdapterLoader) -> None:
    """Refuse an adapter that makes two weights of one."""
    for names in {adapted.twins(name) for name in adapted.changed}:
        weights = [
            adapted.weight(n, loader.base_weight)
            if n in adapted.changed
            else loader.base_weight(n).float()
            for n in names
        ]
        if any(not torch.allclose(weights[0], w, rtol=1e-4, atol=1e-6) for w in weights[1:]):
            changed = next(n for n in names if n in adapted.changed)
            raise InputError(
                f"model {model}: one change of {' and '.join(names)} required, which are one weight "
                f"(tie_word_embeddings), got a change of {changed} alone, or two: train with "
                "`ensure_weight_tying=True`, or on a base of untied weights"
            )

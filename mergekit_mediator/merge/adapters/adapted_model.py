"""A base model under a PEFT adapter, without the base's weights: PEFT merges one module at a time."""

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, ShiraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from mergekit_mediator.errors import InputError, first_line

_ADAPTER = "default"
# PEFT raises these errors if an adapter cannot be read, or does not fit its base.
_UNFIT = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(SafetensorError, UnpicklingError),
)
Read = Callable[[str], Tensor]


def adapt(model: nn.Module, config: PeftConfig, directory: Path) -> PeftModel:
    """Put an adapter on a model.

    Args:
        model: the base model; its modules are replaced.
        config: the adapter's settings.
        directory: the directory of the adapter's weights, which are loaded in float32.

    Raises:
        InputError: the weights cannot be read, are incomplete, or are those of another base.
    """
    try:
        given = load_peft_weights(str(directory), device="cpu")
        config = copy.deepcopy(config)
        config.inference_mode = True
        if isinstance(config, ShiraConfig):
            # the file holds the positions: PEFT need not draw others first
            config.mask_fn = None  # type: ignore[assignment]
        adapted = PeftModel(model, config, _ADAPTER)
        expected = get_peft_model_state_dict(
            adapted, adapter_name=_ADAPTER, save_embedding_layers=False
        )
        _check(given, expected, directory)
        given = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
        loaded: Any = set_peft_model_state_dict(adapted, given, _ADAPTER, low_cpu_mem_usage=True)
    except InputError:
        raise
    except _UNFIT as error:
        raise InputError(
            f"{directory}: PEFT cannot put this adapter on its base: {first_line(error)}: an adapter of this "
            "base required"
        ) from error
    if loaded.unexpected_keys:
        raise InputError(
            f"{directory}: {loaded.unexpected_keys[0]} belongs to no module that the adapter adds to this base: an "
            "adapter of this base required"
        )
    return adapted.eval()


def _check(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], directory: Path) -> None:
    """Compare the tensors in an adapter's file with those that PEFT would save."""
    missing = [name for name in expected if name not in given]
    if missing:
        raise InputError(
            f"{directory}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are): a complete "
            "adapter of this base required: save it anew"
        )
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise InputError(
                f"{directory}: {name}: shape {list(given[name].shape)}, but {list(tensor.shape)} on this base: an "
                "adapter of this base required"
            )


class AdaptedModel:
    """A base model under an adapter, whose weights are merged when they are asked for.

    Attributes:
        changed: the names of the base's weights that the adapter changes.
    """

    def __init__(self, skeleton: nn.Module, config: PeftConfig, directory: Path) -> None:
        """Put the adapter on a model without weights.

        Args:
            skeleton: the base model on the meta device.
            config: the adapter's settings.
            directory: the directory of the adapter's weights.

        Raises:
            InputError: see `adapt`.
        """
        self._twins = _stand_in(skeleton)
        stands = {id(weight): weight for weight in skeleton.parameters()}
        root = adapt(skeleton, config, directory).get_base_model()
        self._layers: dict[str, nn.Module] = {}
        for name, module in root.named_modules():
            inside = any(name.startswith(f"{layer}.") for layer in self._layers)
            if not inside and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                self._layers[name] = cast(nn.Module, module)
        self._owners = {
            f"{layer}.{name}": layer
            for layer, module in self._layers.items()
            for name, _ in _base_of(module).named_parameters()
        }
        # weights of the base that the adapter's file holds, such as biases
        self._loaded: dict[str, Tensor] = {}
        parts = [(f"{layer}.", _base_of(module)) for layer, module in self._layers.items()]
        for prefix, part in (("", root), *parts):
            for name, weight in part.named_parameters(remove_duplicate=False):
                in_adapter = not prefix and any(name.startswith(f"{la}.") for la in self._layers)
                if not in_adapter and id(weight) not in stands:
                    self._loaded[prefix + name] = weight.detach()
        self.changed = frozenset((*self._owners, *self._loaded))

    def twins(self, name: str) -> tuple[str, ...]:
        """List the names of a tied weight; a weight of one name is alone."""
        return self._twins.get(name, (name,))

    def one_of_each_kind(self) -> list[str]:
        """Name a weight of each class of layers that the adapter adds."""
        kinds = {type(self._layers[layer]): name for name, layer in self._owners.items()}
        return list(kinds.values())

    @torch.no_grad()
    def weight(self, name: str, read: Read) -> Tensor:
        """Merge the adapter into one weight, as PEFT does. It is thread-safe.

        Args:
            name: the name of a changed weight.
            read: reads a weight of the base by name.

        Returns:
            The weight in float32, or in float64 if the base's weight is.

        Raises:
            InputError: PEFT cannot merge the adapter into this module.
        """
        layer = self._owners.get(name)
        if layer is None:
            return self._loaded[name]
        module = self._layers[layer]
        real = {}
        for own, stand in _base_of(module).named_parameters():
            full = f"{layer}.{own}"
            weight = self._loaded[full] if full in self._loaded else read(full)
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            real[id(stand)] = nn.Parameter(weight, requires_grad=False)
        # the copy has the base's weights where the module has stand-ins
        module = copy.deepcopy(module, real)
        try:
            merged = _merge(module)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(
                f"{name}: PEFT cannot merge the adapter into it: {first_line(error)}"
            ) from error
        weight = merged.get_parameter(name.removeprefix(f"{layer}."))
        return weight.detach()


def _merge(module: nn.Module) -> nn.Module:
    """Merge an adapter's module as PEFT's `merge_and_unload` does; return the base's module."""
    layer: Any = module
    if hasattr(layer, "unload_and_optionally_merge_module"):
        merged: nn.Module = layer.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
        return merged
    layer.merge(safe_merge=False, adapter_names=None)
    return _base_of(layer)


def _base_of(module: nn.Module) -> nn.Module:
    """Return the base's module below an adapter's module."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        original: nn.Module = module.original_module
        return original
    base: nn.Module = module.get_base_layer()  # type: ignore[operator]
    return base


def _stand_in(skeleton: nn.Module) -> dict[str, tuple[str, ...]]:
    """Give every parameter zeros that take no memory; return the names of each tied parameter, by every name."""
    zeros: dict[int, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for prefix, module in skeleton.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in zeros:
                zero = torch.zeros((), dtype=torch.float32).expand(weight.shape)
                zeros[id(weight)] = nn.Parameter(zero, requires_grad=False)
            names.setdefault(id(weight), []).append(f"{prefix}.{name}" if prefix else name)
            module._parameters[name] = zeros[id(weight)]
    tied = [tuple(group) for group in names.values() if len(group) > 1]
    return dict(chain.from_iterable(((name, group) for name in group) for group in tied))

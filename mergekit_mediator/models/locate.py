"""Where a checkpoint's weights live in a loaded model: parameters, or parts of fused ones."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from mergekit_mediator.errors import MixtureError

# transformers fuses the expert matrices of mixture-of-experts blocks when it loads a checkpoint.
_FUSED = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def locate_weights(
    model: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The storage of each checkpoint weight in a model, contiguous and writable in place.

    Args:
        model: a transformers model, with its weights as loaded.
        names: as in the checkpoint.
        shapes: of the checkpoint's weights, checked against what is found.

    Raises:
        MixtureError: a weight is not there, is quantised, or has another shape: the loader has
            converted it in a way that this package does not know.
    """
    parameters = {name: p.data for name, p in model.named_parameters()}
    parameters.update({name: b.data for name, b in model.named_buffers()})
    prefix = getattr(model, "base_model_prefix", "")
    found = {}
    for name in names:
        weight = _find(name, parameters, prefix)
        if weight is None:
            raise MixtureError(
                f"{name}: not found in {type(model).__name__}, whose loader has converted it: "
                "load the model with another version of transformers"
            )
        if type(weight) is not Tensor:  # some quantised weights pass for floating-point ones
            raise MixtureError(
                f"{name}: an ordinary weight required, got {type(weight).__name__}: load the model "
                "without quantization"
            )
        if weight.is_meta:
            raise MixtureError(
                f"{name}: is not in memory: load the model without offloading it, on one device or several"
            )
        if not weight.is_contiguous():
            raise MixtureError(
                f"{name}: a contiguous weight required, got strides {weight.stride()}"
            )
        if not weight.is_floating_point() or tuple(weight.shape) != tuple(shapes[name]):
            raise MixtureError(
                f"{name}: a floating-point weight of shape {list(shapes[name])} required, got "
                f"{weight.dtype} {list(weight.shape)}: load the model without quantization"
            )
        found[name] = weight
    return found


def fingerprint(model: nn.Module) -> list[tuple[int, int]]:
    """Changes when a weight is moved or cast, which gives it other storage, or written by others."""
    found, left = [], [model]
    while left:  # three times as fast as `model.parameters()`, and on the way of every request
        module = left.pop()
        left += [child for child in module._modules.values() if child is not None]
        found += [
            (p.data_ptr(), -1 if p.is_inference() else p._version)
            for p in module._parameters.values()
            if p is not None
        ]
    return found


def _find(name: str, parameters: Mapping[str, Tensor], prefix: str) -> Tensor | None:
    module, _, parameter = name.rpartition(".")
    # where PEFT has added an adapter, it wraps the module
    for own in (name, f"{module}.base_layer.{parameter}"):
        for candidate in (own, f"{prefix}.{own}", own.removeprefix(f"{prefix}.")):
            if candidate in parameters:
                return parameters[candidate]
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return None
    experts, index, projection = fused[1], int(fused[2]), fused[3]
    joined = "down_proj" if projection == "down_proj" else "gate_up_proj"
    weight = _find(f"{experts}.{joined}", parameters, prefix)
    if weight is None or weight.ndim != 3 or index >= len(weight):
        return None
    if projection == "down_proj":
        return weight[index]
    half = weight.shape[1] // 2
    return weight[index, :half] if projection == "gate_proj" else weight[index, half:]
